"""The Triton twin of kernels/attention_streaming.py: per tile of rows the sinks, then the window."""

# Triton's own types know nothing of constexpr arguments, launches and tuples:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile_triton import LOG2_E, attend, begin, check, finish, refuses, sizes, strided

__all__ = ["attention_streaming", "refuses"]


@triton.jit
def walk(
    b_q, b_max, b_sum, b_acc, p_k, p_v, stride_k, stride_v, start, stop, o_position, sink, recent, S, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from `start` to before `stop`; unless `MASKED`, every row sees all of them."""
    o_n = tl.arange(0, BLOCK_N)
    for first in range(start, stop, BLOCK_N):
        o_key = first + o_n
        m_key = o_key < tl.minimum(stop, S)
        o_distance = o_position[:, None] - o_key[None, :]  # [BM, BN]
        m_pair = (o_distance >= 0) & ((o_distance < recent) | (o_key < sink)[None, :]) & m_key[None, :]
        p_k_tile = p_k + tl.cast(first, tl.int64) * stride_k + o_n[:, None] * stride_k
        p_v_tile = p_v + tl.cast(first, tl.int64) * stride_v + o_n[:, None] * stride_v
        b_max, b_sum, b_acc = attend(
            b_q, b_max, b_sum, b_acc, p_k_tile, p_v_tile, m_key, m_pair, scale,
            D, DV, BLOCK_D, BLOCK_V, DTYPE, PRECISION, MASKED,
        )  # fmt: skip
    return b_max, b_sum, b_acc


@triton.jit(do_not_specialize=["T", "S"])
def streaming_kernel(
    q, k, v, out, sinks, recents, T, S, scale,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BLOCK_M` rows of one head of one sequence."""
    first_row = tl.program_id(0) * BLOCK_M
    i_key_head = tl.program_id(1) // GROUP
    sink, recent = tl.load(sinks + i_key_head), tl.minimum(tl.load(recents + i_key_head), S)
    o_position, b_q, p_k, p_v, b_max, b_sum, b_acc = begin(
        q, k, v, T, S, first_row, stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_vb, stride_vh,
        GROUP, D, BLOCK_D, BLOCK_V, BLOCK_M, DTYPE,
    )  # fmt: skip
    # in whole tiles: [left, inside) some rows see in part, [inside, diagonal) all rows see, [diagonal, last] again not
    position = S - T + first_row
    last = tl.minimum(position + BLOCK_M, S)
    left = tl.maximum(position - recent + 1, 0) // BLOCK_N * BLOCK_N
    diagonal = tl.maximum((position + 1) // BLOCK_N * BLOCK_N, left)
    inside = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(last - recent, 0), BLOCK_N) * BLOCK_N, left), diagonal)
    b_max, b_sum, b_acc = walk(
        b_q, b_max, b_sum, b_acc, p_k, p_v, stride_k, stride_v, 0, tl.minimum(sink, left), o_position, sink, recent, S,
        scale, D, DV, BLOCK_D, BLOCK_V, BLOCK_N, DTYPE, PRECISION, True,
    )  # fmt: skip
    b_max, b_sum, b_acc = walk(
        b_q, b_max, b_sum, b_acc, p_k, p_v, stride_k, stride_v, left, inside, o_position, sink, recent, S,
        scale, D, DV, BLOCK_D, BLOCK_V, BLOCK_N, DTYPE, PRECISION, True,
    )  # fmt: skip
    b_max, b_sum, b_acc = walk(
        b_q, b_max, b_sum, b_acc, p_k, p_v, stride_k, stride_v, inside, diagonal, o_position, sink, recent, S,
        scale, D, DV, BLOCK_D, BLOCK_V, BLOCK_N, DTYPE, PRECISION, False,
    )  # fmt: skip
    b_max, b_sum, b_acc = walk(
        b_q, b_max, b_sum, b_acc, p_k, p_v, stride_k, stride_v, diagonal, last, o_position, sink, recent, S,
        scale, D, DV, BLOCK_D, BLOCK_V, BLOCK_N, DTYPE, PRECISION, True,
    )  # fmt: skip
    finish(out, b_sum, b_acc, T, first_row, DV, BLOCK_V, BLOCK_M)


@torch.library.custom_op("acc::attention_streaming", mutates_args=())
def streaming(query: Tensor, key: Tensor, value: Tensor, sink: Tensor, recent: Tensor, scaling: float) -> Tensor:
    """As `attention_streaming`; sink and recent are not checked, for that would wait for the GPU."""
    check("attention_streaming", query, key, value)
    batch, heads, rows, _ = query.shape
    out = query.new_empty(batch, heads, rows, value.shape[-1])
    tensors, steps = strided(query, key, value)
    tile = sizes(query, value, most_rows=128)
    if out.numel():
        with torch.cuda.device_of(query):
            streaming_kernel[(-(-rows // tile["BLOCK_M"]), heads, batch)](
                **tensors, out=out, sinks=sink.int().contiguous(), recents=recent.int().contiguous(),
                T=rows, S=key.shape[2], scale=scaling * LOG2_E, GROUP=heads // key.shape[1], **steps, **tile,
            )  # fmt: skip
    return out


@streaming.register_fake
def _(query, key, value, *_):
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def attention_streaming(
    query: Tensor, key: Tensor, value: Tensor, sink: Tensor, recent: Tensor, *, scaling: float
) -> Tensor:
    """As the reference; probabilities of float16 and bfloat16 are rounded to that type before they meet the values.

    A `recent` below 1 is not looked for on the GPU: the rows of such a head become NaN unless they see a sink.
    """
    return streaming(query, key, value, sink, recent, scaling)
