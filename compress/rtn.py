"""Round to nearest: every group of weights on its own evenly spaced grid. Needs no data; the yardstick for the rest."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..formats.grouped import GroupedWeight
from .base import Event, Method


class Rtn(Method):
    """Rounds each weight to the nearest point of its group's grid.

    A group of neighbouring inputs of one row gets `2^bits` evenly spaced values between its least and its greatest weight, zero
    among them, so that a zero weight stays zero. Nothing is known of the inputs, so nothing is made up for: what a
    better method gains over this one is what its calibration is worth.

    Limits: below 4 bits the error of many models is no longer small.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    format: ClassVar[str] = "grouped"

    bits: int = Field(4, ge=2, le=8, description="bits per code")
    group_size: Literal[-1, 8, 16, 32, 64, 128] = Field(128, description="inputs that share a scale; -1: a whole row")
    symmetric: bool = Field(False, description="grid symmetric around zero, no zero point stored")

    def compress(self, weight: Tensor, prepared: Any, event: Event) -> GroupedWeight:
        groups = group(weight, weight.shape[1] if self.group_size == -1 else self.group_size)
        scale, zero = grid(groups, self.bits, self.symmetric)
        stored = scale_dtype(scale)
        if stored != torch.float16:
            event("scale_dtype", dtype=str(stored).removeprefix("torch."), largest_scale=float(scale.max()))
        scale = scale.to(stored)
        codes = nearest(groups, scale.float(), zero, self.bits)
        return GroupedWeight.encode(
            codes.flatten(1)[:, : weight.shape[1]],
            scale.T,
            None if self.symmetric else zero.T,
            {**self.model_dump(), "scale_dtype": str(stored).removeprefix("torch.")},
        )


def group(weight: Tensor, size: int) -> Tensor:
    """`W [O, I]` -> `[O, G, size]`; a short last group is filled up with the row's last weight, which widens no range."""
    rows, columns = weight.shape
    missing = -columns % size
    filled = torch.cat([weight, weight[:, -1:].expand(rows, missing)], 1) if missing else weight
    return filled.reshape(rows, -1, size)


def grid(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """`[O, G, size]` -> scale `[O, G]` and zero point `[O, G]`, an integer in [0, 2^bits - 1]."""
    top = (1 << bits) - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        return 2 * high / top, torch.full_like(high, (top + 1) // 2)
    scale = (high - low) / top
    return scale, (-low / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round().clamp(0, top)


def scale_dtype(scale: Tensor) -> torch.dtype:
    """float16, unless even the largest scale would overflow it or lose digits to underflow."""
    largest = float(scale.max())
    limits = torch.finfo(torch.float16)
    return torch.float16 if largest == 0 or limits.tiny <= largest <= limits.max else torch.bfloat16


def nearest(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes `[O, G, size]` of the grid points nearest to the weights."""
    step = torch.where(scale > 0, scale, torch.inf)
    return (groups / step[..., None] + zero[..., None]).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
