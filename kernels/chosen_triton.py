"""The Triton twin of kernels/chosen.py: the lowest score that is chosen, digit by digit, then the places of the tokens.

Sorting, or a search for the highest scores in one program per row, takes longer than the attention over them. Here the
scores, as integers of the same order, are counted by their leading 11 bits, those that share the lowest chosen digit by
the next 11, and the rest by the last 10 (`digit_kernel`); then each split of a row counts what it keeps
(`count_kernel`) and writes it behind the splits before it (`place_kernel`), which makes the order ascending. Additions
from several programs are of integers, so their order does not matter. Nothing waits for the GPU.
"""

# Triton's own types know nothing of constexpr arguments, launches and tuples:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chosen as reference
from .launch_triton import refuses as _refuses
from .launch_triton import split_columns

BINS = 2048
BLOCK_S = 2048
MOST_SPLITS = 64


@triton.jit
def load_order(p_score, o_token, length, sink, last):
    """The scores as integers of the same order, and which of the tokens they decide about: not about the first `sink`,
    nor about those from `last` on."""
    score = tl.load(p_score + o_token, mask=o_token < length, other=0.0)
    score = tl.where(score == score, score, -float("inf")) + 0.0  # no NaN; one zero, of sign plus
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF), (o_token >= sink) & (o_token < last)


@triton.jit
def lowest_digit(p_count, wanted, higher, BITS: tl.constexpr, BINS: tl.constexpr):
    """The digit of the `wanted`-th highest score, behind the `higher` digits, and how many are wanted of that digit."""
    o_bin = tl.arange(0, BINS)
    b_count = tl.load(p_count + o_bin)
    digit = tl.sum((tl.cumsum(b_count, axis=0, reverse=True) >= wanted).to(tl.int32), axis=0) - 1
    wanted -= tl.sum(tl.where(o_bin > digit, b_count, 0), axis=0)
    return wanted, higher * (1 << BITS) + digit


@triton.jit
def lowest(p_count, wanted, DIGITS: tl.constexpr, BINS: tl.constexpr):
    """The first `DIGITS` digits of the `wanted`-th highest score, and how many are wanted of those that share them."""
    higher = -1  # the sign is in the first digit, whose middle is zero
    if DIGITS >= 1:
        wanted, digit = lowest_digit(p_count, wanted, 0, 11, BINS)
        higher = digit - BINS // 2
    if DIGITS >= 2:
        wanted, higher = lowest_digit(p_count + BINS, wanted, higher, 11, BINS)
    if DIGITS >= 3:
        wanted, higher = lowest_digit(p_count + 2 * BINS, wanted, higher, 10, BINS)
    return wanted, higher


