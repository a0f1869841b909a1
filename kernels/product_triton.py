"""The Triton kernels of `x Wᵀ` for packed weights; `kernels/launch_triton.py` says how they work together.

`M` is the number of matrices that share `x`, `E` of experts in a stack; `height` is the number of rows of one matrix.
"""

# Triton's own types know nothing of constexpr arguments, launches and tuples:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .decode_triton import beside, load_words, mantissa, mantissas, slope_and_offset

# Which matrix, expert and rows a program works on


@triton.jit
def choose(entries, i_matrix, M: tl.constexpr):
    """Entry `i_matrix` of a tuple of `M` pointers or numbers; None of None."""
    if entries is None:
        chosen = None
    else:
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
    codes, scale, zero, stat, i_matrix, i_expert, chunks, groups, height,
    M: tl.constexpr, BITS: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr, STAT_ROWS: tl.constexpr,
):  # fmt: skip
    """The pointers of one matrix of a tuple, or of one expert of a stack."""
    octets = tl.cdiv(height, 8)
    p_codes = choose(codes, i_matrix, M) + i_expert * chunks * BITS * height
    p_scale = choose(scale, i_matrix, M)
    p_zero = choose(zero, i_matrix, M) + i_expert * groups * octets * ZERO_BITS
    p_stat = choose(stat, i_matrix, M)
    if STAT_ROWS > 0:
        p_scale += i_expert * groups * octets * SCALE_BITS
        p_stat += i_expert * groups * tl.cdiv(height, STAT_ROWS) * 4
    else:
        p_scale += i_expert * groups * height
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
    height = choose(rows, i_matrix, M)
    i_expert = find_expert(ends, i_token, E, BLOCK_E)
    chunks = tl.cdiv(columns, 32)
    p_codes, p_scale, p_zero, p_stat = find_weight(
        codes, scale, zero, stat, i_matrix, i_expert, chunks, groups, height,
        M, BITS, SCALE_BITS, ZERO_BITS, STAT_ROWS,
    )  # fmt: skip
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
        m_tile = (o_chunk < chunks) & (o_row < height)  # [BC, BO]
        words = load_words(p_codes + o_chunk.to(tl.int64) * BITS * height + o_row, height, m_tile, BITS)
        for i in tl.static_range(0, 32, SPAN):
            b_dot = tl.zeros((BLOCK_C, BLOCK_O), tl.float32)
            b_x_sum = tl.zeros((BLOCK_C,), tl.float32)
            for k in tl.static_range(i, i + SPAN):
                # in one dimension, so that a thread loads it once for all its rows: [BC, 1] does not before Triton 3.9
                o_column = (first + tl.arange(0, BLOCK_C)) * 32 + k  # [BC]
                m_column = o_column < columns
                if perm is not None:
                    o_column = tl.load(p_perm + o_column, mask=m_column, other=0).to(tl.int32)
                b_x = tl.load(p_x + o_column, mask=m_column, other=0.0).to(tl.float32)
                b_dot += mantissa(words, k // 2, k % 2, BITS) * b_x[:, None]
                b_x_sum += b_x
            o_group = (o_chunk * 32 + i) // GROUP_SIZE
            slope, offset = slope_and_offset(
                p_scale, p_zero, p_stat, o_group.to(tl.int64), o_group < groups, i_tile, height,
                BITS, SCALE_BITS, ZERO_BITS, STAT_ROWS, BLOCK_C, BLOCK_O,
            )  # fmt: skip
            b_sum += slope * b_dot + offset * b_x_sum[:, None]
    o_out = i_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    p_out = out + (tl.cast(all_rows, tl.int64) * i_split + first_row) * tokens + i_token * height
    tl.store(p_out + o_out, tl.sum(b_sum, axis=0), mask=o_out < height)


@triton.jit
def dequantise(
    words, p_scale, p_zero, p_stat, o_chunk, i_tile, groups, height,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr,
    SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr, STAT_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Columns `FIRST` to `FIRST + WIDTH` of the chunks as weights `[BC, BO, WIDTH]`; `SPAN` columns share a group."""
    if WIDTH > SPAN:
        HALF: tl.constexpr = WIDTH // 2
        left = dequantise(
            words, p_scale, p_zero, p_stat, o_chunk, i_tile, groups, height, FIRST, HALF,
            BITS, GROUP_SIZE, SPAN, SCALE_BITS, ZERO_BITS, STAT_ROWS, BLOCK_C, BLOCK_O, DTYPE,
        )  # fmt: skip
        right = dequantise(
            words, p_scale, p_zero, p_stat, o_chunk, i_tile, groups, height, FIRST + HALF, HALF,
            BITS, GROUP_SIZE, SPAN, SCALE_BITS, ZERO_BITS, STAT_ROWS, BLOCK_C, BLOCK_O, DTYPE,
        )  # fmt: skip
        b_w = beside(left, right)
    else:
        o_group = (o_chunk * 32 + FIRST) // GROUP_SIZE
        slope, offset = slope_and_offset(
            p_scale, p_zero, p_stat, o_group.to(tl.int64), o_group < groups, i_tile, height,
            BITS, SCALE_BITS, ZERO_BITS, STAT_ROWS, BLOCK_C, BLOCK_O,
        )  # fmt: skip
        b_w = (mantissas(words, FIRST, WIDTH, BITS) * slope[:, :, None] + offset[:, :, None]).to(DTYPE)
    return b_w


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
    height = choose(rows, i_matrix, M)
    i_expert, first_token, end_token = find_tile(ends, tl.program_id(0), tokens, E, BLOCK_E, BLOCK_T)
    if first_token >= end_token:
        return
    chunks = tl.cdiv(columns, 32)
    p_codes, p_scale, p_zero, p_stat = find_weight(
        codes, scale, zero, stat, i_matrix, i_expert, chunks, groups, height,
        M, BITS, SCALE_BITS, ZERO_BITS, STAT_ROWS,
    )  # fmt: skip
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
        m_tile = (o_chunk < chunks) & (o_row < height)  # [BC, BO]
        words = load_words(p_codes + o_chunk.to(tl.int64) * BITS * height + o_row, height, m_tile, BITS)
        b_w = dequantise(
            words, p_scale, p_zero, p_stat, o_chunk, i_tile, groups, height, 0, 32,
            BITS, GROUP_SIZE, SPAN, SCALE_BITS, ZERO_BITS, STAT_ROWS, BLOCK_C, BLOCK_O, DTYPE,
        )  # [BC, BO, 32] # fmt: skip
        b_w = tl.reshape(tl.permute(b_w, (1, 0, 2)), (BLOCK_O, BLOCK_C * 32))
        o_column = first * 32 + tl.arange(0, BLOCK_C * 32)[:, None]
        b_x = tl.load(p_x + o_column, mask=m_token[None, :] & (o_column < columns), other=0.0)
        b_sum = tl.dot(b_w, b_x.to(DTYPE), b_sum, input_precision=PRECISION)  # [BO, BT]
    o_out = i_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    p_out = out + (tl.cast(all_rows, tl.int64) * i_split + first_row) * tokens
    p_out = p_out + o_token.to(tl.int64)[None, :] * height + o_out[:, None]
    tl.store(p_out, b_sum, mask=(o_out < height)[:, None] & m_token[None, :])


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
    height = choose(rows, i_matrix, M)
    o_row = i_tile * BLOCK_O + tl.arange(0, BLOCK_O)  # [BO]
    o_out = o_token[:, None] * height + o_row[None, :] + tl.cast(first_row, tl.int64) * tokens  # [BT, BO]
    m_out = m_token[:, None] & (o_row < height)[None, :]
    b_out = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for i in tl.static_range(SPLITS):
        b_out += tl.load(parts + tl.cast(all_rows, tl.int64) * tokens * i + o_out, mask=m_out, other=0.0)
    if count is not None:
        i_expert = find_expert(ends, tl.program_id(0).to(tl.int64) * BLOCK_T, E, BLOCK_E)
        blocks = tl.cdiv(columns, OUTLIER_BLOCK)
        p_count = choose(count, i_matrix, M) + i_expert * blocks * height + o_row[None, :]
        p_start = choose(start, i_matrix, M) + i_expert * blocks * tl.cdiv(height, BLOCK_O) + i_tile
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
            m_count = (o_block < blocks) & (o_row < height)[None, :]
            b_count = tl.load(p_count + o_block.to(tl.int64) * height, mask=m_count, other=0).to(tl.int32)  # [BB, BO]
            # 255 stands for every column of the block, see kernels/spqr.py
            b_width = tl.minimum(columns - o_block * OUTLIER_BLOCK, OUTLIER_BLOCK)
            b_count = tl.where(b_count == 255, b_width, b_count)
            b_start = tl.load(p_start + o_block * tl.cdiv(height, BLOCK_O), mask=o_block < blocks, other=0)
            b_place = b_start + tl.cumsum(b_count, axis=1) - b_count
            for k in range(0, tl.max(tl.max(b_count, axis=1), axis=0), BLOCK_N):
                o_n = k + tl.arange(0, BLOCK_N)[None, None, :]
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
