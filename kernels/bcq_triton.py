"""The Triton twin of kernels/bcq.py: bit planes become weights, or signs of `x`, in registers.

For a single row of `x` no weight is formed: of each plane the sum of plus or minus `x` over a group is taken, then
multiplied by the plane's scale, and the offset by the sum of `x` itself (`vector_kernel`). For more rows a tile of the
weight is summed up plane by plane and multiplied on the tensor cores (`tile_kernel`). Columns are split among programs,
and the parts summed in a fixed order, as kernels/launch_triton.py does.
"""

# Triton's own types know nothing of constexpr arguments, launches and tuples:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .decode_triton import load_words
from .launch_triton import DTYPES, SINGLE_GROUP, TOKENS_AT_ONCE, split_columns
from .launch_triton import refuses as _refuses
from .packing import CHUNK
from .product_triton import finish_kernel

FREE, CODES, EVEN = 0, 1, 2  # what is stored of a group, see formats/bcq.py


@triton.jit
def offset_of(p_scale, p_offset, p_stat, o_group, o_row, m_group, rows, KIND: tl.constexpr):
    """The offset of each group and row, fp32, of the shape that o_group and o_row have together."""
    offset = tl.load(p_offset + o_group * rows + o_row, mask=m_group, other=0).to(tl.float32)
    if KIND == 1:
        offset = (offset - 128.0) * tl.load(p_stat + rows + o_row, mask=o_row < rows, other=0.0).to(tl.float32)
    if KIND == 2:
        offset *= tl.load(p_scale + o_group * rows + o_row, mask=m_group, other=0.0).to(tl.float32)
    return offset


@triton.jit
def scale_of(
    p_scale, p_stat, o_group, o_row, m_group, rows, I_PLANE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr
):
    """The scale of plane `I_PLANE` of each group and row, fp32."""
    if KIND == 2:
        STEPS: tl.constexpr = 2.0 ** (BITS - 2 - I_PLANE)
        scale = tl.load(p_scale + o_group * rows + o_row, mask=m_group, other=0.0).to(tl.float32) * STEPS
    else:
        scale = tl.load(p_scale + (o_group * BITS + I_PLANE) * rows + o_row, mask=m_group, other=0).to(tl.float32)
    if KIND == 1:
        scale *= tl.load(p_stat + o_row, mask=o_row < rows, other=0.0).to(tl.float32)
    return scale


