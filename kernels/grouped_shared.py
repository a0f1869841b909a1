"""`x Wᵀ` for several weights of grouped integers that share an input, as q, k and v or gate and up do."""

from __future__ import annotations

from torch import Tensor

from .grouped import grouped


def grouped_shared(
    x: Tensor, codes: list[Tensor], scale: list[Tensor], zero: list[Tensor] | None, *, bits: int, group_size: int
) -> list[Tensor]:
    """`x [..., I]` -> one product `[..., O]` per weight. Operands as `grouped` takes them, a list per kind.

    The weights have `I`, bits and group size in common, and all or none have zero points.
    """
    zeros = zero or [None] * len(codes)
    return [grouped(x, *weight, bits=bits, group_size=group_size) for weight in zip(codes, scale, zeros, strict=True)]
