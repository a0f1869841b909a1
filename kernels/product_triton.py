"""`x Wᵀ` for packed weights, one or several that share an input, or the experts of a stack, in two launches.

1. The dense part. For a single row of `x` every thread unpacks whole chunks in its registers and multiplies at once
   (`vector_kernel`); for more rows a tile of the weight is dequantised to the type of `x` and multiplied on the tensor
   cores (`tile_kernel`). Where there are too few programs to fill the GPU the input columns are split among several.
2. What is left (`finish_kernel`): the partial sums in the order of the columns, the outliers, the type of `x`. Nothing
   is left, and one launch does, when there was one split and there are no outliers.

`vector_kernel` reads a permuted input in place; before the others `gather_kernel` permutes it once, because a tile that
gathers would read each of its numbers from a cache line of its own.

All sums are in fp32 and in an order that only shapes and the GPU decide: equal calls give equal bits. Nothing waits for
the GPU, so all launches may be captured in a CUDA graph, after one call outside of it.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .decode_triton import beside, load_words, mantissas, slope_and_offset
from .packing import CHUNK
from .spqr import OUTLIER_BLOCK, outliers_per_row

OUTLIER_ROWS = 32  # rows after which the place of the outliers is noted, see `outlier_starts`
TOKENS_AT_ONCE = 4096  # bounds the memory of the partial sums
MAX_SPLITS = 16
SINGLE_GROUP = 1 << 30  # the group size of a weight whose rows are one group each
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


# Which matrix, expert and rows a program works on


@triton.jit
def choose(entries, i_matrix, M: tl.constexpr):
    """Entry `i_matrix` of a tuple of `M` pointers or numbers; None of None."""
    if entries is None:
        return None
    chosen = entries[0]
    for i in tl.static_range(1, M):
        if i_matrix == i:
            chosen = entries[i]
    return chosen


@triton.jit
def find_matrix(rows, i_tile, M: tl.constexpr, BLOCK_O: tl.constexpr):
    """The row tiles of all matrices are counted through: matrix, tile within it, rows before it, rows of all."""
    i_matrix = 0
    first_tile = 0
    first_row = 0
    tiles = 0
    below = 0
    for i in tl.static_range(1, M):
        tiles += tl.cdiv(rows[i - 1], BLOCK_O)
        below += rows[i - 1]
        if i_tile >= tiles:
            i_matrix = i
            first_tile = tiles
            first_row = below
    return i_matrix, i_tile - first_tile, first_row, below + rows[M - 1]


@triton.jit
def find_expert(ends, i_token, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert that row `i_token` belongs to, `E` for a row of no expert; 0 where there are no experts."""
    if ends is None:
        i_expert = i_token * 0
    else:
        o_e = tl.arange(0, BLOCK_E)
        b_end = tl.load(ends + o_e, mask=o_e < E, other=0)
        i_expert = tl.sum(((b_end <= i_token) & (o_e < E)).to(tl.int64), axis=0)
    return i_expert


