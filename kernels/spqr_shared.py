"""`x Wᵀ` for several SpQR weights that share an input, as q, k and v or gate and up do."""

from __future__ import annotations

from torch import Tensor

from .spqr import spqr


def spqr_shared(
    x: Tensor,
    codes: list[Tensor],
    scale: list[Tensor],
    zero: list[Tensor],
    stat: list[Tensor],
    perm: list[Tensor] | None,
    outlier_count: list[Tensor],
    outlier_column: list[Tensor],
    outlier_value: list[Tensor],
    *,
    bits: int,
    group_size: int,
    scale_bits: int,
    zero_bits: int,
    stat_group_size: int,
) -> list[Tensor]:
    """`x [..., I]` -> one product `[..., O]` per weight. Operands as `spqr` takes them, a list per kind.

    The weights have `I` and all numbers in common, and all or none have a permutation.
    """
    kinds = (codes, scale, zero, stat, perm or [None] * len(codes), outlier_count, outlier_column, outlier_value)
    return [
        spqr(
            x, *weight, bits=bits, group_size=group_size, scale_bits=scale_bits, zero_bits=zero_bits,
            stat_group_size=stat_group_size,
        )
        for weight in zip(*kinds, strict=True)
    ]  # fmt: skip
