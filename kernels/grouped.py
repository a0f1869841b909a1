"""`x Wᵀ` for a weight of integer codes with one scale, and one integer zero point, per group of inputs of a row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .packing import unpack, unpack_stream


def grouped(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int) -> Tensor:
    """`x [..., I]` -> `x Wᵀ [..., O]` in `x.dtype`, summed in fp32.

    codes int32 `[ceil(I / 32), bits, O]`, scale float `[G, O]`, zero uint8 `[G, ceil(O / 8) * bits]` or None for a
    symmetric grid, whose zero point is in the middle.
    """
    columns = x.shape[-1]
    weight = grouped_weight(codes, scale, zero, bits=bits, group_size=group_size, columns=columns)
    return F.linear(x.float(), weight).to(x.dtype)


def grouped_weight(
    codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int, columns: int
) -> Tensor:
    """`W [O, I] = scale · (code - zero)` in fp32, a view that is contiguous by column."""
    rows = codes.shape[-1]
    code = unpack(codes, bits, columns).T.float()  # [I, O]
    if zero is None:
        code -= 1 << bits - 1
    else:
        code -= unpack_stream(zero, bits, rows).float().repeat_interleave(group_size, 0)[:columns]
    return code.mul_(scale.float().repeat_interleave(group_size, 0)[:columns]).T
