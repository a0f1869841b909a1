"""The Triton kernels of packed products: are they right, and how near are they to the memory's speed?

On a machine with a GPU this one command measures everything and writes tests/bench/results/kernels-<gpu>.json:

    python tests/bench/products.py

Each case is first compared with its torch definition, and only then timed: the median of CUDA events around
one replayed CUDA graph, the L2 cache overwritten before each. Beside each time stand the bytes that had to be read, as
GB/s and as a share of what a large copy reached in the same run, and the ratio to `torch.matmul` with a dense weight in
the type of `x`, and to bitsandbytes NF4 where it is installed. Without a GPU there is the table of bytes and operations
alone. Needs torch, triton and this repository, nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import acc_module, copy_bandwidth, gpu_seconds, machine

SHAPES = ["4096x4096", "14336x4096", "4096x14336", "8192x28672", "576x576", "1536x576", "576x1536"]
FORMATS = ["spqr", "grouped"]
GROUP_SIZE = {"spqr": 16, "grouped": 128}
STATISTICS = {"scale_bits": 3, "zero_bits": 3, "stat_group_size": 16}
OUTLIERS = 0.01  # their share
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of a tile's rounding to that type
NO_GPU = "no GPU here: bytes and operations only; speeds need a GPU"


# Weights


def numbers(format_: str, bits: int) -> dict[str, int]:
    return {"bits": bits, "group_size": GROUP_SIZE[format_], **(STATISTICS if format_ == "spqr" else {})}


def layout(format_: str, bits: int, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """`{operand: (shape, type)}` of a weight `[O, I]`, as kernels/spqr.py and kernels/grouped.py describe them."""
    groups, octets = -(-columns // GROUP_SIZE[format_]), -(-rows // 8)
    codes = {"codes": ((-(-columns // 32), bits, rows), torch.int32)}
    if format_ == "grouped":
        return codes | {"scale": ((groups, rows), torch.float16), "zero": ((groups, octets * bits), torch.uint8)}
    outliers = round(OUTLIERS * rows * columns)
    return codes | {
        "scale": ((groups, octets * STATISTICS["scale_bits"]), torch.uint8),
        "zero": ((groups, octets * STATISTICS["zero_bits"]), torch.uint8),
        "stat": ((groups, -(-rows // STATISTICS["stat_group_size"]), 4), torch.float16),
        "perm": ((columns,), torch.uint16),
        "outlier_count": ((-(-columns // 256), rows), torch.uint8),
        "outlier_column": ((outliers,), torch.uint8),
        "outlier_value": ((outliers,), torch.float16),
    }


def random_weight(format_: str, bits: int, rows: int, columns: int, device: str) -> dict[str, torch.Tensor]:
    """Operands with random codes and about `OUTLIERS` of the weights corrected."""
    made = {}
    for name, (shape, dtype) in layout(format_, bits, rows, columns).items():
        if dtype.is_floating_point:
            made[name] = (torch.rand(shape, device=device) + 0.5).to(dtype) / 16
        elif dtype != torch.uint16:
            made[name] = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, device=device)
            made[name] = made[name].view(dtype).view(shape)  # an int32 for 4 random bytes
    if format_ == "spqr":
        made["stat"][..., 1::2] *= 32  # zeros of the statistics: among their codes
        made["perm"] = torch.randperm(columns, device=device).to(torch.uint16)
        masks = [
            torch.rand(rows, min(256, columns - first), device=device) < OUTLIERS for first in range(0, columns, 256)
        ]
        made["outlier_count"] = torch.stack([mask.sum(1) for mask in masks]).to(torch.uint8)
        made["outlier_column"] = torch.cat([mask.nonzero()[:, 1] for mask in masks]).to(torch.uint8)
        made["outlier_value"] = torch.randn(len(made["outlier_column"]), device=device).half()
    return made


def size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def counted(bytes_: int, rows: int, columns: int, tokens: int) -> dict[str, float]:
    """What a product of `x [T, I]` moves and computes, and how much faster than float16 its bytes allow it to be."""
    ends = 2 * tokens * (rows + columns)  # x read and y written, 2 bytes each
    return {
        "weight_bytes": bytes_,
        "bits_per_weight": round(8 * bytes_ / (rows * columns), 3),
        "bytes": bytes_ + ends,
        "operations": 2 * tokens * rows * columns,
        "ideal_ratio_to_fp16": round((2 * rows * columns + ends) / (bytes_ + ends), 2),
    }


# Times


def nf4_ms(x: torch.Tensor, dense: torch.Tensor) -> float | None:
    """The same product by bitsandbytes, in groups of 64; not as a graph. None where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    bitsandbytes = importlib.import_module("bitsandbytes")
    packed, state = bitsandbytes.functional.quantize_4bit(dense, quant_type="nf4")
    return 1e3 * gpu_seconds(lambda: bitsandbytes.matmul_4bit(x, packed.t(), state), graph=False)


