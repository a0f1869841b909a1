"""Peak memory and time of `acc quantize` on checkpoints of 7B parameters, of which a few blocks are enough.

    python tests/bench/memory.py --data CALIBRATION.txt --out tests/bench/results/memory.json

Writes each checkpoint (tests/tools/make_checkpoint.py) to a temporary folder, quantises it in a process of its own, and
watches that process. What does not depend on the number of blocks is measured by two runs of different length. Rows
that are in the output file with the same settings are not made again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measure import machine

ACC = Path(sys.executable).with_name("acc")
METHODS = {
    "spqr 3": ["--method", "spqr", "--bits", "3", "--refine", "0"],
    "spqr 3 refined": ["--method", "spqr", "--bits", "3"],
    "rtn 4": ["--method", "rtn", "--bits", "4"],
}
ANONYMOUS, MAPPED = "RssAnon", "RssFile"  # what a process has allocated; what it has mapped: libraries and files
PERIOD = 0.01  # seconds between two looks at a process
LIMIT = 4  # GiB
EXTRAPOLATION = (
    "Memory: what a run keeps from one block to the next are the hidden states (2 x 128 tokens: {hidden} MiB) and a few"
    " lines of report, so the peak of a run over all blocks is that of a run over a few; `growth_gib` is the"
    " difference between the longest and the shortest run. Equal runs differ by up to 0.46 GiB, by what the C library's"
    " heap keeps. Time: what the longest run took, and for each further block as much as for one of those by which the"
    " runs differ."
)


def tool() -> Any:
    """tests/tools/make_checkpoint.py, which is no package."""
    path = Path(__file__).parents[1] / "tools" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watch(threading.Thread):
    """Samples the resident memory of a process, by kind, until it ends."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.peak = {ANONYMOUS: 0, MAPPED: 0}  # bytes

    def run(self) -> None:
        while True:
            try:
                lines = self.status.read_text().splitlines()
            except OSError:
                return
            now = {key: int(value.split()[0]) << 10 for key, _, value in (line.partition(":") for line in lines)
                   if key in self.peak}  # fmt: skip
            if not now:  # a process that has ended and was not waited for
                return
            self.peak = {key: max(self.peak[key], now[key]) for key in now}
            time.sleep(PERIOD)


def watched(command: list[str]) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """The JSON that a command prints, its seconds, and its peaks in GiB.

    Seconds by the clock mean little on a machine that has other things to do; those of the processor do.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = Watch(process.pid)
    watch.start()
    assert process.stdout is not None
    text = process.stdout.read()
    watch.join()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    peaks = {"resident": usage.ru_maxrss << 10, "anonymous": watch.peak[ANONYMOUS], "mapped": watch.peak[MAPPED]}
    seconds = {"clock": time.monotonic() - started, "processor": usage.ru_utime + usage.ru_stime}
    gib = {key: round(n / 2**30, 2) for key, n in peaks.items()}
    return json.loads(text), {key: round(value, 1) for key, value in seconds.items()}, gib


def row(arguments: argparse.Namespace, folder: Path, shape: str, options: list[str]) -> dict[str, Any]:
    """Quantises the checkpoint in `folder` and returns the figures."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as place:
        out = Path(place) / "out"
        text = ["--data", arguments.data, "--nsamples", "2", "--seqlen", "128"]
        command = [str(ACC), "quantize", str(folder), str(out), *options, *text, "--json"]
        made, seconds, peaks = watched(command)
        written = sum(path.stat().st_size for path in out.iterdir())
    words = {str(folder): shape, str(out): "OUT", arguments.data: Path(arguments.data).name, str(ACC): "acc"}
    return {
        "peak_gib": peaks,
        "under_limit": peaks["resident"] < LIMIT,
        "seconds": seconds,
        "solving": round(made["phases"]["solve"] / made["seconds"], 3),  # share of the time
        "bytes_written": written,
        "packed_bits": round(made["packed"]["packed_bits"], 4),
        "command": " ".join(words.get(word, word) for word in command),
    }


def measure(arguments: argparse.Namespace, shape: str, method: str, blocks: int) -> dict[str, Any]:
    make = tool()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as place:
        folder = Path(place) / shape
        count = make.make(folder, make.SHAPES[shape] | {"num_hidden_layers": blocks})
        return {"blocks": blocks, "parameters": count, **row(arguments, folder, shape, METHODS[method])}


def extrapolated(rows: list[dict[str, Any]], whole: int) -> dict[str, Any]:
    """What the shortest and the longest run say of one over `whole` blocks; of a single run, nothing but its peak."""
    short, long = min(rows, key=lambda r: r["blocks"]), max(rows, key=lambda r: r["blocks"])
    found = {"blocks": whole, "peak_gib": max(r["peak_gib"]["resident"] for r in rows)}
    if short is long:
        return found
    each = (long["seconds"]["processor"] - short["seconds"]["processor"]) / (long["blocks"] - short["blocks"])
    return found | {
        "growth_gib": round(long["peak_gib"]["resident"] - short["peak_gib"]["resident"], 2),
        "processor_seconds_per_block": round(each, 1),
        "processor_hours": round((long["seconds"]["processor"] + each * (whole - long["blocks"])) / 3600, 2),
    }


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The runs by shape and method, each with what it says of the whole model."""
    shapes = tool().SHAPES
    found: dict[str, Any] = {}
    for shape, config in shapes.items():
        for method in METHODS:
            rows = [run for key, run in runs.items() if key.startswith(f"{shape}, {method}, ")]
            if rows:
                hidden = 2 * 128 * config["hidden_size"] * 2 / 2**20
                found[f"{shape}, {method}"] = extrapolated(rows, config["num_hidden_layers"]) | {
                    "how": EXTRAPOLATION.format(hidden=hidden)
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 3], help="lengths of the runs")
    parser.add_argument("--shapes", nargs="*", default=list(tool().SHAPES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints and output: 10 GB")
    arguments = parser.parse_args()
    for shape in arguments.shapes:
        for method in arguments.methods:
            for blocks in arguments.blocks:
                runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else {}
                key = f"{shape}, {method}, {blocks} blocks"
                if key not in runs:
                    print(key, flush=True)
                    runs[key] = measure(arguments, shape, method, blocks) | {"machine": machine()}
                whole = {"limit_gib": LIMIT, "whole_model": summary(runs), "runs": dict(sorted(runs.items()))}
                arguments.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
