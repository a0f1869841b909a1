"""Round to nearest: every group of weights on its own evenly spaced grid. Needs no data; the yardstick for the rest."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..formats.grouped import GroupedWeight
from .base import Event, Method, around, scale_dtype


class Rtn(Method):
    """Rounds each weight to the nearest point of its group's grid.

    A group of neighbouring inputs of one row gets `2^bits` evenly spaced values between its least and its greatest
    weight, zero among them, so that a zero weight stays zero. Nothing is known of the inputs, so nothing is made up
    for: what a better method gains over this one is what its calibration is worth.

    Limits: below 4 bits the error of many models is no longer small.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    format: ClassVar[str] = "grouped"

    bits: int = Field(4, ge=2, le=8, description="bits per code")
    group_size: Literal[-1, 8, 16, 32, 64, 128] = Field(128, description="inputs that share a scale; -1: a whole row")
    symmetric: bool = Field(False, description="grid symmetric around zero, no zero point stored")

    def alternatives(self, bits: float) -> list[Rtn]:
        sizes = itertools.product(around(bits), (32, 64, 128))
        return [self.model_copy(update={"bits": code, "group_size": group}) for code, group in sizes]

    def compress(self, weight: Tensor, prepared: Any, event: Event) -> GroupedWeight:
        columns, top = weight.shape[1], (1 << self.bits) - 1
        groups = group(weight.float(), columns if self.group_size == -1 else self.group_size)
        low, high = grid_range(groups, self.symmetric)
        scale = (high - low) / top
        stored = scale_dtype(float(scale.max()), event)
        scale = scale.to(stored)
        step = torch.where(scale > 0, scale.float(), torch.inf)  # a group of zeros
        zero = torch.full_like(low, 1 << self.bits - 1) if self.symmetric else (-low / step).round().clamp(0, top)
        codes = (groups / step[..., None] + zero[..., None]).round().clamp(0, top)
        return GroupedWeight.encode(
            codes.byte().flatten(1)[:, :columns],
            scale.T,
            None if self.symmetric else zero.T,
            {**self.model_dump(), "scale_dtype": str(stored).removeprefix("torch.")},
        )


def group(weight: Tensor, size: int) -> Tensor:
    """`W [O, I]` -> `[O, G, size]`; a short last group is filled with the row's last weight."""
    rows, columns = weight.shape
    missing = -columns % size
    filled = torch.cat([weight, weight[:, -1:].expand(rows, missing)], 1) if missing else weight
    return filled.reshape(rows, -1, size)


def grid_range(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Lowest and highest value `[O, G]` that the grids of `[O, G, size]` have to reach, zero between them."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high
