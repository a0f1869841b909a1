"""What `quality.py` and `ablation.py` measured, for people.

    python tests/bench/table.py tests/bench/results/family-smollm2.json

writes family-smollm2.md, a table of every row, and family-smollm2.png beside the results, and prints the README's
tables, which `tests/test_project.py` compares with what the README says. Of results of `ablation.py` it writes and
prints tables too.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ablation import ROWS, options_of
from acc.cli.pictures import KIND_COLOURS, OTHERS, OWN

METHODS = {  # of quality.py's FAMILY, as columns
    "rtn": "rounding",
    "gptq": "gptq",
    "lut-gemm": "lut-gemm",
    "lut-gemm plain": "lut-gemm, `--activation-aware false`",
    "spqr": "spqr, `--outlier-threshold 1`",
}
SPQR = {  # of ablation.py's rows, those of the README
    "authors": "the authors' settings",
    "damp 0.1, sweep": "their statistics and threshold, damping 0.1 and a sweep",
    "damp 0.1, sweep, refine 16": "the same and 16 steps of learned rounding",
    "lean statistics": "statistics of 64 rows, threshold 0.5",
    "lean, refine 16": "the same and 16 steps of learned rounding: the default",
    "groups of 32": "`--group-size 32 --outlier-threshold 1 --refine 0`",
    "groups of 32, refine 16": "the same and 16 steps of learned rounding",
}
LINES = METHODS | {"mixed": "gptq, a mix"}
COLOURS = (KIND_COLOURS[0], *OTHERS)
MARKERS = "xosvD^"


class Row:
    """One row of the results: what was asked for, and what came of it."""

    def __init__(self, name: str, row: dict[str, Any]) -> None:
        made, scored = row["quantize"], row["eval"]
        cell = re.fullmatch(r"(.+) (\d), groups of (\d+)", name)
        self.method = "mixed" if name.startswith("gptq") and name.endswith("mixed") else None
        self.cell = None
        if cell and cell[1] in METHODS:
            self.method, self.cell = cell[1], (int(cell[2]), int(cell[3]))
        self.options = options(row["command"])
        self.bits = made["packed"]["packed_bits"]
        self.perplexity, self.kl = scored["perplexity"], scored["kl"]
        self.loss = scored["nll"] - scored["nll_base"]
        self.seconds = row.get("seconds", made.get("seconds"))
        self.peak = row.get("peak_memory_gib")


def rows_of(found: dict[str, Any]) -> list[Row]:
    return [Row(name, row) for name, row in found["rows"].items()]


def conditions(found: dict[str, Any]) -> str:
    """What all rows have in common."""
    settings = found["settings"]
    return (
        f"{found['model']}, calibrated on {settings['nsamples']} sequences of {settings['seqlen']} tokens, scored on "
        f"{settings['windows']} windows of {settings['window']}"
    )


def options(command: list[str]) -> str:
    """What a user types after the model's name: the command less its folder, its text, and how it reports."""
    words = command[3:]
    for name in ("--data", "--nsamples", "--seqlen", "--measured"):
        if name in words:
            at = words.index(name)
            del words[at : at + 2]
    return " ".join(word for word in words if word != "--json")


def figure(value: float) -> str:
    """Three digits, at most three of them behind the point."""
    return f"{value:.3f}" if value < 0.9995 else f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def cells(rows: list[Row]) -> str:
    """Bits and groups from top to bottom, methods from left to right: the loss, and the bits that it took."""
    found = {(row.cell, row.method): f"{figure(row.loss)} at {row.bits:.2f}" for row in rows if row.cell}
    places = sorted({row.cell for row in rows if row.cell}, key=lambda cell: (cell[0], -cell[1]))
    lines = [
        [f"{bits} bits, groups of {size}", *(found.get(((bits, size), method), "") for method in METHODS)]
        for bits, size in places
    ]
    return markdown(["", *METHODS.values()], lines)


def others(rows: list[Row]) -> str:
    left = sorted((row for row in rows if not row.cell), key=lambda row: row.bits)
    lines = [[f"`{row.options}`", f"{row.bits:.2f}", figure(row.loss), figure(row.kl)] for row in left]
    return markdown(["`acc quantize MODEL`", "stored bits", "loss", "KL"], lines)


def whole(found: dict[str, Any], rows: list[Row]) -> str:
    """Every row with all its figures."""
    lines = [
        [
            f"`{row.options}`",
            f"{row.bits:.3f}",
            f"{row.perplexity:.2f}",
            figure(row.loss),
            figure(row.kl),
            f"{row.seconds:.0f}",
            f"{row.peak:.2f}" if row.peak else "",
        ]
        for row in sorted(rows, key=lambda row: row.bits)
    ]
    head = ["`acc quantize MODEL`", "stored bits", "perplexity", "loss", "KL", "seconds", "peak GiB"]
    return (
        f"{conditions(found)}.\nLoss and KL are nats per token against the dense "
        "model. Seconds and memory are those of the run that made the row, on one thread\nbeside other work: they "
        "tell minutes from seconds, not one method from the next.\n\n" + markdown(head, lines) + "\n"
    )


def choices(found: dict[str, Any], labels: dict[str, str], with_kl: bool) -> str:
    """Of an ablation: options from top to bottom, bits from left to right."""
    rows = found["rows"]
    every = sorted({row["bits"] for row in rows.values()})

    def cell(bits: int, name: str) -> str:
        row = rows.get(f"{bits} bits, {name}")
        if row is None:
            return ""
        figures = [figure(row["excess_nats"]), *([figure(row["kl"])] if with_kl and "kl" in row else [])]
        return f"{', '.join(figures)} at {row['stored_bits']:.2f}"

    lines = [[label, *(cell(bits, name) for bits in every)] for name, label in labels.items()]
    return markdown(["", *(f"{bits} bits" for bits in every)], lines)


def ablation(found: dict[str, Any]) -> str:
    """Every row of one."""
    labels = {name: f"`{' '.join(options_of(name))}`" for name in ROWS}
    return (
        f"{conditions(found)}:\nnats per token lost against the dense model, KL "
        "divergence from it where it was measured, and stored bits.\n\n" + choices(found, labels, True) + "\n"
    )


def picture(found: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Loss against stored bits, a line per method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter

    drawn = Figure(figsize=(8, 5), layout="constrained")
    axes = drawn.subplots()
    for (method, label), colour, marker in zip(LINES.items(), COLOURS, MARKERS, strict=True):
        points = sorted((row.bits, row.loss) for row in rows if row.method == method)
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.2}
        axes.plot(*zip(*points), label=label.replace("`", ""), **style)
    for row in rows:
        if row.options.startswith("--method nf4"):
            axes.plot(row.bits, row.loss, "P", color=OWN, label="nf4, activation-aware")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xlabel("stored bits per packed weight, counted from the files")
    axes.set_ylabel("nats per token lost")
    axes.set_title(f"{found['model'].partition('.')[0]}: what is lost at a size", fontsize=11)
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    drawn.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results
    found = json.loads(path.read_text())
    if all("options" in row for row in found["rows"].values()):
        path.with_suffix(".md").write_text(ablation(found))
        print(choices(found, SPQR, False))
        return
    rows = rows_of(found)
    path.with_suffix(".md").write_text(whole(found, rows))
    picture(found, rows, path.with_suffix(".png"))
    print(cells(rows), others(rows), sep="\n\n")


if __name__ == "__main__":
    main()
