"""The Triton twin of kernels/grouped_experts.py: one launch over the experts that have rows."""

from __future__ import annotations

from torch import Tensor

from .launch_triton import packed_product, refuses

__all__ = ["grouped_experts", "refuses"]


def grouped_experts(
    x: Tensor, ends: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """As the reference, without waiting for `ends`; rounding as in kernels/grouped_triton.py."""
    y = packed_product(
        x, ends, [codes], [scale], [] if zero is None else [zero], [], [], [], [], [],
        bits, group_size, 0, 0 if zero is None else bits, 0,
    )  # fmt: skip
    return y.view(x.shape[0], codes.shape[-1])
