"""Reading packed weights inside a Triton kernel: words to numbers, bit streams, scales and zero points.

A code is never turned into an integer first. Its bits are laid as the leading mantissa bits of a float in [1, 2), which
takes one shift and one and-or instruction: `v = 1 + code · 2^-bits`. The group's scale and zero point then undo both,
`scale · (code - zero) = slope · v + offset`, in one fused multiply-add per weight, or per group after a dot product.

`C` stands for chunks of 32 columns, `BC` and `BO` for how many chunks and rows a program holds at once.
"""

# Triton's own types know nothing of constexpr arguments and tuples:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_words(p_words, row_stride, m_words, BITS: tl.constexpr):
    """The `BITS` words of each chunk and row as a tuple of `[BC, BO]`; p_words points to the first ones."""
    words = (tl.load(p_words, mask=m_words, other=0),)
    for i in tl.static_range(1, BITS):
        words = words + (tl.load(p_words + i * row_stride, mask=m_words, other=0),)  # noqa: RUF005 - a Triton tuple
    return words


@triton.jit
def piece(word, SHIFT: tl.constexpr, WIDTH: tl.constexpr, PLACE: tl.constexpr):
    """`WIDTH` bits of each word, moved from bit `SHIFT` to bit `PLACE`, and nothing else."""
    MASK: tl.constexpr = ((1 << WIDTH) - 1) << PLACE
    if SHIFT >= PLACE:
        moved = word >> (SHIFT - PLACE)
    else:
        moved = word << (PLACE - SHIFT)
    return moved & MASK


