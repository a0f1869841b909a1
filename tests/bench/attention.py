"""Sparse attention over a prompt: is it right, and what is it worth beside `scaled_dot_product_attention`?

    python tests/bench/attention.py --out FILE [--device cuda] [--lengths 8192 32768 131072]

Per length: dense causal attention, then heads with 128 sinks and a window of 1024, vertical-slash heads and block-
sparse heads at budgets that are fractions of the length. Each result is first compared, on three blocks of rows, with a
softmax over the keys that its index names; what is wrong is not timed. Beside the seconds, the median of the
repetitions, stand the counted operations (products with keys and values; masked pairs of a tile count), the bytes that
have to move at least once, the speed as a share of a large matrix product in the same run, and how much longer a case
takes than its share of the dense operations would (1 is proportional). `index_seconds` is the estimate from the last 64
rows, or from pooled blocks, and the index itself.

On a CPU the definitions run, in float32, and the seconds are the processor's for one thread, so that other work on
the machine does not count. On a GPU the Triton kernels run, in bfloat16, between CUDA events.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import acc_module, event_seconds, machine

SHAPES = {"cpu": (8, 2, 64, torch.float32), "cuda": (32, 8, 128, torch.bfloat16)}  # heads, key heads, head_dim, type
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SINK, RECENT = 128, 1024
# share of the length: columns, and distances, of which three quarters are the nearest and the rest lies in bands
VERTICAL_SLASH = [(1 / 64, 1 / 16), (1 / 32, 1 / 8)]
BLOCKS = [1 / 16, 1 / 8]  # share of the blocks of keys


# Times


def seconds(function: Callable[[], object], device: str, repetitions: int) -> float:
    """The median of one call's time, after one that warms up."""
    function()
    times = []
    for _ in range(repetitions):
        if device == "cpu":
            begin = time.process_time()
            function()
            times.append(time.process_time() - begin)
        else:
            times.append(event_seconds(function))
    return statistics.median(times)


