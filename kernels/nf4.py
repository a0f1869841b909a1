"""`x Wᵀ` for a weight of 4-bit codes of quantiles of a normal distribution, with scales by block (arXiv 2305.14314)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # weights that share a scale, in the order of rows; a block may end in the next row
NESTED = 256  # scales that share a scale of their own

# Appendix E of the paper; the same numbers as bitsandbytes', to the last bit of float32
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4(
    x: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, *, rows: int
) -> Tensor:
    """`x [..., I]` -> `x Wᵀ [..., O]` in `x.dtype`, summed in fp32.

    codes uint8 `[ceil(O · I / 2)]`, the first of two in the high half; absmax float `[B]`, `B = ceil(O · I / 64)`; or
    absmax uint8 `[B]` with nested_absmax float `[ceil(B / 256)]` and offset float `[1]`.
    """
    weight = nf4_weight(codes, absmax, nested_absmax, offset, rows=rows, columns=x.shape[-1])
    return F.linear(x.float(), weight).to(x.dtype)


def nf4_weight(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, *, rows: int, columns: int
) -> Tensor:
    """`W [O, I] = level[code] · absmax` in fp32."""
    code = torch.stack([codes >> 4, codes & 15], 1).flatten()[: rows * columns]
    scale = block_scales(absmax, nested_absmax, offset).repeat_interleave(BLOCK)[: rows * columns]
    return (levels(codes.device)[code.int()] * scale).view(rows, columns)


def block_scales(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """A scale for each block, fp32 `[B]`: as stored, or `map[code] · nested_absmax + offset`."""
    if nested_absmax is None or offset is None:
        return absmax
    shared = nested_absmax.repeat_interleave(NESTED)[: len(absmax)]
    return dynamic_map(absmax.device)[absmax.int()] * shared + offset


def levels(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values of a code, ascending, fp32."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of a scale's code, ascending, fp32: 8-bit dynamic tree quantisation (arXiv 2110.02861).

    Of both signs, for each power of ten from 1e-6 to 1, twice as many values as for the one before: the middles of so
    many equal parts of 0.1 to 1, times the power; and 0 and 1.
    """
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, (1 << power) + 1)
        middles = (10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-middle for middle in middles]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
