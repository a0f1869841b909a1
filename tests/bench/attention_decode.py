"""One decoding step of attention: dense, or over the tokens that labels select. How fast, and where the time goes?

    python tests/bench/attention_decode.py --out tests/bench/results/attention-decode-cpu.json
    python tests/bench/attention_decode.py --device cuda --out tests/bench/results/attention-decode-<gpu>.json

For each length and kind of label: the attention over 1/16 of the tokens is first compared with masked attention in
float64, the scores with a softmax in float64, and only what is right is timed. Dense is the faster of two ways to
call `scaled_dot_product_attention`: with its own grouping of heads, and with a group's heads as the queries of one
head. Times on a GPU are those of one replayed CUDA graph with a cold L2 cache, on a CPU the least processor time of
one thread; a part that is timed alone may find in the cache what in a whole step it has to fetch. Bytes are those
that have to move: keys and values, or labels once, scores once and the chosen keys and values; beside them GB/s, and
what a large copy reached in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from acc.kernels.attention_label import attention_label
from acc.kernels.base import pick
from measure import copy_bandwidth, gpu_seconds, machine

# channels as a share of the head, bits: at 16 bits of a key the first two take 1/16 of its bytes
LABELS = [(1 / 16, 16), (1 / 4, 4), (1 / 8, 8), (1 / 4, 8), (1 / 2, 4), (1 / 4, 16)]
SHARE = 16  # of the tokens one in 16 is attended to
SINK, RECENT = 4, 32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def cpu_seconds(function: Callable[[], object], calls: int, graph: bool = True) -> float:
    """Least processor time; `graph` says nothing here."""
    function()
    times = []
    for _ in range(calls):
        started = time.thread_time()
        function()
        times.append(time.thread_time() - started)
    return min(times)


def dense_grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One query per head: the heads of a group as queries of their KV head."""
    grouped = query.view(*key.shape[:2], -1, query.shape[-1])
    return F.scaled_dot_product_attention(grouped, key, value).reshape(query.shape)


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Attention of one query per head over the tokens of `index` in float64, all others masked; a KV head at a time."""
    out = []
    for q, k, v, kept in zip(
        query.view(*key.shape[:2], -1, key.shape[-1]).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1),
        index.flatten(0, 1), strict=True,
    ):  # fmt: skip
        hidden = torch.ones(len(k), dtype=torch.bool, device=k.device)
        hidden[kept.long()] = False
        score = (q.double() @ k.double().T * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        out.append(score.softmax(-1) @ v.double())
    return torch.stack(out).view(query.shape)


def exact_score(query: torch.Tensor, label: torch.Tensor, channels: torch.Tensor, scale: torch.Tensor, bits: int):
    """The scores in float64, one query per head."""
    if bits == 4:
        label = torch.cat([label % 16, label // 16], dim=-1)
    numbers = label.double() if bits == 16 else (label.double() - 2 ** (bits - 1)) * scale.double()[:, None]
    grouped = query.view(*label.shape[:2], -1, query.shape[-1]).double()
    picked = grouped.gather(3, channels[None, :, None].expand(*grouped.shape[:3], -1))
    return (picked @ numbers.mT * query.shape[-1] ** -0.5).softmax(-1).sum(2)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def dense_case(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seconds: Callable, calls: int) -> dict:
    own = seconds(lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True), calls)
    grouped = seconds(lambda: dense_grouped(query, key, value), calls)
    bytes_ = key.nbytes + value.nbytes
    return {"seconds_own": own, "seconds_grouped": grouped, "seconds": min(own, grouped), "bytes": bytes_}


def sparse_case(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, share: float, bits: int, seconds: Callable, calls: int
) -> dict:
    """The parts of a step and the whole, where both kernels are right."""
    (kv_heads, length, dim), device = key.shape[1:], key.device
    channels = torch.stack([torch.randperm(dim, device=device)[: int(dim * share)] for _ in range(kv_heads)])
    scale = torch.full(channels.shape, 3.5 / (2 ** (min(bits, 8) - 1) - 1), device=device)
    label = attention_label(key, channels, scale, bits=bits)
    scaling, newest = dim**-0.5, query[:, :, 0]
    select = partial(pick("attention_select", device.type, bits=bits), bits=bits, scaling=scaling)
    gather = partial(pick("attention_gather", device.type, head_dim=dim, value_dim=dim), scaling=scaling)
    choose = partial(pick("chosen", device.type), tokens=length // SHARE, sink=SINK, recent=RECENT)
    score = select(newest, label, channels, scale)
    index = choose(score)
    errors = {
        "score": relative(score, exact_score(newest, label, channels, scale, bits)),
        "output": relative(gather(query, key, value, index), exact(query, key, value, index)),
    }
    case: dict = {"channels": channels.shape[1], "bits": bits, "tokens": index.shape[-1], "errors": errors}
    case["right"] = errors["score"] < 5e-3 and errors["output"] < TOLERANCE[query.dtype]
    rows = index.numel() * 2 * dim * key.element_size()
    case["bytes"] = label.nbytes + rows + score.nbytes
    if not case["right"]:
        return case

    def step():
        return gather(query, key, value, choose(select(newest, label, channels, scale)))

    case["seconds"] = seconds(step, calls)
    case["parts"] = {
        "select": seconds(lambda: select(newest, label, channels, scale), calls),
        "choose": seconds(lambda: choose(score), calls),
        "gather": seconds(lambda: gather(query, key, value, index), calls),
    }
    return case


def speeds(case: dict, copy: float) -> dict:
    """Adds GB/s and its share of a copy's."""
    if "seconds" in case:
        case["gb_per_s"] = round(case["bytes"] / case["seconds"] / 1e9, 2)
        case["share_of_copy"] = round(case["gb_per_s"] / copy, 3)
    return case


