"""The Triton twin of kernels/spqr.py."""

from __future__ import annotations

from torch import Tensor

from .launch_triton import packed_product, refuses

__all__ = ["refuses", "spqr"]


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
    """As the reference; for 2 or more rows of float16 or bfloat16 the weight is rounded to that type first."""
    y = packed_product(
        x.reshape(-1, x.shape[-1]), None, [codes], [scale], [zero], [stat], [] if perm is None else [perm],
        [outlier_count], [outlier_column], [outlier_value],
        bits, group_size, scale_bits, zero_bits, stat_group_size,
    )  # fmt: skip
    return y.view(*x.shape[:-1], codes.shape[-1])
