"""Ways to multiply by bit planes on one CPU core: tables of 4 or 8 inputs, or weights decoded in registers.

    python tests/bench/lut_cpu.py --out tests/bench/results/lut-cpu.json

Times are of the processor, the least of many calls, so that other work on the machine counts little. No time is given
for a product that is not right.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch
from acc.formats.bcq import BcqWeight
from acc.kernels import bcq_compiled

SHAPES = [(576, 1536), (4096, 4096)]
WAYS = {"registers": 0, "tables of 4": 4, "tables of 8": 8}


def weight(rows: int, columns: int, bits: int) -> BcqWeight:
    draw = torch.Generator().manual_seed(bits)
    groups = -(-columns // 128)
    return BcqWeight.encode(
        torch.randint(0, 1 << bits, (rows, columns), generator=draw),
        torch.rand(groups, bits, rows, generator=draw).half(),
        torch.randn(groups, rows, generator=draw).half(),
        None,
        {"bits": bits, "group_size": 128, "scales": "free", "scale_dtype": "float16"},
    )


def least_ms(function, x: torch.Tensor, calls: int) -> float:
    best = float("inf")
    for _ in range(calls):
        started = time.thread_time()
        function(x)
        best = min(best, time.thread_time() - started)
    return 1000 * best


def measure(rows: int, columns: int, bits: int, tokens: int, calls: int) -> dict:
    packed = weight(rows, columns, bits)
    dense, x = packed.dequantize(), torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    row = {
        "shape": [rows, columns],
        "bits": bits,
        "tokens": tokens,
        "megabytes": packed.stored_bits * dense.numel() / 8e6,
    }
    expected = x @ dense.T
    row["dense ms"] = round(least_ms(lambda given: given @ dense.T, x, calls), 4)
    for way, lookup in WAYS.items():
        product = bcq_compiled.prepare(columns, lookup=lookup, **packed.operands(), **packed.numbers())
        right = float((product(x) - expected).norm() / expected.norm()) < 1e-5
        row[f"{way} ms"] = round(least_ms(product, x, calls), 4) if right else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--calls", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(bits, tokens) for bits in (2, 3, 4) for tokens in (1, 2, 4)]
    rows = [measure(*shape, *case, arguments.calls) for shape in SHAPES for case in cases]
    for row in rows:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    if arguments.out:
        machine = {
            "processor": platform.machine(),
            "lanes": 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8,
        }
        machine |= {"torch": torch.__version__, "date": str(datetime.date.today()), "threads": 1}
        arguments.out.write_text(json.dumps({"machine": machine, "group_size": 128, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