def line(case: dict, dense: dict) -> str:
    text = f"  {case['channels']:3} channels at {case['bits']:2} bits {case['bytes'] / 1e6:8.1f} MB"
    text += f" ({dense['bytes'] / case['bytes']:4.1f} x fewer)"
    if not case["right"]:
        return text + f"  WRONG, not timed: {case['errors']}"
    parts = ", ".join(f"{name} {1e3 * value:.3f}" for name, value in case["parts"].items())
    text += f" {1e3 * case['seconds']:8.3f} ms ({parts})  {case['ratio']:5.2f} x dense  {case['gb_per_s']} GB/s"
    return text + f" ({case['share_of_copy']:.0%} of a copy)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", nargs="*", type=int, default=[8192, 32768, 131072], help="cached tokens")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="float32 on a CPU, else bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", nargs=2, type=int, default=[32, 8], help="query heads, KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--calls", type=int, default=20, help="of which the median, or the least, counts")
    arguments = parser.parse_args()
    device, dim, (heads, kv_heads) = arguments.device, arguments.head_dim, arguments.heads
    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    seconds = gpu_seconds if device == "cuda" else cpu_seconds
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    copy = copy_bandwidth(partial(seconds, calls=arguments.calls), device, 512)
    print(f"a copy of 512 MiB: {copy:.1f} GB/s")
    whole: dict = {
        "machine": machine(), "dtype": str(dtype).removeprefix("torch."), "batch": arguments.batch,
        "heads": heads, "kv_heads": kv_heads, "head_dim": dim, "copy_gb_per_s": round(copy, 2), "lengths": [],
    }  # fmt: skip
    for length in arguments.lengths:
        query = torch.randn(arguments.batch, heads, 1, dim, device=device).to(dtype)
        key, value = (torch.randn(arguments.batch, kv_heads, length, dim, device=device).to(dtype) for _ in range(2))
        dense = speeds(dense_case(query, key, value, seconds, arguments.calls), copy)
        ways = f"own grouping {1e3 * dense['seconds_own']:.3f} ms, as queries {1e3 * dense['seconds_grouped']:.3f} ms"
        print(f"{length} tokens, dense {dense['bytes'] / 1e6:.1f} MB: {ways}", flush=True)
        entry = {"length": length, "dense": dense, "sparse": []}
        whole["lengths"].append(entry)
        for share, bits in LABELS:
            case = speeds(sparse_case(query, key, value, share, bits, seconds, arguments.calls), copy)
            if case["right"]:
                case["ratio"] = round(dense["seconds"] / case["seconds"], 2)
            entry["sparse"].append(case)
            print(line(case, dense), flush=True)
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n")
    if any(not case["right"] for entry in whole["lengths"] for case in entry["sparse"]):
        sys.exit("a kernel is wrong: see the lines above")


if __name__ == "__main__":
    main()