def matrix_product(device: str, dtype: torch.dtype, repetitions: int) -> float:
    """Operations per second of a large matrix product."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds(lambda: a @ a, device, max(repetitions, 3))


# Parity


def error(out: torch.Tensor, tensors: list[torch.Tensor], scaling: float, seen: Callable) -> float:
    """The greatest relative error over three blocks of rows of the first and the last head.

    `seen(h, r)` is bool, `[t, S]` or one row for all `t` of the block: the keys it names, those after a row included.
    """
    query, key, value = tensors
    heads, length, worst = query.shape[1], query.shape[2], 0.0
    for h in (0, heads - 1):
        mine = h * key.shape[1] // heads
        k, v = key[0, mine].float(), value[0, mine].float()
        for r in (0, -(-length // 64) // 2, -(-length // 64) - 1):
            part = slice(64 * r, min(64 * r + 64, length))
            row = torch.arange(part.start, part.stop, device=query.device)[:, None]
            visible = seen(h, r) & (torch.arange(length, device=query.device) <= row)
            logits = (scaling * query[0, h, part].float() @ k.T).masked_fill(~visible, -torch.inf)
            expected = torch.softmax(logits, -1) @ v
            worst = max(worst, ((out[0, h, part].float() - expected).norm() / expected.norm()).item())
    return worst


def named(index: Any, length: int, h: int, r: int) -> torch.Tensor:
    """The keys that an index names for a block of rows."""
    offsets = index.block_offset[0, h, r, : index.block_count[0, h, r]]
    ranges = (offsets[:, None] + torch.arange(64, device=offsets.device)).flatten()
    keys = torch.cat([ranges, index.column_index[0, h, r, : index.column_count[0, h, r]]]).long()
    seen = torch.zeros(length, dtype=torch.bool, device=keys.device)
    seen[keys[(keys >= 0) & (keys < length)]] = True
    return seen[None]


def in_window(length: int, device: str, h: int, r: int) -> torch.Tensor:
    """The sinks and the window of each row of a block, of any head."""
    row = torch.arange(64 * r, min(64 * r + 64, length), device=device)[:, None]
    key = torch.arange(length, device=device)
    return (key < SINK) | (row - key < RECENT)


# Prefill


def planted_sums(heads: int, length: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of columns and of diagonals as heads have them: a few columns; a window, and bands of 64 far from it."""
    generator = torch.Generator().manual_seed(0)
    vertical = torch.rand(1, heads, length, generator=generator)
    slash = 1 / (1 + torch.arange(length)).repeat(1, heads, 1).float()
    for h in range(heads):
        for begin in torch.randint(0, length - 64, (max(length // 256, 1),), generator=generator).tolist():
            slash[0, h, begin : begin + 64] += 4 / length  # above what the window has from a quarter of the length on
    return vertical.to(device), slash.to(device)


def sparse_cases(tensors: list[torch.Tensor], scaling: float, device: str):
    """Yields the name, the index, and a function that makes an index of this kind from the tensors alone."""
    index = acc_module("attention_index")
    query, key, _ = tensors
    heads, length = query.shape[1:3]
    sums = planted_sums(heads, length, device)

    def every(number: float) -> torch.Tensor:
        return torch.full((heads,), max(round(number), 1), device=device)

    for columns, distances in VERTICAL_SLASH:
        budgets = every(columns * length), every(distances * length)

        def vertical_slash(budgets=budgets):
            estimate = index.estimate_vertical_slash(query, key, scaling=scaling)
            return index.vertical_slash_index(*estimate, *budgets, length)

        name = f"vertical-slash {columns:.3f} + {distances:.3f}"
        yield name, index.vertical_slash_index(*sums, *budgets, length), vertical_slash
    for share in BLOCKS:

        def blocks(budget=every(share * length / 64)):  # noqa: B008 - this share's
            return index.block_index(index.estimate_blocks(query, key, scaling=scaling), budget, length, length)

        yield f"blocks {share:.3f}", blocks(), blocks


def prefill(length: int, device: str, repetitions: int, limit: float):
    """Yields one case per kind of attention over a prompt."""
    heads, key_heads, width, dtype = SHAPES[device]
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, count, length, width) for count in (heads, key_heads, key_heads)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    pick, scaling = acc_module("base").pick, width**-0.5
    moved = dtype.itemsize * width * length * 2 * (heads + key_heads)
    dense = partial(F.scaled_dot_product_attention, *tensors, is_causal=True, scale=scaling, enable_gqa=True)
    case = {"kind": "dense", "length": length, "operations": 2 * width * heads * length * (length + 1), "bytes": moved}
    case["error"] = error(
        dense(), tensors, scaling, lambda h, r: torch.ones(1, length, dtype=torch.bool, device=device)
    )
    whole = timed(case, dense, dtype, device, repetitions, limit, None)
    yield whole

    settings = [torch.full((key_heads,), size, dtype=torch.int32, device=device) for size in (SINK, RECENT)]
    run = partial(pick("attention_streaming", device, head_dim=width), *tensors, *settings, scaling=scaling)
    pairs = sum(min(row + 1, SINK + RECENT) for row in range(length))
    case = {"kind": f"streaming {SINK} + {RECENT}", "length": length, "operations": 4 * width * heads * pairs}
    case |= {"bytes": moved, "error": error(run(), tensors, scaling, partial(in_window, length, device))}
    yield timed(case, run, dtype, device, repetitions, limit, whole)

    for name, index, make in sparse_cases(tensors, scaling, device):
        run = partial(pick("attention_sparse", device, head_dim=width), *tensors, *index, scaling=scaling)
        operations = 4 * width * int(acc_module("attention_index").cost(index, length).sum())
        index_bytes = sum(field.numel() * field.element_size() for field in index)
        case = {"kind": name, "length": length, "operations": operations, "bytes": moved + index_bytes}
        case["error"] = error(run(), tensors, scaling, partial(named, index, length))
        case["index_seconds"] = round(seconds(make, device, repetitions), 5)
        yield timed(case, run, dtype, device, repetitions, limit, whole)


def timed(
    case: dict, run: Callable, dtype: torch.dtype, device: str, repetitions: int, limit: float, dense: dict | None
) -> dict:
    """Adds the speeds to a case whose result is right; `dense` is the same length's dense case."""
    case |= {"right": case["error"] < TOLERANCE[dtype]}
    if not case["right"]:
        return case
    took = seconds(run, device, repetitions)
    speed = case["operations"] / took
    case |= {
        "seconds": round(took, 5),
        "gflop_per_s": round(speed / 1e9, 1),
        "share_of_product": round(speed / limit, 3),
    }
    if dense is not None and dense["right"]:
        case["share_of_operations"] = round(case["operations"] / dense["operations"], 4)
        case["times_faster"] = round(dense["seconds"] / took, 2)
        case["to_proportional"] = round(took / dense["seconds"] / case["share_of_operations"], 2)
    return case


# All


def line(case: dict) -> str:
    text = f"{case['length']:7} {case['kind']:28} {case['operations'] / 1e9:9.1f} GFLOP {case['bytes'] / 1e6:8.1f} MB"
    if not case["right"]:
        return f"{text}  WRONG: error {case['error']:.1e}, not timed"
    text += (
        f" {case['seconds']:9.4f} s {case['gflop_per_s']:9.1f} GFLOP/s ({case['share_of_product']:.0%} of a product)"
    )
    if "times_faster" in case:
        text += f"  {case['share_of_operations']:.1%} of dense, {case['times_faster']:.2f} times faster"
    return text + (f", index {case['index_seconds']:.4f} s" if "index_seconds" in case else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--lengths", nargs="*", type=int, help="tokens of the prompts")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu times the definitions")
    torch.set_num_threads(1)  # of which the processor's seconds are counted
    heads, key_heads, width, dtype = SHAPES[device]
    limit = matrix_product(device, dtype, arguments.repetitions)
    whole: dict = {"machine": machine(), "product_gflop_per_s": round(limit / 1e9, 1), "dtype": str(dtype)}
    whole |= {"heads": heads, "key_heads": key_heads, "head_dim": width, "repetitions": arguments.repetitions}
    whole["prefill"] = []
    print(f"a large matrix product: {whole['product_gflop_per_s']} GFLOP/s")
    for length in arguments.lengths or ([4096, 8192] if device == "cpu" else [8192, 32768, 131072]):
        for case in prefill(length, device, arguments.repetitions, limit):
            whole["prefill"].append(case)
            print(line(case), flush=True)
            arguments.out.write_text(json.dumps(whole, indent=1) + "\n")
    if not all(case["right"] for case in whole["prefill"]):
        sys.exit("a result is wrong: see the lines above")


if __name__ == "__main__":
    main()
