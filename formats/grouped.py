"""Grouped integers: a code per weight, a scale and an integer zero point per group of inputs of a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.base import Product, product
from ..kernels.grouped import grouped_weight
from ..kernels.packing import CHUNK, pack, pack_stream, unpack, unpack_stream
from .base import Grid, PackedWeight, Scheme

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class GroupedWeight(PackedWeight):
    """`W = scale · (code - zero)`. Scheme: `bits` 2-8, `group_size` (-1: a whole row), `symmetric`, `scale_dtype`.

    The zero point is an integer in [0, 2^bits - 1], as GPTQ's; a symmetric grid has the zero point 2^(bits - 1) and
    stores none. Such a grid reaches one step further below zero than above it, so that a negative scale turns its long
    side up: legal there, refused with a zero point, which does that already. A scale of 0 makes a group of zeros.
    """

    codes: Tensor  # int32 [ceil(I / 32), bits, O], as kernels/packing.py packs
    scale: Tensor  # [G, O]
    zero: Tensor | None  # uint8 [G, ceil(O / 8) * bits], a bit stream

    name: ClassVar[str] = "grouped"
    suffixes: ClassVar[dict[str, str]] = {"codes": "", "scale": "_scale", "zero": "_zero"}

    @classmethod
    def layout(cls, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int | None, ...], torch.dtype]]:
        (rows, columns), bits = shape, scheme["bits"]
        if not 2 <= bits <= 8:
            raise ValueError(f"grouped: {bits} bits per code, expected 2 to 8")
        groups = -(-columns // _width(shape, scheme))
        layout: dict[str, tuple[tuple[int | None, ...], torch.dtype]] = {
            "": ((-(-columns // CHUNK), bits, rows), torch.int32),
            "_scale": ((groups, rows), SCALE_DTYPES[scheme["scale_dtype"]]),
        }
        if not scheme["symmetric"]:
            layout["_zero"] = ((groups, -(-rows // 8) * bits), torch.uint8)
        return layout

    @classmethod
    def encode(cls, codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> GroupedWeight:
        """codes `[O, I]`, scale `[G, O]` in its stored type, zero codes `[G, O]` or None."""
        bits = scheme["bits"]
        return cls(
            shape=(codes.shape[0], codes.shape[1]),
            scheme={"format": cls.name, **scheme},
            codes=pack(codes, bits),
            scale=scale.contiguous(),
            zero=None if zero is None else pack_stream(zero, bits),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return grouped_weight(**self.operands(), **self.numbers(), columns=self.shape[1]).to(dtype).contiguous()

    def matmul(self, x: Tensor) -> Tensor:
        return self._product(x)

    def grid(self) -> Grid:
        (rows, columns), bits = self.shape, self.scheme["bits"]
        if self.zero is None:
            zero = torch.full(self.scale.shape, float(1 << bits - 1), device=self.scale.device)
        else:
            zero = unpack_stream(self.zero, bits, rows).float()
        codes = unpack(self.codes, bits, columns)
        return Grid(codes, (1 << bits) - 1, self.scale.float(), zero, _width(self.shape, self.scheme))

    def with_codes(self, codes: Tensor) -> GroupedWeight:
        return replace(self, codes=pack(codes, self.scheme["bits"]))

    def check(self) -> None:
        if not torch.isfinite(self.scale).all():
            raise ValueError("grouped: a scale is not finite")
        if self.zero is not None and (self.scale < 0).any():
            raise ValueError("grouped: a scale is negative, which only a symmetric grid may have")

    @classmethod
    def nominal_bits(cls, shape: tuple[int, int], scheme: Scheme, **counts: int) -> float:
        bits, zero = scheme["bits"], 0 if scheme["symmetric"] else scheme["bits"]
        return bits + (8 * SCALE_DTYPES[scheme["scale_dtype"]].itemsize + zero) / _width(shape, scheme)

    @cached_property
    def _product(self) -> Product:
        """The way this weight is multiplied, chosen at its first use."""
        dequantize = replace(self).dequantize  # a twin's, so that nothing points back here and keeps a cache alive
        return product("grouped", self.operands() | self.numbers(), dequantize, self.shape[1], **self.numbers())

    def numbers(self) -> dict[str, Any]:
        return {"bits": self.scheme["bits"], "group_size": _width(self.shape, self.scheme)}


def _width(shape: tuple[int, int], scheme: Scheme) -> int:
    return shape[1] if scheme["group_size"] == -1 else scheme["group_size"]
