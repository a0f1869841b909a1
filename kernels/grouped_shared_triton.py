"""The Triton twin of kernels/grouped_shared.py: all weights in one launch."""

from __future__ import annotations

from torch import Tensor

from .launch_triton import packed_product, refuses, separate

__all__ = ["grouped_shared", "refuses"]


def grouped_shared(
    x: Tensor, codes: list[Tensor], scale: list[Tensor], zero: list[Tensor] | None, *, bits: int, group_size: int
) -> list[Tensor]:
    """As the reference; rounding as in kernels/grouped_triton.py."""
    y = packed_product(
        x.reshape(-1, x.shape[-1]), None, codes, scale, zero or [], [], [], [], [], [],
        bits, group_size, 0, bits if zero else 0, 0,
    )  # fmt: skip
    return separate(y, x, codes)
