"""The Triton twin of kernels/attention_select.py: two passes over the labels, split over the tokens.

The first pass finds each query head's maximum and sum (`mass_kernel`), the second the scores (`score_kernel`). Labels
are read twice, because they take fewer bytes than the scores of a group's query heads would, written and read. Whatever
the number of tokens, a program holds `BLOCK_S` of them. Sums are in an order that shapes and the GPU decide.
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

from .attention_label import LABEL_BITS, check_labels
from .launch_triton import DTYPES, split_columns
from .launch_triton import refuses as _refuses

MOST_SPLITS = 64
BLOCK_S = 128


@triton.jit
def load_query(
    p_query, p_channel, p_scale, D: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`COUNT` channels of a group's query heads, `[BG, BC]`; times their steps where labels are codes."""
    o_head = tl.arange(0, BLOCK_G)[:, None]
    o_channel = tl.arange(0, BLOCK_C)[None, :]
    m_channel = o_channel < COUNT
    channel = tl.load(p_channel + o_channel, mask=m_channel, other=0)
    b_query = tl.load(p_query + o_head * D + channel, mask=(o_head < GROUP) & m_channel, other=0.0)
    if BITS < 16:
        b_query = b_query.to(tl.float32)
        b_query *= tl.load(p_scale + o_channel, mask=m_channel, other=0.0).to(tl.float32)
    return b_query.to(DTYPE)


