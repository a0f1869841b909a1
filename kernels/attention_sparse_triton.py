"""The Triton twin of kernels/attention_sparse.py: first the ranges, then the gathered columns."""

# Triton's own types know nothing of constexpr arguments, launches and tuples:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_sparse import BLOCK
from .attention_tile_triton import LOG2_E, attend, begin, check, finish, refuses, sizes, strided

__all__ = ["attention_sparse", "refuses"]


@triton.jit
def walk_ranges(
    b_q, b_max, b_sum, b_acc, p_k, p_v, stride_k, stride_v, p_offset, start, stop, o_position, S, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    RANGE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The ranges from number `start` to before `stop`; unless `MASKED`, every row sees all of them."""
    o_n = tl.arange(0, BLOCK_N)
    STEPS: tl.constexpr = RANGE // BLOCK_N
    for i in range(start * STEPS, stop * STEPS):
        first = tl.load(p_offset + i // STEPS) + i % STEPS * BLOCK_N
        o_key = first + o_n
        m_key = (o_key >= 0) & (o_key < S)
        m_pair = (o_key[None, :] <= o_position[:, None]) & m_key[None, :]  # [BM, BN]
        p_k_tile = p_k + tl.cast(first, tl.int64) * stride_k + o_n[:, None] * stride_k
        p_v_tile = p_v + tl.cast(first, tl.int64) * stride_v + o_n[:, None] * stride_v
        b_max, b_sum, b_acc = attend(
            b_q, b_max, b_sum, b_acc, p_k_tile, p_v_tile, m_key, m_pair, scale,
            D, DV, BLOCK_D, BLOCK_V, DTYPE, PRECISION, MASKED,
        )  # fmt: skip
    return b_max, b_sum, b_acc


@triton.jit(do_not_specialize=["T", "S", "R"])
def sparse_kernel(
    q, k, v, out, block_count, block_offset, column_count, column_index, T, S, R, NB, NC, scale,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    RANGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BLOCK_M` of the `RANGE` rows that share an index, of one head of one sequence."""
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last rows, which have most to do, first
    o_position, b_q, p_k, p_v, b_max, b_sum, b_acc = begin(
        q, k, v, T, S, first_row, stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_vb, stride_vh,
        GROUP, D, BLOCK_D, BLOCK_V, BLOCK_M, DTYPE,
    )  # fmt: skip
    i_head, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_index = (i_batch * tl.num_programs(1) + i_head) * R + first_row // RANGE
    ranges = tl.load(block_count + i_index)
    p_offset = block_offset + i_index * NB
    # offsets ascend: at most the first range begins before key 0, at most the last two reach past the first row
    inside = tl.minimum(ranges, 1)
    diagonal = tl.maximum(ranges - 2, inside)
    b_max, b_sum, b_acc = walk_ranges(
        b_q, b_max, b_sum, b_acc, p_k, p_v, stride_k, stride_v, p_offset, 0, inside, o_position, S, scale,
        D, DV, BLOCK_D, BLOCK_V, BLOCK_N, RANGE, DTYPE, PRECISION, True,
    )  # fmt: skip
    b_max, b_sum, b_acc = walk_ranges(
        b_q, b_max, b_sum, b_acc, p_k, p_v, stride_k, stride_v, p_offset, inside, diagonal, o_position, S, scale,
        D, DV, BLOCK_D, BLOCK_V, BLOCK_N, RANGE, DTYPE, PRECISION, False,
    )  # fmt: skip
    b_max, b_sum, b_acc = walk_ranges(
        b_q, b_max, b_sum, b_acc, p_k, p_v, stride_k, stride_v, p_offset, diagonal, ranges, o_position, S, scale,
        D, DV, BLOCK_D, BLOCK_V, BLOCK_N, RANGE, DTYPE, PRECISION, True,
    )  # fmt: skip
    columns = tl.load(column_count + i_index)
    p_column = column_index + i_index * NC
    o_n = tl.arange(0, BLOCK_N)
    for first in range(0, columns, BLOCK_N):
        m_key = first + o_n < columns
        o_key = tl.load(p_column + first + o_n, mask=m_key, other=0)
        m_pair = (o_key[None, :] <= o_position[:, None]) & m_key[None, :]
        o_key = o_key.to(tl.int64)[:, None]
        b_max, b_sum, b_acc = attend(
            b_q, b_max, b_sum, b_acc, p_k + o_key * stride_k, p_v + o_key * stride_v, m_key, m_pair, scale,
            D, DV, BLOCK_D, BLOCK_V, DTYPE, PRECISION, True,
        )  # fmt: skip
    finish(out, b_sum, b_acc, T, first_row, DV, BLOCK_V, BLOCK_M)


@torch.library.custom_op("acc::attention_sparse", mutates_args=())
def sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_count: Tensor,
    block_offset: Tensor,
    column_count: Tensor,
    column_index: Tensor,
    scaling: float,
) -> Tensor:
    """As `attention_sparse`."""
    check("attention_sparse", query, key, value)
    batch, heads, rows, _ = query.shape
    blocks = -(-rows // BLOCK)
    index = {
        "block_count": block_count, "block_offset": block_offset,
        "column_count": column_count, "column_index": column_index,
    }  # fmt: skip
    for name, tensor in index.items():
        if tensor.dtype != torch.int32 or tensor.shape[:3] != (batch, heads, blocks):
            raise ValueError(
                f"attention_sparse: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected int32"
                f" [{batch}, {heads}, {blocks}, ...]; build the index for these shapes"
            )
        index[name] = tensor.contiguous()
    out = query.new_empty(batch, heads, rows, value.shape[-1])
    tensors, steps = strided(query, key, value)
    tile = sizes(query, value, most_rows=BLOCK)
    if out.numel():
        with torch.cuda.device_of(query):
            sparse_kernel[(-(-rows // tile["BLOCK_M"]), heads, batch)](
                **tensors, out=out, **index, T=rows, S=key.shape[2], R=blocks, NB=block_offset.shape[-1],
                NC=column_index.shape[-1], scale=scaling * LOG2_E, GROUP=heads // key.shape[1], RANGE=BLOCK,
                **steps, **tile,
            )  # fmt: skip
    return out


@sparse.register_fake
def _(query, key, value, *_):
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def attention_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_count: Tensor,
    block_offset: Tensor,
    column_count: Tensor,
    column_index: Tensor,
    *,
    scaling: float,
) -> Tensor:
    """As the reference; probabilities of float16 and bfloat16 are rounded to that type before they meet the values."""
    return sparse(query, key, value, block_count, block_offset, column_count, column_index, scaling)