@triton.jit
def leftover(bits, word, I_WORD: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """`bits` with what word `I_WORD` adds to the code at `FIRST` of the stream at the top of the halves."""
    WHOLE: tl.constexpr = 16 // BITS
    REST: tl.constexpr = 16 % BITS
    BEGIN: tl.constexpr = I_WORD * REST if I_WORD * REST > FIRST else FIRST
    END: tl.constexpr = I_WORD * REST + REST if I_WORD * REST + REST < FIRST + BITS else FIRST + BITS
    if BEGIN < END:
        SHIFT: tl.constexpr = BITS * WHOLE + BEGIN - I_WORD * REST + 16 * HALF
        bits |= piece(word, SHIFT, END - BEGIN, 23 - BITS + BEGIN - FIRST)
    return bits


@triton.jit
def mantissa(words, PAIR: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """Column `2 · PAIR + HALF` of the chunk as `1 + code · 2^-BITS`; the layout is the table of kernels/packing.py."""
    WHOLE: tl.constexpr = 16 // BITS
    if PAIR < BITS * WHOLE:
        bits = piece(words[PAIR // WHOLE], BITS * (PAIR % WHOLE) + 16 * HALF, BITS, 23 - BITS)
    else:
        bits = tl.zeros_like(words[0])
        for i in tl.static_range(BITS):
            bits = leftover(bits, words[i], i, (PAIR - BITS * WHOLE) * BITS, HALF, BITS)
    return (bits | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def beside(left, right):
    """Two `[BC, BO, N]` along the last dimension, `[BC, BO, 2 N]`, without leaving the registers."""
    both = tl.permute(tl.join(left, right), (0, 1, 3, 2))
    return tl.reshape(both, (left.shape[0], left.shape[1], 2 * left.shape[2]))


@triton.jit
def two_columns(words, PAIR: tl.constexpr, BITS: tl.constexpr):
    return tl.join(mantissa(words, PAIR, 0, BITS), mantissa(words, PAIR, 1, BITS))


@triton.jit
def eight_columns(words, PAIR: tl.constexpr, BITS: tl.constexpr):
    left = beside(two_columns(words, PAIR, BITS), two_columns(words, PAIR + 1, BITS))
    right = beside(two_columns(words, PAIR + 2, BITS), two_columns(words, PAIR + 3, BITS))
    return beside(left, right)


@triton.jit
def mantissas(words, FIRST: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr):
    """Columns `FIRST` to `FIRST + SPAN` of the chunks, `[BC, BO, SPAN]`, as `1 + code · 2^-BITS`; SPAN 8, 16 or 32."""
    PAIR: tl.constexpr = FIRST // 2
    columns = eight_columns(words, PAIR, BITS)
    if SPAN >= 16:
        columns = beside(columns, eight_columns(words, PAIR + 4, BITS))
    if SPAN == 32:
        last = beside(eight_columns(words, PAIR + 8, BITS), eight_columns(words, PAIR + 12, BITS))
        columns = beside(columns, last)
    return columns


@triton.jit
def spread(b_octet, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr):
    """One number per octet of rows, `[BC, BO / 8]`, given to each of its rows, `[BC, BO]`."""
    b_rows = tl.broadcast_to(b_octet[:, :, None], (BLOCK_C, BLOCK_O // 8, 8))
    return tl.reshape(b_rows, (BLOCK_C, BLOCK_O))


@triton.jit
def stream_code(
    p_stream, o_group, o_row, o_octet, m_row, m_octet, BITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr
):
    """Codes of a little-endian bit stream, `[G, ceil(O / 8) * BITS]`, as fp32 `[BC, BO]`.

    Where eight codes fit in a word a thread reads them once for all the rows that it owns.
    """
    if BITS <= 4:
        p_octet = p_stream + o_group + o_octet * BITS
        b_octet = tl.load(p_octet, mask=m_octet, other=0).to(tl.int32)  # [BC, BO / 8]
        for i in tl.static_range(1, BITS):
            b_octet |= tl.load(p_octet + i, mask=m_octet, other=0).to(tl.int32) << 8 * i
        code = spread(b_octet, BLOCK_C, BLOCK_O) >> o_row % 8 * BITS
    else:
        shift = o_row % 8 * BITS % 8
        p_byte = p_stream + o_group + (o_row // 8 * BITS + o_row % 8 * BITS // 8)
        code = tl.load(p_byte, mask=m_row, other=0).to(tl.int32) >> shift
        code |= tl.load(p_byte + 1, mask=m_row & (shift + BITS > 8), other=0).to(tl.int32) << (8 - shift)
    return (code & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def statistic(
    p_stat, o_row, o_octet, m_row, m_octet, STAT_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr
):
    """One of the four numbers of each row's group of rows, as fp32 `[BC, BO]`."""
    if STAT_ROWS % 8 == 0:
        b_octet = tl.load(p_stat + o_octet // (STAT_ROWS // 8) * 4, mask=m_octet, other=0.0)
        b_stat = spread(b_octet, BLOCK_C, BLOCK_O)
    else:
        b_stat = tl.load(p_stat + o_row // STAT_ROWS * 4, mask=m_row, other=0.0)
    return b_stat.to(tl.float32)


@triton.jit
def slope_and_offset(
    p_scale, p_zero, p_stat, o_group, m_group, i_tile, rows,
    BITS: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr, STAT_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """What turns `1 + code · 2^-BITS` into a weight: `slope` and `offset`, fp32 `[BC, BO]`, of row tile `i_tile`.

    o_group int64 `[BC, 1]`. Without statistics (STAT_ROWS 0) scales are floats and zero points codes, or all in the
    middle of the grid (ZERO_BITS 0). With them both are codes, and one row of p_stat `[G, ceil(O / STAT_ROWS), 4]`
    decodes those of STAT_ROWS rows. A kind of tensor that is not there is never read.
    """
    octets = tl.cdiv(rows, 8)
    o_row = i_tile * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    o_octet = i_tile * (BLOCK_O // 8) + tl.arange(0, BLOCK_O // 8)[None, :]
    m_row = m_group & (o_row < rows)
    m_octet = m_group & (o_octet < octets)
    if STAT_ROWS == 0:
        scale = tl.load(p_scale + o_group * rows + o_row, mask=m_row, other=0.0).to(tl.float32)
    else:
        o_scale, o_stat = o_group * (octets * SCALE_BITS), o_group * (tl.cdiv(rows, STAT_ROWS) * 4)
        scale = stream_code(p_scale, o_scale, o_row, o_octet, m_row, m_octet, SCALE_BITS, BLOCK_C, BLOCK_O)
        scale -= statistic(p_stat + o_stat + 1, o_row, o_octet, m_row, m_octet, STAT_ROWS, BLOCK_C, BLOCK_O)
        scale *= statistic(p_stat + o_stat, o_row, o_octet, m_row, m_octet, STAT_ROWS, BLOCK_C, BLOCK_O)
    if ZERO_BITS == 0:
        zero = tl.full((1, 1), 1 << (BITS - 1), tl.float32)
    else:
        o_zero = o_group * (octets * ZERO_BITS)
        zero = stream_code(p_zero, o_zero, o_row, o_octet, m_row, m_octet, ZERO_BITS, BLOCK_C, BLOCK_O)
    if STAT_ROWS > 0:
        zero -= statistic(p_stat + o_stat + 3, o_row, o_octet, m_row, m_octet, STAT_ROWS, BLOCK_C, BLOCK_O)
        zero *= statistic(p_stat + o_stat + 2, o_row, o_octet, m_row, m_octet, STAT_ROWS, BLOCK_C, BLOCK_O)
    return scale * (1 << BITS), -scale * (zero + (1 << BITS))
