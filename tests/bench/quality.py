"""Bits against quality: every method at several bit widths on one model, in one run on one machine.

    python tests/bench/quality.py MODEL --data CALIBRATION.txt --eval TEXT.txt --out tests/bench/results/NAME.json

Each row is made by `acc quantize` in a process of its own (so that time and peak memory are its own); several are then
scored together, as `acc eval --base` does it one by one, so that the dense model runs once for all of them. Only the
decoder's linear layers are quantised. Rows that are in the output file are not made again.

`--rows "gptq 3, groups of 64"` may name any method of FAMILY at any bits and groups, followed by ", refine 12" for any
number of refinement steps or ", rotate heads" for a rotation, and any row of ROWS.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from acc.calibrate.evaluate import evaluate_all, windows
from acc.calibrate.stream import Stream
from acc.calibrate.text import load_tokens
from acc.cli.base import tokenizer_of
from acc.formats.source import open_source
from measure import machine

ACC = Path(sys.executable).with_name("acc")
# The settings of the SpQR authors' run: groups of 16, 3-bit statistics shared by 16 rows, threshold 0.2, damping 1,
# activation order, one pass over the columns.
AUTHORS = ["--group-size", "16", "--stat-group-size", "16", "--outlier-threshold", "0.2", "--damp-percent", "1.0"]
AUTHORS += ["--sweeps", "0", "--refine", "0"]
ROWS = {
    "spqr 3": ["spqr", "3", *AUTHORS],
    "rtn 3": ["rtn", "3", "--group-size", "16"],
    "spqr 3, more outliers": ["spqr", "3", "--stat-group-size", "16", "--outlier-threshold", "0.2"],
    "spqr 3, as it comes": ["spqr", "3"],
    "spqr 3, groups of 32": ["spqr", "3", "--group-size", "32", "--outlier-threshold", "1.0"],
    "spqr 4, groups of 32": ["spqr", "4", "--group-size", "32", "--outlier-threshold", "1.0"],
    "spqr 2, as it comes": ["spqr", "2"],
    "spqr 2": ["spqr", "2", *AUTHORS],
    "spqr 2 threshold 1": ["spqr", "2", *AUTHORS, "--outlier-threshold", "1.0"],
    "gptq 4, symmetric, groups of 128": ["gptq", "4", "--group-size", "128", "--grid", "symmetric"],
    "gptq 2.5, mixed": ["gptq", "2.5"],
    "gptq 3, mixed": ["gptq", "2.9999"],
    "gptq 3.16, mixed": ["gptq", "3.1608"],  # as many as groups of 128 take
    "gptq 3.297, mixed": ["gptq", "3.296875"],  # as many as groups of 64 take
    "gptq 3.5, mixed": ["gptq", "3.5"],
    "spqr 2.9, mixed": ["spqr", "2.9"],
    "lut-gemm 3": ["lut-gemm", "3"],
    "nf4": ["nf4", "4", "--double-quant", "true", "--activation-aware", "true"],
    "int8": ["int8", "8"],
    "rtn 2": ["rtn", "2", "--group-size", "16"],
    "spqr 4": ["spqr", "4", *AUTHORS],
    "rtn 4": ["rtn", "4", "--group-size", "16"],
}
FAMILY = {
    "rtn": ["rtn"],
    "gptq": ["gptq"],
    "gptq unrefined": ["gptq", "--refine", "0"],
    "lut-gemm": ["lut-gemm"],
    "lut-gemm unrefined": ["lut-gemm", "--refine", "0"],
    "lut-gemm plain": ["lut-gemm", "--activation-aware", "false"],
    "spqr": ["spqr", "--outlier-threshold", "1.0"],
}
TOGETHER = 4  # rows that are scored at once


def run(command: list[str]) -> tuple[dict, float, float]:
    """The JSON that a command prints, its seconds, and its peak memory in GiB."""
    started = time.monotonic()
    # the dense weights in memory: windows of 2048 tokens are what packed products are slowest at
    environment = os.environ | {"ACC_KERNELS": "cache"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return json.loads(text), time.monotonic() - started, usage.ru_maxrss / 2**20


def options_of(name: str) -> list[str]:
    """The options of `acc quantize` that a row is made with: its method, its bits, then others."""
    if name in ROWS:
        return ROWS[name]
    found = re.fullmatch(r"(.+) (\d), groups of (\d+)((?:, (?:refine|rotate) \w+)*)", name)
    if found is None or found[1] not in FAMILY:
        sys.exit(f"there is no row {name!r}")
    method, *others = FAMILY[found[1]]
    more = [f"--{word}" if word in ("refine", "rotate") else word for word in re.findall(r"\w+", found[4])]
    return [method, found[2], "--group-size", found[3], *others, *more]


def make(arguments: argparse.Namespace, out: Path, method: str, bits: str, *options: str) -> dict:
    """Quantises; the figures of that."""
    quantize = [str(ACC), "quantize", arguments.model, str(out), "--method", method, "--bits", bits, *options, "--json"]
    if method != "rtn":
        quantize += ["--data", arguments.data, "--nsamples", str(arguments.nsamples)]
        quantize += ["--seqlen", str(arguments.seqlen)]
    made, seconds, peak = run(quantize)
    return {
        "quantize": made,
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak, 2),
        "command": [part if Path(part).name == part else Path(part).name for part in quantize[1:]],
    }


def score(arguments: argparse.Namespace, folders: list[Path]) -> list[dict]:
    """What `acc eval --base` says of each folder."""
    base = open_source(arguments.model)
    ids = load_tokens(arguments.eval, tokenizer_of(base), chat_template="auto").ids
    streams = [Stream(open_source(folder)) for folder in folders]
    return evaluate_all(streams, Stream(base), windows(ids, arguments.window, arguments.windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="which rows; all by default")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    rows = found.get("rows", {})
    settings = {k: v for k, v in vars(arguments).items() if k in ("nsamples", "seqlen", "window", "windows")}
    missing = [name for name in arguments.rows if name not in rows]
    while missing:
        names, missing = missing[:TOGETHER], missing[TOGETHER:]
        with tempfile.TemporaryDirectory() as folder:
            made = {}
            for number, name in enumerate(names):
                print(name, flush=True)
                made[name] = make(arguments, Path(folder) / str(number), *options_of(name))
            scores = score(arguments, [Path(folder) / str(number) for number in range(len(names))])
        rows |= {name: made[name] | {"eval": scored} for name, scored in zip(names, scores)}
        whole = {"model": Path(arguments.model).name, "settings": settings, "machine": machine(), "rows": rows}
        text = json.dumps(whole, indent=1)
        arguments.out.write_text(re.sub(r'"(/[\w.-]+)+/([\w.-]+)"', r'"\2"', text) + "\n")  # names, not places


if __name__ == "__main__":
    main()