@triton.jit
def load_queries(
    query, channels, scale, i_row, KV_HEADS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The queries that belong to the low and the high half of the bytes; twice the same where they have no halves."""
    COUNT: tl.constexpr = C // 2 if BITS == 4 else C
    p_query = query + i_row * (GROUP * D)
    p_channel, p_scale = channels + i_row % KV_HEADS * C, scale + i_row % KV_HEADS * C
    b_low = load_query(p_query, p_channel, p_scale, D, GROUP, COUNT, BITS, BLOCK_G, BLOCK_C, DTYPE)
    b_high = b_low
    if BITS == 4:
        p_channel, p_scale = p_channel + COUNT, p_scale + COUNT
        b_high = load_query(p_query, p_channel, p_scale, D, GROUP, COUNT, BITS, BLOCK_G, BLOCK_C, DTYPE)
    return b_low, b_high


@triton.jit
def scores_of(
    p_label, b_low, b_high, first, length, token_stride, log2_scaling, C: tl.constexpr, BITS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of `BLOCK_S` tokens for a group's query heads, base 2, fp32 `[BG, BS]`; -inf past the last token."""
    COUNT: tl.constexpr = C // 2 if BITS == 4 else C
    o_channel = tl.arange(0, BLOCK_C)[:, None]
    o_token = first + tl.arange(0, BLOCK_S)[None, :]
    m_label = (o_channel < COUNT) & (o_token < length)
    b_label = tl.load(p_label + o_token.to(tl.int64) * token_stride + o_channel, mask=m_label, other=0)  # [BC, BS]
    if BITS == 16:
        b_score = tl.dot(b_low, b_label.to(DTYPE), input_precision=PRECISION)
    elif BITS == 8:
        b_score = tl.dot(b_low, (b_label.to(tl.float32) - 128.0).to(DTYPE), input_precision=PRECISION)
    else:
        b_score = tl.dot(b_low, ((b_label & 15).to(tl.float32) - 8.0).to(DTYPE), input_precision=PRECISION)
        b_score = tl.dot(b_high, ((b_label >> 4).to(tl.float32) - 8.0).to(DTYPE), b_score, input_precision=PRECISION)
    return tl.where(o_token < length, b_score * log2_scaling, -float("inf"))


@triton.jit(do_not_specialize=["length", "steps", "splits"])
def mass_kernel(
    query, label, channels, scale, part, length, steps, splits, log2_scaling, batch_stride, head_stride, token_stride,
    KV_HEADS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of `steps` times `BLOCK_S` tokens the maximum and the sum of each query head: `part [B · Hkv, splits, 2, BG]`."""
    i_split, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_low, b_high = load_queries(
        query, channels, scale, i_row, KV_HEADS, C, D, GROUP, BITS, BLOCK_G, BLOCK_C, DTYPE
    )  # fmt: skip
    p_label = label + i_row // KV_HEADS * batch_stride + i_row % KV_HEADS * head_stride
    b_max = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_G,), tl.float32)
    begin = i_split * steps * BLOCK_S
    for first in range(begin, tl.minimum(begin + steps * BLOCK_S, length), BLOCK_S):
        b_score = scores_of(
            p_label, b_low, b_high, first, length, token_stride, log2_scaling, C, BITS, BLOCK_S, BLOCK_C, DTYPE,
            PRECISION,
        )  # fmt: skip
        b_new = tl.maximum(b_max, tl.max(b_score, axis=1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_score - b_new[:, None]), axis=1)
        b_max = b_new
    p_part = part + (i_row * splits + i_split) * 2 * BLOCK_G + tl.arange(0, BLOCK_G)
    tl.store(p_part, b_max)
    tl.store(p_part + BLOCK_G, b_sum)


@triton.jit(do_not_specialize=["length", "steps", "splits"])
def score_kernel(
    query, label, channels, scale, part, score, length, steps, splits, log2_scaling,
    batch_stride, head_stride, token_stride,
    KV_HEADS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of `steps` times `BLOCK_S` tokens of one KV head."""
    i_split, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_split, o_head = tl.arange(0, SPLITS)[:, None], tl.arange(0, BLOCK_G)
    p_part = part + (i_row * splits + o_split) * 2 * BLOCK_G + o_head[None, :]
    b_max = tl.load(p_part, mask=o_split < splits, other=-float("inf"))  # [SPLITS, BG]
    b_sum = tl.load(p_part + BLOCK_G, mask=o_split < splits, other=0.0)
    b_most = tl.max(b_max, axis=0)
    b_mass = tl.sum(b_sum * tl.exp2(b_max - b_most[None, :]), axis=0)
    b_mass = tl.where(o_head < GROUP, b_most + tl.log2(b_mass), float("inf"))  # a head that is not there adds nothing
    b_low, b_high = load_queries(
        query, channels, scale, i_row, KV_HEADS, C, D, GROUP, BITS, BLOCK_G, BLOCK_C, DTYPE
    )  # fmt: skip
    p_label = label + i_row // KV_HEADS * batch_stride + i_row % KV_HEADS * head_stride
    begin = i_split * steps * BLOCK_S
    for first in range(begin, tl.minimum(begin + steps * BLOCK_S, length), BLOCK_S):
        b_score = scores_of(
            p_label, b_low, b_high, first, length, token_stride, log2_scaling, C, BITS, BLOCK_S, BLOCK_C, DTYPE,
            PRECISION,
        )  # fmt: skip
        o_token = first + tl.arange(0, BLOCK_S)
        b_score = tl.sum(tl.exp2(b_score - b_mass[:, None]), axis=0)
        tl.store(score + i_row * length + o_token, b_score, mask=o_token < length)


@torch.library.custom_op("acc::attention_select", mutates_args=())
def select_op(query: Tensor, label: Tensor, channels: Tensor, scale: Tensor, bits: int, scaling: float) -> Tensor:
    """Operands as in kernels/attention_select.py."""
    if query.dtype not in DTYPES:
        raise ValueError(f"query is {query.dtype}; the Triton kernels take float16, bfloat16 and float32")
    check_labels(channels, bits)
    batch, kv_heads, length, width = label.shape
    score = query.new_empty(batch, kv_heads, length, dtype=torch.float32)
    if not score.numel():
        return score
    label = label if label.stride(-1) == 1 else label.contiguous()
    group = query.shape[1] // kv_heads
    block_g = max(16, triton.next_power_of_2(group))
    steps, splits = split_columns(-(-length // BLOCK_S), batch * kv_heads, query.device, MOST_SPLITS)
    part = query.new_empty(batch * kv_heads, splits, 2, block_g, dtype=torch.float32)
    dtype = query.dtype if label.dtype == query.dtype else torch.float32
    arguments: dict[str, Any] = {
        "query": query.contiguous(), "label": label, "channels": channels.contiguous(), "scale": scale.contiguous(),
        "part": part, "length": length, "steps": steps, "splits": splits, "log2_scaling": scaling * log2(e),
        "batch_stride": label.stride(0), "head_stride": label.stride(1), "token_stride": label.stride(2),
        "KV_HEADS": kv_heads, "C": channels.shape[1], "D": query.shape[-1], "GROUP": group, "BITS": bits,
        "SPLITS": MOST_SPLITS, "BLOCK_S": BLOCK_S, "BLOCK_G": block_g,
        "BLOCK_C": max(16, triton.next_power_of_2(width)),
        "DTYPE": DTYPES[torch.float32 if knobs.runtime.interpret else dtype],
        "PRECISION": "tf32" if bits < 16 else "ieee",
    }  # fmt: skip
    with torch.cuda.device_of(query):
        mass_kernel[splits, batch * kv_heads](**arguments)
        score_kernel[splits, batch * kv_heads](score=score, **arguments)
    return score


@select_op.register_fake
def _(query, label, *_):
    return query.new_empty(label.shape[:3], dtype=torch.float32)


def attention_select(
    query: Tensor, label: Tensor, channels: Tensor, scale: Tensor, *, bits: int, scaling: float
) -> Tensor:
    """As the reference; where labels are codes the query is rounded to 11 bits first."""
    return select_op(query, label, channels, scale, bits, scaling)


def refuses(device: str, **problem: Any) -> str | None:
    """Why this kernel cannot run on tensors of a device type; None when it can."""
    if problem.get("bits", 4) not in LABEL_BITS:
        return f"labels have {problem['bits']} bits, expected 4, 8 or 16"
    if problem.get("channels", 1) > 256:
        return f"labels have {problem['channels']} channels, expected 256 at most"
    return _refuses(device)
