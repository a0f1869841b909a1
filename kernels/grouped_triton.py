"""The Triton twin of kernels/grouped.py."""

from __future__ import annotations

from torch import Tensor

from .launch_triton import packed_product, refuses

__all__ = ["grouped", "refuses"]


def grouped(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int) -> Tensor:
    """As the reference; for 2 or more rows of float16 or bfloat16 the weight is rounded to that type first."""
    rows = codes.shape[-1]
    y = packed_product(
        x.reshape(-1, x.shape[-1]), None, [codes], [scale], [] if zero is None else [zero], [], [], [], [], [],
        bits, group_size, 0, 0 if zero is None else bits, 0,
    )  # fmt: skip
    return y.view(*x.shape[:-1], rows)
