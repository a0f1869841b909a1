"""`x Wᵀ` for a SpQR weight: codes in small groups, whose scales and zeros are codes too, plus sparse corrections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import unpack, unpack_stream

OUTLIER_BLOCK = 256  # columns whose outliers are counted together, so that a column index is one byte


def spqr(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    stat: Tensor,
    perm: Tensor | None,
    outlier_count: Tensor,
    outlier_column: Tensor,
    outlier_value: Tensor,
    *,
    bits: int,
    group_size: int,
    scale_bits: int,
    zero_bits: int,
    stat_group_size: int,
) -> Tensor:
    """`x [..., I]` -> `x Wᵀ [..., O]` in `x.dtype`, summed in fp32. The weight's tensors, `R = stat_group_size`:

    codes int32 `[ceil(I / 32), bits, O]`, scale uint8 `[G, ceil(O / 8) * scale_bits]`, zero uint8 `[G, ceil(O / 8) *
    zero_bits]`, stat float `[G, ceil(O / R), 4]`, perm `[I]` or None (packed column j is input perm[j]), outlier_count
    uint8 `[ceil(I / 256), O]`, outlier_column uint8 `[N]`, outlier_value float `[N]`.
    """
    weight = spqr_weight(
        codes, scale, zero, stat, outlier_count, outlier_column, outlier_value, bits=bits, group_size=group_size,
        scale_bits=scale_bits, zero_bits=zero_bits, stat_group_size=stat_group_size, columns=x.shape[-1],
    )  # fmt: skip
    x = x if perm is None else x[..., perm.long()]
    return F.linear(x.float(), weight).to(x.dtype)


def spqr_weight(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    stat: Tensor,
    outlier_count: Tensor,
    outlier_column: Tensor,
    outlier_value: Tensor,
    *,
    bits: int,
    group_size: int,
    scale_bits: int,
    zero_bits: int,
    stat_group_size: int,
    columns: int,
) -> Tensor:
    """`W [O, I] = scale · (code - zero) + outlier` in fp32, columns in packed order, a view contiguous by column."""
    rows = codes.shape[-1]
    scale = statistic(unpack_stream(scale, scale_bits, rows), stat[..., 0], stat[..., 1], stat_group_size)
    zero = statistic(unpack_stream(zero, zero_bits, rows), stat[..., 2], stat[..., 3], stat_group_size)
    weight = unpack(codes, bits, columns).T.float()  # [I, O]
    weight -= zero.repeat_interleave(group_size, 0)[:columns]
    weight *= scale.repeat_interleave(group_size, 0)[:columns]
    row, column = outlier_position(outlier_count, outlier_column, columns)
    weight[column, row] += outlier_value.float()
    return weight.T


def statistic(codes: Tensor, scale: Tensor, zero: Tensor, stat_group_size: int) -> Tensor:
    """Codes `[..., O]`, scale and zero `[..., ceil(O / R)]` -> `scale · (code - zero)` in fp32, `[..., O]`."""
    rows = codes.shape[-1]
    scale = scale.float().repeat_interleave(stat_group_size, -1)[..., :rows]
    zero = zero.float().repeat_interleave(stat_group_size, -1)[..., :rows]
    return scale * (codes.float() - zero)


def outlier_position(outlier_count: Tensor, outlier_column: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Row and packed column, int64 `[N]` each, of the outliers: they lie sorted by block of columns, row and column."""
    blocks, rows = outlier_count.shape
    segment = torch.arange(blocks * rows, device=outlier_count.device)
    segment = torch.repeat_interleave(segment, outliers_per_row(outlier_count, columns).flatten())
    return segment % rows, segment // rows * OUTLIER_BLOCK + outlier_column.long()


def outliers_per_row(outlier_count: Tensor, columns: int) -> Tensor:
    """uint8 `[ceil(I / 256), O]` -> how many outliers lie in each block of each row, int64.

    255 stands for every column of the block: a row that has 255 outliers among 256 columns stores a zero beside them.
    """
    width = columns - OUTLIER_BLOCK * torch.arange(outlier_count.shape[0], device=outlier_count.device)[:, None]
    return torch.where(outlier_count == 255, width.clamp(max=OUTLIER_BLOCK), outlier_count)