@triton.jit
def find_tile(ends, i_tile, tokens, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """Expert, first row and end row of a tile of `x`.

    The rows of each expert, and last those of none, are cut in tiles of their own. A tile past the last one is empty.
    """
    if ends is None:
        i_expert = i_tile * 0
        begin = i_tile * BLOCK_T
        end = tokens
    else:
        o_e = tl.arange(0, BLOCK_E)  # BLOCK_E > E: entry E is no expert
        b_end = tl.load(ends + o_e, mask=o_e < E, other=0)
        b_end = tl.where(o_e < E, b_end, tokens)
        b_begin = tl.load(ends + o_e - 1, mask=(o_e > 0) & (o_e <= E), other=0)
        b_begin = tl.where(o_e <= E, b_begin, tokens)
        b_last = tl.cumsum((b_end - b_begin + BLOCK_T - 1) // BLOCK_T, axis=0)
        i_expert = tl.sum((b_last <= i_tile).to(tl.int32), axis=0)
        before = tl.sum(tl.where(o_e == i_expert - 1, b_last, 0), axis=0)
        begin = tl.sum(tl.where(o_e == i_expert, b_begin, 0), axis=0) + (i_tile - before) * BLOCK_T
        end = tl.sum(tl.where(o_e == i_expert, b_end, 0), axis=0)
    return i_expert.to(tl.int64), begin, end


@triton.jit
def find_weight(
    codes, scale, zero, stat, i_matrix, i_expert, chunks, groups, O, M: tl.constexpr,
    BITS: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr, STAT_ROWS: tl.constexpr,
):  # fmt: skip
    """The pointers of one matrix of a tuple, or of one expert of a stack."""
    octets = tl.cdiv(O, 8)
    p_codes = choose(codes, i_matrix, M) + i_expert * chunks * BITS * O
    p_scale = choose(scale, i_matrix, M)
    p_zero = choose(zero, i_matrix, M)
    p_stat = choose(stat, i_matrix, M)
    if stat is None:
        p_scale += i_expert * groups * O
        if zero is not None:
            p_zero += i_expert * groups * octets * BITS
    else:
        p_scale += i_expert * groups * octets * SCALE_BITS
        p_zero += i_expert * groups * octets * ZERO_BITS
        p_stat += i_expert * groups * tl.cdiv(O, STAT_ROWS) * 4
    return p_codes, p_scale, p_zero, p_stat


# Kernels


@triton.jit(do_not_specialize=["tokens"])
def gather_kernel(
    x, out, ends, perm, tokens, columns,
    M: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """`out[m, t, j] = x[t, perm[j]]` with the permutation of matrix `m`, or of the expert of row `t`."""
    i_token, i_matrix = tl.program_id(0).to(tl.int64), tl.program_id(2)
    o_column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_column = o_column < columns
    i_expert = find_expert(ends, i_token, E, BLOCK_E)
    if ends is not None:
        i_expert = tl.minimum(i_expert, E - 1)
    p_perm = choose(perm, i_matrix, M) + i_expert * columns
    o_from = tl.load(p_perm + o_column, mask=m_column, other=0).to(tl.int32)
    b_x = tl.load(x + i_token * columns + o_from, mask=m_column, other=0.0)
    tl.store(out + (i_matrix * tokens + i_token) * columns + o_column, b_x, mask=m_column)


@triton.jit(do_not_specialize=["tokens", "steps"])
def vector_kernel(
    x, out, ends, codes, scale, zero, stat, perm, rows, tokens, columns, groups, steps,
    M: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr,
    SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr, STAT_ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of `x` against `BLOCK_O` rows of a weight, over `steps` times `BLOCK_C` chunks of columns."""
    i_token, i_split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_matrix, i_tile, first_row, all_rows = find_matrix(rows, tl.program_id(0), M, BLOCK_O)
    O = choose(rows, i_matrix, M)  # noqa: E741
    i_expert = find_expert(ends, i_token, E, BLOCK_E)
    chunks = tl.cdiv(columns, 32)
    p_codes, p_scale, p_zero, p_stat = find_weight(
        codes, scale, zero, stat, i_matrix, i_expert, chunks, groups, O, M, BITS, SCALE_BITS, ZERO_BITS, STAT_ROWS
    )
    p_x = x + i_token * columns
    p_perm = choose(perm, i_matrix, M)
    if perm is not None:
        p_perm += i_expert * columns
    o_row = i_tile * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]  # [1, BO]
    b_sum = tl.zeros((BLOCK_C, BLOCK_O), tl.float32)
    begin = i_split * steps * BLOCK_C
    end = tl.minimum(begin + steps * BLOCK_C, chunks)
    if ends is not None:
        end = tl.where(i_expert < E, end, begin)  # a row of no expert: reads nothing, stores zeros
    for first in range(begin, end, BLOCK_C):
        o_chunk = first + tl.arange(0, BLOCK_C)[:, None]  # [BC, 1]
        m_tile = (o_chunk < chunks) & (o_row < O)  # [BC, BO]
        words = load_words(p_codes + o_chunk.to(tl.int64) * BITS * O + o_row, O, m_tile, BITS)
        for i in tl.static_range(0, 32, SPAN):
            o_column = (o_chunk * 32 + i)[:, :, None] + tl.arange(0, SPAN)[None, None, :]  # [BC, 1, SPAN]
            m_column = o_column < columns
            if perm is not None:
                o_column = tl.load(p_perm + o_column, mask=m_column, other=0).to(tl.int32)
            b_x = tl.load(p_x + o_column, mask=m_column, other=0.0).to(tl.float32)
            b_dot = tl.sum(mantissas(words, i, SPAN, BITS) * b_x, axis=2)  # [BC, BO]
            o_group = (o_chunk * 32 + i) // GROUP_SIZE
            slope, offset = slope_and_offset(
                p_scale, p_zero, p_stat, o_group.to(tl.int64), o_row, m_tile & (o_group < groups), O,
                BITS, SCALE_BITS, ZERO_BITS, STAT_ROWS,
            )  # fmt: skip
            b_sum += slope * b_dot + offset * tl.sum(b_x, axis=2)
    o_out = i_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    p_out = out + (tl.cast(all_rows, tl.int64) * i_split + first_row) * tokens + i_token * O
    tl.store(p_out + o_out, tl.sum(b_sum, axis=0), mask=o_out < O)


@triton.jit
def dequantise(
    words, p_scale, p_zero, p_stat, o_chunk, o_row, m_tile, groups, O, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr,
    SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr, STAT_ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Columns `FIRST` to `FIRST + WIDTH` of the chunks as weights `[BC, BO, WIDTH]`; `SPAN` columns share a group."""
    if WIDTH > SPAN:
        HALF: tl.constexpr = WIDTH // 2
        left = dequantise(
            words, p_scale, p_zero, p_stat, o_chunk, o_row, m_tile, groups, O, FIRST, HALF,
            BITS, GROUP_SIZE, SPAN, SCALE_BITS, ZERO_BITS, STAT_ROWS, DTYPE,
        )  # fmt: skip
        right = dequantise(
            words, p_scale, p_zero, p_stat, o_chunk, o_row, m_tile, groups, O, FIRST + HALF, HALF,
            BITS, GROUP_SIZE, SPAN, SCALE_BITS, ZERO_BITS, STAT_ROWS, DTYPE,
        )  # fmt: skip
        return beside(left, right)
    else:
        o_group = (o_chunk * 32 + FIRST) // GROUP_SIZE
        slope, offset = slope_and_offset(
            p_scale, p_zero, p_stat, o_group.to(tl.int64), o_row, m_tile & (o_group < groups), O,
            BITS, SCALE_BITS, ZERO_BITS, STAT_ROWS,
        )  # fmt: skip
        return (mantissas(words, FIRST, WIDTH, BITS) * slope[:, :, None] + offset[:, :, None]).to(DTYPE)


@triton.jit(do_not_specialize=["tokens", "steps"])
def tile_kernel(
    x, out, ends, codes, scale, zero, stat, rows, tokens, columns, groups, steps, x_stride,
    M: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr,
    SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr, STAT_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BLOCK_T` rows of `x`, in packed order, against `BLOCK_O` rows of a weight, over `steps` times `BLOCK_C` chunks.

    Matrix `m` reads `x + m · x_stride`.
    """
    i_split = tl.program_id(2)
    i_matrix, i_tile, first_row, all_rows = find_matrix(rows, tl.program_id(1), M, BLOCK_O)
    O = choose(rows, i_matrix, M)  # noqa: E741
    i_expert, first_token, end_token = find_tile(ends, tl.program_id(0), tokens, E, BLOCK_E, BLOCK_T)
    if first_token >= end_token:
        return
    chunks = tl.cdiv(columns, 32)
    p_codes, p_scale, p_zero, p_stat = find_weight(
        codes, scale, zero, stat, i_matrix, i_expert, chunks, groups, O, M, BITS, SCALE_BITS, ZERO_BITS, STAT_ROWS
    )
    o_token = first_token + tl.arange(0, BLOCK_T)
    m_token = o_token < end_token
    o_row = i_tile * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]  # [1, BO]
    p_x = x + i_matrix * x_stride + o_token.to(tl.int64)[None, :] * columns  # [1, BT]
    b_sum = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    begin = i_split * steps * BLOCK_C
    end = tl.minimum(begin + steps * BLOCK_C, chunks)
    if ends is not None:
        end = tl.where(i_expert < E, end, begin)
    for first in range(begin, end, BLOCK_C):
        o_chunk = first + tl.arange(0, BLOCK_C)[:, None]  # [BC, 1]
        m_tile = (o_chunk < chunks) & (o_row < O)  # [BC, BO]
        words = load_words(p_codes + o_chunk.to(tl.int64) * BITS * O + o_row, O, m_tile, BITS)
        b_w = dequantise(
            words, p_scale, p_zero, p_stat, o_chunk, o_row, m_tile, groups, O, 0, 32,
            BITS, GROUP_SIZE, SPAN, SCALE_BITS, ZERO_BITS, STAT_ROWS, DTYPE,
        )  # [BC, BO, 32] # fmt: skip
        b_w = tl.reshape(tl.permute(b_w, (1, 0, 2)), (BLOCK_O, BLOCK_C * 32))
        o_column = first * 32 + tl.arange(0, BLOCK_C * 32)[:, None]
        b_x = tl.load(p_x + o_column, mask=m_token[None, :] & (o_column < columns), other=0.0)
        b_sum = tl.dot(b_w, b_x.to(DTYPE), b_sum, input_precision=PRECISION)  # [BO, BT]
    o_out = i_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    p_out = out + (tl.cast(all_rows, tl.int64) * i_split + first_row) * tokens
    p_out = p_out + o_token.to(tl.int64)[None, :] * O + o_out[:, None]
    tl.store(p_out, b_sum, mask=(o_out < O)[:, None] & m_token[None, :])


@triton.jit(do_not_specialize=["tokens"])
def finish_kernel(
    x, parts, out, ends, perm, count, start, column, value, rows, tokens, columns, x_stride,
    M: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, SPLITS: tl.constexpr, OUTLIER_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`out = parts` summed over the splits, plus the outliers of `BLOCK_O` rows times `BLOCK_T` rows of `x`.

    `BLOCK_N` outliers of each row of `BLOCK_B` column blocks are taken at once.
    """
    o_token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BT]
    m_token = o_token < tokens
    i_matrix, i_tile, first_row, all_rows = find_matrix(rows, tl.program_id(1), M, BLOCK_O)
    O = choose(rows, i_matrix, M)  # noqa: E741
    o_row = i_tile * BLOCK_O + tl.arange(0, BLOCK_O)  # [BO]
    o_out = o_token[:, None] * O + o_row[None, :] + tl.cast(first_row, tl.int64) * tokens  # [BT, BO]
    m_out = m_token[:, None] & (o_row < O)[None, :]
    b_out = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for i in tl.static_range(SPLITS):
        b_out += tl.load(parts + tl.cast(all_rows, tl.int64) * tokens * i + o_out, mask=m_out, other=0.0)
    if count is not None:
        i_expert = find_expert(ends, tl.program_id(0).to(tl.int64) * BLOCK_T, E, BLOCK_E)
        blocks = tl.cdiv(columns, OUTLIER_BLOCK)
        p_count = choose(count, i_matrix, M) + i_expert * blocks * O + o_row[None, :]
        p_start = choose(start, i_matrix, M) + i_expert * blocks * tl.cdiv(O, BLOCK_O) + i_tile
        p_column, p_value = choose(column, i_matrix, M), choose(value, i_matrix, M)
        p_perm = choose(perm, i_matrix, M)
        if perm is not None:
            p_perm += i_expert * columns
        p_x = x + i_matrix * x_stride + (o_token * columns)[:, None, None, None]
        end = blocks
        if ends is not None:
            end = tl.where(i_expert < E, blocks, 0)
        b_sum = tl.zeros((BLOCK_T, BLOCK_B, BLOCK_O), tl.float32)
        for first in range(0, end, BLOCK_B):
            o_block = first + tl.arange(0, BLOCK_B)[:, None]  # [BB, 1]
            m_count = (o_block < blocks) & (o_row < O)[None, :]
            b_count = tl.load(p_count + o_block.to(tl.int64) * O, mask=m_count, other=0).to(tl.int32)  # [BB, BO]
            # 255 stands for every column of the block, see kernels/spqr.py
            b_width = tl.minimum(columns - o_block * OUTLIER_BLOCK, OUTLIER_BLOCK)
            b_count = tl.where(b_count == 255, b_width, b_count)
            b_start = tl.load(p_start + o_block * tl.cdiv(O, BLOCK_O), mask=o_block < blocks, other=0)
            b_place = b_start + tl.cumsum(b_count, axis=1) - b_count
            for i in range(0, tl.max(tl.max(b_count, axis=1), axis=0), BLOCK_N):
                o_n = i + tl.arange(0, BLOCK_N)[None, None, :]
                m_n = o_n < b_count[:, :, None]  # [BB, BO, BN]
                o_n = b_place[:, :, None] + o_n
                o_x = tl.load(p_column + o_n, mask=m_n, other=0).to(tl.int32) + (o_block * OUTLIER_BLOCK)[:, :, None]
                b_value = tl.load(p_value + o_n, mask=m_n, other=0.0).to(tl.float32)
                if perm is not None:
                    o_x = tl.load(p_perm + o_x, mask=m_n, other=0).to(tl.int32)
                m_x = m_n[None, :, :, :] & m_token[:, None, None, None]
                b_x = tl.load(p_x + o_x[None, :, :, :], mask=m_x, other=0.0).to(tl.float32)
                b_sum += tl.sum(b_x * b_value[None, :, :, :], axis=3)
        b_out += tl.sum(b_sum, axis=1)
    tl.store(out + o_out, b_out, mask=m_out)


# Launchers


class Operands(NamedTuple):
    """The tensors of `M` matrices, a tuple of `M` per kind; an empty one for a kind that the format does not have."""

    codes: tuple[Tensor, ...]
    scale: tuple[Tensor, ...]
    zero: tuple[Tensor, ...] = ()
    stat: tuple[Tensor, ...] = ()
    perm: tuple[Tensor, ...] = ()
    outlier_count: tuple[Tensor, ...] = ()
    outlier_column: tuple[Tensor, ...] = ()
    outlier_value: tuple[Tensor, ...] = ()

    def single(self, matrix: int) -> Operands:
        return Operands(*(kind[matrix : matrix + 1] for kind in self))

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(words.shape[-1] for words in self.codes)

    @property
    def outliers(self) -> bool:
        return any(len(value) for value in self.outlier_value)


@torch.library.custom_op("acc::packed_product", mutates_args=())
def packed_product(
    x: Tensor,
    ends: Tensor | None,
    codes: list[Tensor],
    scale: list[Tensor],
    zero: list[Tensor],
    stat: list[Tensor],
    perm: list[Tensor],
    outlier_count: list[Tensor],
    outlier_column: list[Tensor],
    outlier_value: list[Tensor],
    bits: int,
    group_size: int,
    scale_bits: int,
    zero_bits: int,
    stat_group_size: int,
) -> Tensor:
    """`x [T, I]` through `M` weights: their products `[T, O_m]`, one after the other in a flat tensor.

    The lists are as `Operands` says, tensors as in `kernels/spqr.py` and `kernels/grouped.py`. With `ends` int32 `[E]`
    there is one matrix, a stack of `E`: the rows of `x` before `ends[0]` are for expert 0, those before `ends[1]` for
    expert 1 and so on; rows past the last one are for none and come out as zeros.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the Triton kernels take float16, bfloat16 and float32")
    kinds = (codes, scale, zero, stat, perm, outlier_count, outlier_column, outlier_value)
    weights = Operands(*(tuple(kind) for kind in kinds))
    numbers = _numbers(weights, ends, bits, group_size) | {
        "SCALE_BITS": scale_bits, "ZERO_BITS": zero_bits, "STAT_ROWS": stat_group_size
    }  # fmt: skip
    tokens, rows = x.shape[0], weights.rows
    out = x.new_empty(tokens * sum(rows))
    with torch.cuda.device_of(x):
        if tokens <= TOKENS_AT_ONCE or ends is not None:
            if out.numel():
                _launch(x.contiguous(), out, ends, weights, numbers)
            return out
        for matrix, product in enumerate(out.split([tokens * count for count in rows])):
            for part, written in zip(x.split(TOKENS_AT_ONCE), product.split(TOKENS_AT_ONCE * rows[matrix])):
                _launch(part.contiguous(), written, ends, weights.single(matrix), numbers)
    return out


@packed_product.register_fake
def _(x, ends, codes, *_):
    return x.new_empty(x.shape[0] * sum(words.shape[-1] for words in codes))


def _numbers(weights: Operands, ends: Tensor | None, bits: int, group_size: int) -> dict[str, int]:
    """The sizes that all matrices share, as the dense kernels take them."""
    experts = 1 if ends is None else ends.shape[0]
    groups = weights.scale[0].shape[0] // experts
    span = CHUNK if groups == 1 else gcd(group_size, CHUNK)
    if span < 8:
        raise ValueError(f"groups of {group_size} columns are no whole octets of columns; set ACC_KERNELS=reference")
    group_size = SINGLE_GROUP if groups == 1 else group_size
    return {"groups": groups, "BITS": bits, "GROUP_SIZE": group_size, "SPAN": span}


def _launch(x: Tensor, out: Tensor, ends: Tensor | None, weights: Operands, numbers: dict[str, int]) -> None:
    """Writes the flat products `out` of contiguous `x [T, I]`, neither of them empty."""
    tokens, columns = x.shape
    experts = 0 if ends is None else ends.shape[0]
    # an expert that is hit has a row or two as long as there are few: a tile would be mostly empty
    vector = tokens == 1 or tokens <= experts // 2
    shared: dict[str, Any] = {
        "ends": ends, "tokens": tokens, "columns": columns, "M": len(weights.codes), "E": experts,
        "BLOCK_E": triton.next_power_of_2(experts + 1),
    }  # fmt: skip
    perm, x_stride = weights.perm or None, 0
    if perm is not None and not vector:
        x, perm, x_stride = _gather(x, perm, shared), None, tokens * columns
    shared["rows"] = weights.rows
    tile = _tile(x, weights, tokens, experts, vector)
    token_tiles = tokens if vector else -(-tokens // tile["BLOCK_T"])
    if experts and not vector:
        token_tiles = min(token_tiles + experts, tokens)
    row_tiles = sum(-(-count // tile["BLOCK_O"]) for count in weights.rows)
    steps, splits = _split(-(-columns // (CHUNK * tile["BLOCK_C"])), row_tiles * token_tiles, x.device)
    done = splits == 1 and not weights.outliers
    parts = out if done else x.new_empty(splits * out.numel(), dtype=torch.float32)
    dense = {
        "x": x, "out": parts, "steps": steps, "codes": weights.codes, "scale": weights.scale,
        "zero": weights.zero or None, "stat": weights.stat or None, **shared, **numbers, **tile,
    }  # fmt: skip
    if vector:
        vector_kernel[row_tiles, tokens, splits](perm=perm, **dense)
    else:
        tile_kernel[token_tiles, row_tiles, splits](x_stride=x_stride, **dense)
    if not done:
        _finish(x, parts, out, perm, x_stride, splits, weights, shared)


def _gather(x: Tensor, perm: tuple[Tensor, ...], shared: dict[str, Any]) -> Tensor:
    """`x [T, I]` -> `[M, T, I]`, in the packed order of each matrix, or of the expert of each row."""
    (tokens, columns), block = x.shape, 1024
    out = x.new_empty(len(perm), tokens, columns)
    grid = (tokens, -(-columns // block), len(perm))
    gather_kernel[grid](x=x, out=out, perm=perm, BLOCK_I=block, **shared)
    return out


def _finish(
    x: Tensor,
    parts: Tensor,
    out: Tensor,
    perm: tuple[Tensor, ...] | None,
    x_stride: int,
    splits: int,
    weights: Operands,
    shared: dict[str, Any],
) -> None:
    tokens, columns = shared["tokens"], shared["columns"]
    sparse = dict.fromkeys(("count", "start", "column", "value"))
    if weights.outliers:
        sparse = {
            "count": weights.outlier_count,
            "start": tuple(outlier_starts(count, columns) for count in weights.outlier_count),
            "column": weights.outlier_column,
            "value": weights.outlier_value,
        }
    one = tokens == 1 or shared["E"] > 0  # neighbouring rows may be of different experts
    block_t, most_blocks = (1, 8) if one else (4, 2)
    row_tiles = sum(-(-count // OUTLIER_ROWS) for count in weights.rows)
    finish_kernel[-(-tokens // block_t), row_tiles](
        x=x, parts=parts, out=out, perm=perm, x_stride=x_stride, SPLITS=splits, OUTLIER_BLOCK=OUTLIER_BLOCK,
        BLOCK_T=block_t, BLOCK_O=OUTLIER_ROWS, BLOCK_N=4,
        BLOCK_B=min(most_blocks, triton.next_power_of_2(-(-columns // OUTLIER_BLOCK))), **sparse, **shared,
    )  # fmt: skip


def _tile(x: Tensor, weights: Operands, tokens: int, experts: int, vector: bool) -> dict[str, Any]:
    """How much of the problem a program of the dense part takes."""
    if vector:
        return {"BLOCK_O": 64, "BLOCK_C": 8, "num_warps": 4}
    stored = {tensor.dtype for tensor in weights.stat or weights.scale}
    dtype, precision = x.dtype, "ieee"
    if x.dtype == torch.float16 and torch.bfloat16 in stored:  # its weights may be too large, or too small, for float16
        dtype, precision = torch.float32, "tf32"  # in which x is exact
    if triton.knobs.runtime.interpret:
        dtype = torch.float32  # the interpreter takes the bits of bfloat16 for integers in a dot product
    per_expert = -(-tokens // max(experts, 1))
    block_t = min(max(triton.next_power_of_2(per_expert), 16), 128)
    large = block_t == 128 and dtype != torch.float32
    tile = {"BLOCK_T": block_t if large else min(block_t, 64), "BLOCK_O": 128 if large else 64, "BLOCK_C": 2}
    return tile | {"DTYPE": DTYPES[dtype], "PRECISION": precision, "num_warps": 8 if large else 4}


def _split(steps: int, programs: int, device: torch.device) -> tuple[int, int]:
    """The columns' steps per program, and among how many programs they are split."""
    wanted = min(-(-4 * _processors(device) // programs), MAX_SPLITS, steps)
    per_program = -(-steps // wanted)
    return per_program, -(-steps // per_program)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# What is remembered of a weight

_STARTS: dict[tuple, tuple[StorageWeakRef, Tensor]] = {}


def outlier_starts(outlier_count: Tensor, columns: int) -> Tensor:
    """Where the outliers of rows 0, 32, 64, … of each block of columns start: int64 `[E · blocks, ceil(O / 32)]`.

    The kernel counts on from there. Computed at a weight's first product and kept as long as its counts' memory lives:
    8 bytes per 8192 weights, 0.008 bits per weight.
    """
    storage = StorageWeakRef(outlier_count.untyped_storage())
    version = 0 if outlier_count.is_inference() else outlier_count._version
    key = (storage.cdata, outlier_count.storage_offset(), tuple(outlier_count.shape), version)
    if key not in _STARTS:
        starts = _outlier_starts(outlier_count, columns)
        if starts.is_cuda and torch.cuda.is_current_stream_capturing():
            return starts  # it has no value before the graph is replayed, and the graph fills it anew each time
        for old in [old for old, (alive, _) in _STARTS.items() if alive.expired()]:
            del _STARTS[old]
        _STARTS[key] = (storage, starts)
    return _STARTS[key][1]


def _outlier_starts(outlier_count: Tensor, columns: int) -> Tensor:
    blocks, rows = -(-columns // OUTLIER_BLOCK), outlier_count.shape[1]
    count = torch.cat([outliers_per_row(part, columns) for part in outlier_count.split(blocks)])
    count = torch.nn.functional.pad(count, (0, -rows % OUTLIER_ROWS)).view(len(count), -1, OUTLIER_ROWS).sum(-1)
    return (count.flatten().cumsum(0) - count.flatten()).view(count.shape)


def refuses(device: str, **problem: Any) -> str | None:
    """Why the Triton kernels cannot run a packed product on tensors of a device type; None when they can."""
    if device == "cpu" and not triton.knobs.runtime.interpret:
        return "tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels are not made for {device}"
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU's compute capability is below 8.0"
    if not 2 <= problem.get("bits", 2) <= 8:
        return f"codes have {problem['bits']} bits, expected 2 to 8"
    return None
