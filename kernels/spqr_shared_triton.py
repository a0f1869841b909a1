"""The Triton twin of kernels/spqr_shared.py: all weights in one launch."""

from __future__ import annotations

from torch import Tensor

from .launch_triton import packed_product, refuses, separate

__all__ = ["refuses", "spqr_shared"]


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
    """As the reference; rounding as in kernels/spqr_triton.py."""
    y = packed_product(
        x.reshape(-1, x.shape[-1]), None, codes, scale, zero, stat, perm or [],
        outlier_count, outlier_column, outlier_value,
        bits, group_size, scale_bits, zero_bits, stat_group_size,
    )  # fmt: skip
    return separate(y, x, codes)