@triton.jit
def load_inputs(p_x, first, columns, FIRST: tl.constexpr, SPAN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Columns `FIRST` to `FIRST + SPAN` of each chunk of `x`, a tuple of fp32 `[BC]`."""
    o_column = (first + tl.arange(0, BLOCK_C)) * 32 + FIRST  # [BC]
    inputs = (tl.load(p_x + o_column, mask=o_column < columns, other=0.0).to(tl.float32),)
    for k in tl.static_range(1, SPAN):
        b_x = tl.load(p_x + o_column + k, mask=o_column + k < columns, other=0.0).to(tl.float32)
        inputs = inputs + (b_x,)  # noqa: RUF005 - a Triton tuple
    return inputs


@triton.jit(do_not_specialize=["tokens", "steps"])
def vector_kernel(
    x, out, codes, scale, offset, stat, rows, tokens, columns, groups, steps,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr, KIND: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of `x` against `BLOCK_O` rows of the weight, over `steps` times `BLOCK_C` chunks of columns."""
    i_token, i_split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    chunks = tl.cdiv(columns, 32)
    o_row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]  # [1, BO]
    b_sum = tl.zeros((BLOCK_C, BLOCK_O), tl.float32)
    begin = i_split * steps * BLOCK_C
    for first in range(begin, tl.minimum(begin + steps * BLOCK_C, chunks), BLOCK_C):
        o_chunk = first + tl.arange(0, BLOCK_C)[:, None]  # [BC, 1]
        m_tile = (o_chunk < chunks) & (o_row < rows)  # [BC, BO]
        words = load_words(codes + o_chunk.to(tl.int64) * BITS * rows + o_row, rows, m_tile, BITS)
        for i in tl.static_range(0, 32, SPAN):
            inputs = load_inputs(x + i_token * columns, first, columns, i, SPAN, BLOCK_C)
            o_group = ((o_chunk * 32 + i) // GROUP_SIZE).to(tl.int64)
            m_group = m_tile & (o_group < groups)
            b_x_sum = inputs[0]
            for k in tl.static_range(1, SPAN):
                b_x_sum += inputs[k]
            b_sum += offset_of(scale, offset, stat, o_group, o_row, m_group, rows, KIND) * b_x_sum[:, None]
            for b in tl.static_range(BITS):
                b_dot = tl.zeros((BLOCK_C, BLOCK_O), tl.float32)
                for k in tl.static_range(SPAN):
                    sign = (~words[b] << (31 - i - k)) & -2147483648  # of a bit that is not set
                    b_dot += (inputs[k].to(tl.int32, bitcast=True)[:, None] ^ sign).to(tl.float32, bitcast=True)
                b_sum += scale_of(scale, stat, o_group, o_row, m_group, rows, b, BITS, KIND) * b_dot
    o_out = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    p_out = out + (i_split * tokens + i_token) * rows + o_out
    tl.store(p_out, tl.sum(b_sum, axis=0), mask=o_out < rows)


@triton.jit(do_not_specialize=["tokens", "steps"])
def tile_kernel(
    x, out, codes, scale, offset, stat, rows, tokens, columns, groups, steps,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr, KIND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BLOCK_T` rows of `x` against `BLOCK_O` rows of the weight, over `steps` times `BLOCK_C` chunks of columns."""
    i_split = tl.program_id(2)
    chunks = tl.cdiv(columns, 32)
    o_token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_row = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_bit = tl.arange(0, 32)[None, None, :]
    p_x = x + o_token[None, :] * columns  # [1, BT]
    b_sum = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    begin = i_split * steps * BLOCK_C
    for first in range(begin, tl.minimum(begin + steps * BLOCK_C, chunks), BLOCK_C):
        o_chunk = first + tl.arange(0, BLOCK_C)[:, None]  # [BC, 1]
        m_tile = (o_chunk < chunks) & (o_row < rows)[None, :]  # [BC, BO]
        words = load_words(codes + o_chunk.to(tl.int64) * BITS * rows + o_row[None, :], rows, m_tile, BITS)
        o_first = o_chunk[:, :, None] * 32
        if SPAN < 32:
            o_first = o_first + o_bit
        o_group = (o_first // GROUP_SIZE).to(tl.int64)  # [BC, 1, 1 or 32]
        o_row3 = o_row[None, :, None]
        m_group = m_tile[:, :, None] & (o_group < groups)
        b_w = offset_of(scale, offset, stat, o_group, o_row3, m_group, rows, KIND)
        b_w = tl.broadcast_to(b_w, (BLOCK_C, BLOCK_O, 32))
        for b in tl.static_range(BITS):
            b_scale = scale_of(scale, stat, o_group, o_row3, m_group, rows, b, BITS, KIND)
            b_w += tl.where((words[b][:, :, None] >> o_bit) & 1 != 0, b_scale, -b_scale)
        b_w = tl.reshape(tl.permute(b_w, (1, 0, 2)), (BLOCK_O, BLOCK_C * 32)).to(DTYPE)
        o_column = first * 32 + tl.arange(0, BLOCK_C * 32)[:, None]
        b_x = tl.load(p_x + o_column, mask=(o_token < tokens)[None, :] & (o_column < columns), other=0.0)
        b_sum = tl.dot(b_w, b_x.to(DTYPE), b_sum, input_precision=PRECISION)  # [BO, BT]
    p_out = out + tl.cast(tokens, tl.int64) * rows * i_split + o_token[None, :] * rows + o_row[:, None]
    tl.store(p_out, b_sum, mask=(o_row < rows)[:, None] & (o_token < tokens)[None, :])


@torch.library.custom_op("acc::bcq_product", mutates_args=())
def bcq_product(
    x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, stat: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """`x [T, I]` -> `[T, O]`, operands as in kernels/bcq.py."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the Triton kernels take float16, bfloat16 and float32")
    out = x.new_empty(x.shape[0], codes.shape[-1])
    with torch.cuda.device_of(x):
        if out.numel():
            for part, written in zip(x.split(TOKENS_AT_ONCE), out.split(TOKENS_AT_ONCE)):
                _launch(part.contiguous(), written, codes, scale, offset, stat, bits, group_size)
    return out


@bcq_product.register_fake
def _(x, codes, *_):
    return x.new_empty(x.shape[0], codes.shape[-1])


def _launch(
    x: Tensor,
    out: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    stat: Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    """Writes `out` for contiguous `x [T, I]`, neither of them empty."""
    (tokens, columns), rows, groups = x.shape, codes.shape[-1], offset.shape[0]
    span = CHUNK if groups == 1 else gcd(group_size, CHUNK)
    tile = _tile(x, tokens, (scale if stat is None else stat).dtype, bits)
    row_tiles = -(-rows // tile["BLOCK_O"])
    token_tiles = 1 if tokens == 1 else -(-tokens // tile["BLOCK_T"])
    steps, splits = split_columns(-(-columns // (CHUNK * tile["BLOCK_C"])), row_tiles * token_tiles, x.device)
    parts = out if splits == 1 else x.new_empty(splits * out.numel(), dtype=torch.float32)
    arguments = {
        "x": x, "out": parts, "codes": codes, "scale": scale, "offset": offset, "stat": scale if stat is None else stat,
        "rows": rows, "tokens": tokens, "columns": columns, "groups": groups, "steps": steps, "BITS": bits,
        "GROUP_SIZE": SINGLE_GROUP if groups == 1 else group_size, "SPAN": span,
        "KIND": CODES if stat is not None else EVEN if scale.dim() == 2 else FREE, **tile,
    }  # fmt: skip
    if tokens == 1:
        vector_kernel[row_tiles, 1, splits](**arguments)
    else:
        tile_kernel[token_tiles, row_tiles, splits](**arguments)
    if splits > 1:
        block_t, block_o = min(tokens, 4), 32
        block_t = 1 if block_t == 1 else 4
        finish_kernel[-(-tokens // block_t), -(-rows // block_o)](
            x=x, parts=parts, out=out, ends=None, perm=None, count=None, start=None, column=None, value=None,
            rows=(rows,), tokens=tokens, columns=columns, x_stride=0, M=1, E=0, BLOCK_E=1, SPLITS=splits,
            OUTLIER_BLOCK=256, BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_B=1, BLOCK_N=4,
        )  # fmt: skip


def _tile(x: Tensor, tokens: int, stored: torch.dtype, bits: int) -> dict[str, Any]:
    """How much of the problem a program takes."""
    if tokens == 1:
        return {"BLOCK_O": 64, "BLOCK_C": 8 if bits <= 4 else 4, "num_warps": 4}
    dtype, precision = x.dtype, "ieee"
    if x.dtype == torch.float16 and stored == torch.bfloat16:  # its weights may be too large, or too small, for float16
        dtype, precision = torch.float32, "tf32"  # in which x is exact
    block_t = min(max(triton.next_power_of_2(tokens), 16), 32 if dtype == torch.float32 else 128)
    tile = {"BLOCK_T": block_t, "BLOCK_O": 64, "BLOCK_C": 1 if dtype == torch.float32 else 2, "num_warps": 4}
    if knobs.runtime.interpret:
        dtype = torch.float32  # the interpreter takes the bits of bfloat16 for integers in a dot product
    return tile | {"DTYPE": DTYPES[dtype], "PRECISION": precision}


def bcq(
    x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, stat: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """As the reference; for 2 or more rows of float16 or bfloat16 the weight is rounded to that type first."""
    y = bcq_product(x.reshape(-1, x.shape[-1]), codes, scale, offset, stat, bits, group_size)
    return y.view(*x.shape[:-1], codes.shape[-1])


def refuses(device: str, **problem: Any) -> str | None:
    """Why this kernel cannot run on tensors of a device type; None when it can. Any number of planes will do."""
    return _refuses(device)