def timed(case: dict, function: Callable, x: torch.Tensor, weight: dict, dense: torch.Tensor, copy: float) -> dict:
    """Adds the speeds to a case whose result is right."""
    ms, dense_ms = (1e3 * gpu_seconds(call) for call in (lambda: function(x, **weight), lambda: x @ dense.T))
    four_ms = nf4_ms(x, dense)
    speed = case["bytes"] / ms / 1e6
    case |= {"ms": round(ms, 5), "gb_per_s": round(speed, 1), "share_of_copy": round(speed / copy, 3)}
    case |= {"tflop_per_s": round(case["operations"] / ms / 1e9, 1), "dense_ms": round(dense_ms, 5)}
    case["ratio_to_dense"] = round(dense_ms / ms, 2)
    return case if four_ms is None else case | {"nf4_ms": round(four_ms, 5), "ratio_to_nf4": round(four_ms / ms, 2)}


# Cases


def on_gpu(format_: str, bits: int, shape: tuple[int, int], all_tokens: list[int], dtype: torch.dtype, copy: float):
    """Yields one case per number of rows of `x`."""
    rows, columns = shape
    weight = random_weight(format_, bits, rows, columns, "cuda")
    settings = numbers(format_, bits)
    reference = getattr(acc_module(format_), format_)
    kernel = getattr(acc_module(f"{format_}_triton"), format_)
    dense = torch.randn(rows, columns, dtype=dtype, device="cuda")
    for tokens in all_tokens:
        x = torch.randn(tokens, columns, dtype=dtype, device="cuda")
        expected, actual = reference(x, **weight, **settings).float(), kernel(x, **weight, **settings).float()
        error = ((actual - expected).norm() / expected.norm()).item()
        case = counted(size(weight), rows, columns, tokens)
        case |= {"rows_of_x": tokens, "error": error, "right": error < TOLERANCE[dtype]}
        yield timed(case, kernel, x, weight | settings, dense, copy) if case["right"] else case


def on_paper(format_: str, bits: int, shape: tuple[int, int], all_tokens: list[int]):
    weight = {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in layout(format_, bits, *shape).items()}
    for tokens in all_tokens:
        yield counted(size(weight), *shape, tokens) | {"rows_of_x": tokens}


def line(case: dict) -> str:
    text = f"{case['format']:8} {case['bits']} bits {case['shape']:>11} T={case['rows_of_x']:<4}"
    text += f"{case['bits_per_weight']:7.3f} bits/weight {case['bytes'] / 1e6:9.2f} MB"
    text += f" {case['operations'] / 1e9:9.2f} GFLOP  at best {case['ideal_ratio_to_fp16']:5.2f} x float16"
    if "ms" in case:
        text += f"  {case['ms'] * 1e3:8.1f} us {case['gb_per_s']:7.0f} GB/s ({case['share_of_copy']:.0%} of a copy)"
        text += f" {case['tflop_per_s']:6.1f} TFLOP/s  {case['ratio_to_dense']:.2f} x dense"
        text += f" {case['ratio_to_nf4']:.2f} x NF4" if "ratio_to_nf4" in case else ""
    elif "right" in case:
        text += f"  WRONG: error {case['error']:.1e}, not timed"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="OxI; the usual layers of small to large models")
    parser.add_argument("--bits", nargs="*", type=int, default=[2, 3, 4])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 16, 512], help="rows of x")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16", help="of x")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    results = Path(__file__).parent / "results"
    name = torch.cuda.get_device_name().replace(" ", "-").lower() if gpu else "bytes"
    out = arguments.out or results / f"kernels-{name}.json"
    whole: dict = {"machine": machine(), "dtype": arguments.dtype, "outliers": OUTLIERS, "cases": []}
    if gpu:
        whole["copy_gb_per_s"] = round(copy_bandwidth(gpu_seconds), 1)
        print(f"a copy of 1 GiB: {whole['copy_gb_per_s']} GB/s")
    else:
        whole["note"] = NO_GPU
        print(NO_GPU)
    for shape in arguments.shapes:
        sizes = tuple(int(side) for side in shape.split("x"))
        for format_ in FORMATS:
            for bits in arguments.bits:
                if gpu:
                    dtype = getattr(torch, arguments.dtype)
                    cases = on_gpu(format_, bits, sizes, arguments.rows, dtype, whole["copy_gb_per_s"])
                else:
                    cases = on_paper(format_, bits, sizes, arguments.rows)
                for case in cases:
                    whole["cases"].append({"format": format_, "bits": bits, "shape": shape, **case})
                    print(line(whole["cases"][-1]), flush=True)
                out.write_text(json.dumps(whole, indent=1) + "\n")
    if any(not case.get("right", True) for case in whole["cases"]):
        sys.exit("a kernel is wrong: see the lines above")


if __name__ == "__main__":
    main()
