"""The Triton twin of kernels/attention_gather.py: chosen tokens are split among programs, the parts merged in order.

A program reads each of its keys and values once for all the query heads of a group, `BLOCK_M` of their queries at once
(`gather_kernel`), and leaves a maximum, a sum and a weighted sum of values; `merge_kernel` puts those together.
"""

# Triton's own types know nothing of constexpr arguments, launches and tuples:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .launch_triton import DTYPES, split_columns
from .launch_triton import refuses as _refuses

MOST_SPLITS = 64
LARGEST_HEAD = 256


@triton.jit(do_not_specialize=["length", "chosen", "steps", "splits"])
def gather_kernel(
    query, key, value, index, part, out, length, chosen, steps, splits, log2_scaling,
    key_batch_stride, key_head_stride, key_token_stride, value_batch_stride, value_head_stride, value_token_stride,
    KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """`BLOCK_M` queries of one KV head against `steps` times `BLOCK_N` of its chosen tokens.

    `part [B · Hkv, splits, 2, QUERIES]` takes the maximum, base 2, and the sum, `out [B · Hkv, splits, QUERIES, DV]`
    the values' weighted sum.
    """
    i_split, i_row = tl.program_id(1), tl.program_id(0).to(tl.int64)
    o_query = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_dim, o_value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    m_query = o_query < QUERIES
    position = length - T + o_query % T
    p_query = query + (i_row * QUERIES + o_query[:, None]) * D + o_dim[None, :]
    b_query = tl.load(p_query, mask=m_query[:, None] & (o_dim < D)[None, :], other=0.0).to(DTYPE)  # [BM, BD]
    p_key = key + i_row // KV_HEADS * key_batch_stride + i_row % KV_HEADS * key_head_stride
    p_value = value + i_row // KV_HEADS * value_batch_stride + i_row % KV_HEADS * value_head_stride
    b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_out = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    begin = i_split * steps * BLOCK_N
    for first in range(begin, tl.minimum(begin + steps * BLOCK_N, chosen), BLOCK_N):
        o_chosen = first + tl.arange(0, BLOCK_N)
        m_chosen = o_chosen < chosen
        token = tl.load(index + i_row * chosen + o_chosen, mask=m_chosen, other=0).to(tl.int64)
        m_key = m_chosen[None, :] & (o_dim < D)[:, None]
        b_key = tl.load(p_key + token[None, :] * key_token_stride + o_dim[:, None], mask=m_key, other=0.0)  # [BD, BN]
        b_score = tl.dot(b_query, b_key.to(DTYPE), input_precision="ieee") * log2_scaling
        m_seen = m_chosen[None, :] & (token[None, :] <= position[:, None])
        b_score = tl.where(m_seen, b_score, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, axis=1))
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)  # of a query that sees none of these tokens
        b_share = tl.exp2(b_score - b_base[:, None])  # [BM, BN]
        b_fade = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_fade + tl.sum(b_share, axis=1)
        m_value = m_chosen[:, None] & (o_value < DV)[None, :]
        b_value = tl.load(p_value + token[:, None] * value_token_stride + o_value[None, :], mask=m_value, other=0.0)
        b_out = tl.dot(b_share.to(DTYPE), b_value.to(DTYPE), b_out * b_fade[:, None], input_precision="ieee")
        b_max = b_new
    o_part = i_row * splits + i_split
    tl.store(part + o_part * 2 * QUERIES + o_query, b_max, mask=m_query)
    tl.store(part + (o_part * 2 + 1) * QUERIES + o_query, b_sum, mask=m_query)
    p_out = out + (o_part * QUERIES + o_query[:, None]) * DV + o_value[None, :]
    tl.store(p_out, b_out, mask=m_query[:, None] & (o_value < DV)[None, :])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    part, out, merged, splits,
    QUERIES: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One query of one KV head, `BLOCK_V` of its values: the parts of all splits in one."""
    i_query, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_split = tl.arange(0, SPLITS)
    o_value = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    p_part = part + (i_row * splits + o_split) * 2 * QUERIES + i_query
    b_max = tl.load(p_part, mask=o_split < splits, other=-float("inf"))
    b_sum = tl.load(p_part + QUERIES, mask=o_split < splits, other=0.0)
    b_fade = tl.exp2(b_max - tl.max(b_max, axis=0))  # [SPLITS]
    p_out = out + ((i_row * splits + o_split[:, None]) * QUERIES + i_query) * DV + o_value[None, :]
    b_out = tl.load(p_out, mask=(o_split < splits)[:, None] & (o_value < DV)[None, :], other=0.0)
    b_merged = tl.sum(b_out * b_fade[:, None], axis=0) / tl.sum(b_sum * b_fade, axis=0)
    tl.store(merged + (i_row * QUERIES + i_query) * DV + o_value, b_merged, mask=o_value < DV)


@torch.library.custom_op("acc::attention_gather", mutates_args=())
def gather_op(query: Tensor, key: Tensor, value: Tensor, index: Tensor, scaling: float) -> Tensor:
    """Operands as in kernels/attention_gather.py."""
    if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype}:
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; the Triton kernels take one of "
            "float16, bfloat16 and float32 for all three"
        )
    merged = query.new_empty(*query.shape[:3], value.shape[-1])
    if merged.numel():
        key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
        with torch.cuda.device_of(query):
            _launch(query.contiguous(), key, value, index.contiguous(), merged, scaling)
    return merged


@gather_op.register_fake
def _(query, key, value, index, scaling):
    return query.new_empty(*query.shape[:3], value.shape[-1])


def _launch(query: Tensor, key: Tensor, value: Tensor, index: Tensor, merged: Tensor, scaling: float) -> None:
    """Writes `merged [B, H, T, Dv]`, not empty."""
    (batch, heads, count, dim), kv_heads, dim_v = query.shape, key.shape[1], value.shape[-1]
    queries, programs, chosen = heads // kv_heads * count, batch * kv_heads, index.shape[-1]
    wide, exact = max(dim, dim_v) > 128, query.dtype == torch.float32
    block_m = min(max(16, triton.next_power_of_2(queries)), 32 if wide and exact else 64)
    block_n = 32 if wide or exact else 64
    tiles = -(-queries // block_m)
    steps, splits = split_columns(-(-chosen // block_n), programs * tiles, query.device, MOST_SPLITS)
    part = query.new_empty(programs, splits, 2, queries, dtype=torch.float32)
    out = query.new_empty(programs, splits, queries, dim_v, dtype=torch.float32)
    dtype = torch.float32 if knobs.runtime.interpret else query.dtype
    strides = {
        f"{name}_{of}_stride": stride
        for name, tensor in (("key", key), ("value", value))
        for of, stride in zip(("batch", "head", "token"), tensor.stride(), strict=False)
    }
    gather_kernel[programs, splits, tiles](
        query=query, key=key, value=value, index=index, part=part, out=out, length=key.shape[2], chosen=chosen,
        steps=steps, splits=splits, log2_scaling=scaling * log2(e), KV_HEADS=kv_heads, QUERIES=queries, T=count,
        D=dim, DV=dim_v, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_V=max(16, triton.next_power_of_2(dim_v)), DTYPE=DTYPES[dtype],
        num_stages=1 if wide and exact else 2,  # within 99 KiB of shared memory
        **strides,
    )  # fmt: skip
    block_v = min(triton.next_power_of_2(dim_v), 64)
    merge_kernel[queries, programs, -(-dim_v // block_v)](
        part=part, out=out, merged=merged, splits=splits, QUERIES=queries, DV=dim_v, SPLITS=MOST_SPLITS,
        BLOCK_V=block_v,
    )  # fmt: skip


def attention_gather(query: Tensor, key: Tensor, value: Tensor, index: Tensor, *, scaling: float) -> Tensor:
    """As the reference; the softmax is rounded to the type of the values before it weighs them."""
    return gather_op(query, key, value, index, scaling)


def refuses(device: str, **problem: Any) -> str | None:
    """Why this kernel cannot run on tensors of a device type; None when it can."""
    head_dim = max(problem.get("head_dim", 1), problem.get("value_dim", 1))
    if head_dim > LARGEST_HEAD:
        return f"heads are {head_dim} wide, expected {LARGEST_HEAD} at most"
    return _refuses(device)
