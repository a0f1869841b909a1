"""What the Triton kernels of attention share: one step of the online softmax, sizes of tiles, and what they refuse.

Milakov & Gimelshein, Online normalizer calculation for softmax, algorithm 3; Dao, FlashAttention-2, algorithm 1. Powers
of 2 in place of e, the sums in fp32.
"""

# Triton's own types know nothing of constexpr arguments, launches and tuples:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .launch_triton import DTYPES
from .launch_triton import refuses as _refuses

LOG2_E = 1.4426950408889634
MAX_WIDTH = 256  # of a head
LEAST_SHARED_MEMORY = 99 << 10  # bytes a program can have on the smallest GPUs that the kernels run on


@triton.jit
def load_rows(p_rows, m_rows, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, MASKED: tl.constexpr):
    """Rows of `WIDTH` numbers from the pointers `[N, 1]`, filled up with zeros: `[N, BW]`."""
    o_w = tl.arange(0, BLOCK_W)[None, :]
    if MASKED:
        rows = tl.load(p_rows + o_w, mask=m_rows[:, None] & (o_w < WIDTH), other=0.0)
    elif WIDTH < BLOCK_W:
        rows = tl.load(p_rows + o_w, mask=o_w < WIDTH, other=0.0)
    else:
        rows = tl.load(p_rows + o_w)
    return rows


@triton.jit
def begin(
    q, k, v, T, S, first_row, stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_vb, stride_vh,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """`BLOCK_M` rows of this program's head and sequence: their positions `[BM]`, their queries, where the keys and
    values of their head begin, and a running softmax that has seen nothing."""
    i_head, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_key_head = i_head // GROUP
    o_row = first_row + tl.arange(0, BLOCK_M)
    o_position = tl.minimum(S - T + o_row, S - 1)  # rows past the last see what it sees
    p_q = q + i_batch * stride_qb + i_head * stride_qh + o_row.to(tl.int64)[:, None] * stride_q
    b_q = load_rows(p_q, o_row < T, D, BLOCK_D, True).to(DTYPE)
    p_k = k + i_batch * stride_kb + i_key_head * stride_kh
    p_v = v + i_batch * stride_vb + i_key_head * stride_vh
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    return o_position, b_q, p_k, p_v, b_max, b_sum, b_acc


@triton.jit
def finish(
    out, b_sum, b_acc, T, first_row, DV: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Stores the rows that `begin` took."""
    i_head, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_row = first_row + tl.arange(0, BLOCK_M)
    o_v = tl.arange(0, BLOCK_V)[None, :]
    p_out = out + ((i_batch * tl.num_programs(1) + i_head) * T + o_row.to(tl.int64))[:, None] * DV + o_v
    m_out = (o_row < T)[:, None] & (o_v < DV)
    tl.store(p_out, (b_acc / b_sum[:, None]).to(out.dtype.element_ty), mask=m_out)


@triton.jit
def attend(
    b_q, b_max, b_sum, b_acc, p_k, p_v, m_key, m_pair, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes one tile of keys into the running softmax of `BM` rows.

    Pointers `[BN, 1]` to keys and values; `m_key [BN]` which of them there are, `m_pair [BM, BN]` which a row sees,
    neither read unless `MASKED`. `scale` is that of the logits in base 2.
    """
    b_k = load_rows(p_k, m_key, D, BLOCK_D, MASKED).to(DTYPE)  # [BN, BD]
    b_logit = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [BM, BN]
    if MASKED:
        b_logit = tl.where(m_pair, b_logit, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_logit, axis=1))
    b_base = b_new
    if MASKED:
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # a row that has seen nothing yet
    b_p = tl.exp2(b_logit - b_base[:, None])
    b_shrink = tl.exp2(b_max - b_base)
    b_v = load_rows(p_v, m_key, DV, BLOCK_V, MASKED).to(DTYPE)  # [BN, BV]
    b_acc = tl.dot(b_p.to(DTYPE), b_v, b_acc * b_shrink[:, None], input_precision=PRECISION)
    return b_new, b_sum * b_shrink + tl.sum(b_p, axis=1), b_acc


def strided(query: Tensor, key: Tensor, value: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors `[B, ., ., D]`, the last dimension contiguous, and their other strides, as the kernels name them."""
    tensors, steps = {}, {}
    for name, x in (("q", query), ("k", key), ("v", value)):
        x = x if x.stride(-1) == 1 else x.contiguous()
        tensors[name] = x
        steps |= {f"stride_{name}b": x.stride(0), f"stride_{name}h": x.stride(1), f"stride_{name}": x.stride(2)}
    return tensors, steps


def sizes(query: Tensor, value: Tensor, most_rows: int) -> dict[str, Any]:
    """How much of the problem a program takes, at most `most_rows` rows, and how it is compiled.

    Keys and values of as many tiles as are loaded ahead have to fit in shared memory beside the queries.
    """
    rows, width, value_width = query.shape[2], query.shape[3], value.shape[3]
    block_d, block_v = (max(triton.next_power_of_2(w), 16) for w in (width, value_width))
    widest = max(block_d, block_v)
    tiles = [(64, 3), (64, 2), (32, 2), (32, 1), (16, 1)]  # of keys, and how many are loaded ahead
    if query.dtype == torch.float32:  # no tensor cores: the operands of a dot product lie in registers
        most_rows = 32 if widest <= 64 else 16
        tiles = [(most_rows, 2), (16, 1)]
    elif widest > 128:
        most_rows = 64
    block_m = min(most_rows, max(triton.next_power_of_2(rows), 16))
    for block_n, stages in tiles:
        shared = query.element_size() * (block_m * block_d + stages * block_n * (block_d + block_v))
        if shared <= _shared_memory(query.device):
            break
    return {
        "D": width, "DV": value_width, "BLOCK_D": block_d, "BLOCK_V": block_v, "BLOCK_M": block_m, "BLOCK_N": block_n,
        # the interpreter takes the bits of bfloat16 for integers in a dot product
        "DTYPE": tl.float32 if knobs.runtime.interpret else DTYPES[query.dtype], "PRECISION": "ieee",
        "num_stages": stages, "num_warps": 8 if block_m > 64 or (block_m == 64 and widest > 128) else 4,
    }  # fmt: skip


@cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return LEAST_SHARED_MEMORY
    utilities: Any = driver.active
    return utilities.utils.get_device_properties(device.index)["max_shared_mem"] - 1024  # the compiler takes some


def check(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ValueError for tensors that no kernel of attention takes."""
    if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype}:
        raise ValueError(
            f"{name}: query is {query.dtype}, key {key.dtype}, value {value.dtype}; the Triton kernels take float16,"
            " bfloat16 and float32, all three the same"
        )
    (heads, rows), (key_heads, keys) = query.shape[1:3], key.shape[1:3]
    if keys < rows or heads % key_heads or max(query.shape[3], value.shape[3]) > MAX_WIDTH:
        raise ValueError(
            f"{name}: query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: at"
            f" least as many keys as queries, heads a multiple of the keys', at most {MAX_WIDTH} numbers per head"
        )


def refuses(device: str, **problem: Any) -> str | None:
    """Why the Triton kernels of attention cannot run on tensors of a device type; None when they can.

    A problem may say `head_dim` and `dtype`.
    """
    if problem.get("head_dim", 0) > MAX_WIDTH:
        return f"head_dim is {problem['head_dim']}, above {MAX_WIDTH}"
    if problem.get("dtype", torch.float32) not in DTYPES:
        return f"tensors are {problem['dtype']}; the Triton kernels take float16, bfloat16 and float32"
    return _refuses(device)