@triton.jit(do_not_specialize=["length", "steps", "sink", "last", "wanted"])
def digit_kernel(
    score, count, length, steps, sink, last, wanted, DIGIT: tl.constexpr, BINS: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Adds to `count [B · Hkv, 3, BINS]` how often each value of digit `DIGIT` stands behind the digits before it."""
    i_split, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_count = count + i_row * 3 * BINS
    wanted, higher = lowest(p_count, wanted, DIGIT, BINS)
    b_count = tl.zeros((BINS,), tl.int32)
    begin = i_split * steps * BLOCK_S
    for first in range(begin, tl.minimum(begin + steps * BLOCK_S, length), BLOCK_S):
        order, m_token = load_order(score + i_row * length, first + tl.arange(0, BLOCK_S), length, sink, last)
        if DIGIT == 0:
            digit = (order >> 21) + BINS // 2
        elif DIGIT == 1:
            digit, m_token = (order >> 10) & (BINS - 1), m_token & ((order >> 21) == higher)
        else:
            digit, m_token = order & 1023, m_token & ((order >> 10) == higher)
        b_count += tl.histogram(digit, BINS, mask=m_token)
    tl.atomic_add(p_count + DIGIT * BINS + tl.arange(0, BINS), b_count, mask=b_count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["length", "steps", "splits", "sink", "last", "wanted"])
def count_kernel(
    score, count, part, length, steps, splits, sink, last, wanted, BINS: tl.constexpr, BLOCK_S: tl.constexpr
):
    """`part [B · Hkv, splits, 2]`: how many tokens of a split are in whatever the others hold, and how many are level
    with the lowest chosen score."""
    i_split, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wanted, least = lowest(count + i_row * 3 * BINS, wanted, 3, BINS)
    sure, level = 0, 0
    begin = i_split * steps * BLOCK_S
    for first in range(begin, tl.minimum(begin + steps * BLOCK_S, length), BLOCK_S):
        o_token = first + tl.arange(0, BLOCK_S)
        order, m_token = load_order(score + i_row * length, o_token, length, sink, last)
        m_sure = (o_token < length) & ((order > least) | ~m_token)
        sure += tl.sum(m_sure.to(tl.int32), axis=0)
        level += tl.sum((m_token & (order == least)).to(tl.int32), axis=0)
    p_part = part + (i_row * splits + i_split) * 2
    tl.store(p_part, sure)
    tl.store(p_part + 1, level)


@triton.jit(do_not_specialize=["length", "steps", "splits", "sink", "last", "wanted", "chosen"])
def place_kernel(
    score, count, part, index, length, steps, splits, sink, last, wanted, chosen,
    SPLITS: tl.constexpr, BINS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Writes a split's share of `index [B · Hkv, chosen]`."""
    i_split, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wanted, least = lowest(count + i_row * 3 * BINS, wanted, 3, BINS)
    o_split = tl.arange(0, SPLITS)
    p_part = part + (i_row * splits + o_split) * 2
    level = tl.sum(tl.load(p_part + 1, mask=o_split < i_split, other=0), axis=0)
    place = tl.sum(tl.load(p_part, mask=o_split < i_split, other=0), axis=0) + tl.minimum(level, wanted)
    begin = i_split * steps * BLOCK_S
    for first in range(begin, tl.minimum(begin + steps * BLOCK_S, length), BLOCK_S):
        o_token = first + tl.arange(0, BLOCK_S)
        order, m_token = load_order(score + i_row * length, o_token, length, sink, last)
        b_level = (m_token & (order == least)).to(tl.int32)
        m_level = (b_level > 0) & (level + tl.cumsum(b_level, axis=0) <= wanted)
        b_kept = ((o_token < length) & ((order > least) | ~m_token | m_level)).to(tl.int32)
        o_place = place + tl.cumsum(b_kept, axis=0) - 1
        tl.store(index + i_row * chosen + o_place, o_token, mask=b_kept > 0)
        place += tl.sum(b_kept, axis=0)
        level += tl.sum(b_level, axis=0)


@torch.library.custom_op("acc::chosen", mutates_args=())
def chosen_op(score: Tensor, wanted: int, sink: int, recent: int) -> Tensor:
    """`score [B, Hkv, S]` as in kernels/chosen.py, of which more than `wanted` decide about their token."""
    batch, heads, length = score.shape
    index = score.new_empty(batch, heads, wanted + sink + recent, dtype=torch.int32)
    programs = batch * heads
    if not index.numel():
        return index
    steps, splits = split_columns(-(-length // BLOCK_S), programs, score.device, MOST_SPLITS)
    count = score.new_zeros(programs, 3, BINS, dtype=torch.int32)
    part = score.new_empty(programs, splits, 2, dtype=torch.int32)
    arguments: dict[str, Any] = {
        "score": score.contiguous(), "count": count, "length": length, "steps": steps, "sink": sink,
        "last": length - recent, "wanted": wanted, "BINS": BINS, "BLOCK_S": BLOCK_S, "num_warps": 8,
    }  # fmt: skip
    with torch.cuda.device_of(score):
        for digit in range(3):
            digit_kernel[splits, programs](DIGIT=digit, **arguments)
        arguments |= {"part": part, "splits": splits}
        count_kernel[splits, programs](**arguments)
        place_kernel[splits, programs](index=index, chosen=index.shape[-1], SPLITS=MOST_SPLITS, **arguments)
    return index


@chosen_op.register_fake
def _(score, wanted, sink, recent):
    return score.new_empty(*score.shape[:2], wanted + sink + recent, dtype=torch.int32)


def chosen(score: Tensor, *, tokens: int, sink: int, recent: int) -> Tensor:
    """As the reference, the same tokens; scores of another type than float32 are made that."""
    wanted = reference.left_to_scores(tokens, sink, recent)
    if wanted == 0 or score.shape[-1] <= wanted + sink + recent:
        return reference.chosen(score, tokens=tokens, sink=sink, recent=recent)
    return chosen_op(score.float(), wanted, sink, recent)


def refuses(device: str, **problem: Any) -> str | None:
    """Why this kernel cannot run on tensors of a device type; None when it can."""
    return _refuses(device)
