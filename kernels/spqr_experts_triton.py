"""The Triton twin of kernels/spqr_experts.py: one launch over the experts that have rows."""

from __future__ import annotations

from torch import Tensor

from .launch_triton import packed_product, refuses

__all__ = ["refuses", "spqr_experts"]


def spqr_experts(
    x: Tensor,
    ends: Tensor,
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
    """As the reference, without waiting for `ends`; rounding as in kernels/spqr_triton.py."""
    y = packed_product(
        x, ends, [codes], [scale], [zero], [stat], [] if perm is None else [perm],
        [outlier_count], [outlier_column], [outlier_value],
        bits, group_size, scale_bits, zero_bits, stat_group_size,
    )  # fmt: skip
    return y.view(x.shape[0], codes.shape[-1])
