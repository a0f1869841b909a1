"""Each option of SpQR alone, on one model: what it costs in bits and seconds, and what it brings.

    python tests/bench/ablation.py MODEL --data CALIBRATION.txt --eval TEXT.txt --out tests/bench/results/NAME.json

Every row is made by `acc quantize` in a process of its own; several are scored together as `acc eval --base` does it:
perplexity, its excess over the dense model's and the divergence from it, both in nats per token, stored bits. Rows that
are in the output file are not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from measure import machine
from quality import TOGETHER, make, score

LEAN = ["--stat-group-size", "64", "--outlier-threshold", "0.5"]
PLAIN = ["--stat-group-size", "64", "--outlier-threshold", "none"]
WIDE = ["--group-size", "32", "--stat-group-size", "64", "--outlier-threshold", "1.0"]
RICH = ["--stat-group-size", "16", "--outlier-threshold", "0.2"]
ROWS: dict[str, list[str]] = {  # without --refine unless it is named
    "authors": [*RICH, "--damp-percent", "1", "--sweeps", "0"],
    "damp 0.1": [*RICH, "--sweeps", "0"],
    "damp 0.1, sweep": RICH,
    "damp 0.1, sweep, refine 16": [*RICH, "--refine", "16"],
    "lean statistics": LEAN,
    "lean, no sweep": [*LEAN, "--sweeps", "0"],
    "lean, refine 16": [*LEAN, "--refine", "16"],
    "lean, rotate heads": [*LEAN, "--rotate", "heads"],
    "lean, rotate residual": [*LEAN, "--rotate", "residual"],
    "lean, no outliers": PLAIN,
    "lean, no outliers, rotate residual": [*PLAIN, "--rotate", "residual"],
    "lean, no outliers, rotate all": [*PLAIN, "--rotate", "all"],
    "groups of 32": WIDE,
    "groups of 32, refine 16": [*WIDE, "--refine", "16"],
}


def options_of(name: str) -> list[str]:
    """What a row is made with."""
    return ROWS[name] if "--refine" in ROWS[name] else [*ROWS[name], "--refine", "0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", nargs="*", type=int, default=[3])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="which rows; all by default")
    for name, default in (("nsamples", 32), ("seqlen", 1024), ("window", 2048), ("windows", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("nsamples", "seqlen", "window", "windows")}
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    rows = found.get("rows", {})
    missing = [(bits, name) for bits in arguments.bits for name in arguments.rows]
    missing = [(bits, name) for bits, name in missing if f"{bits} bits, {name}" not in rows]
    while missing:
        now, missing = missing[:TOGETHER], missing[TOGETHER:]
        made = {}
        with tempfile.TemporaryDirectory() as folder:
            folders = [Path(folder) / str(number) for number in range(len(now))]
            for out, (bits, name) in zip(folders, now):
                key = f"{bits} bits, {name}"
                print(key, flush=True)
                one = make(arguments, out, "spqr", str(bits), *options_of(name))
                made[key] = {
                    "bits": bits,
                    "options": options_of(name),
                    "stored_bits": round(one["quantize"]["packed"]["packed_bits"], 4),
                    "seconds": one["seconds"],
                    "phases": one["quantize"]["phases"],
                }
            scores = score(arguments, folders)
        for (key, row), scored in zip(made.items(), scores):
            rows[key] = row | {
                "perplexity": round(scored["perplexity"], 4),
                "excess_nats": round(scored["nll"] - scored["nll_base"], 4),
                "kl": round(scored["kl"], 4),
            }
        whole = found | {
            "model": Path(arguments.model).name,
            "text": [Path(arguments.data).name, Path(arguments.eval).name],
        }
        whole |= {"settings": settings, "machine": machine(), "rows": rows}
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
