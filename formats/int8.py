"""Integers of 8 bits with a scale per row, as bitsandbytes stores them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.base import Product, product
from ..kernels.int8 import int8_weight
from .base import PackedWeight, Scheme


@dataclass(frozen=True)
class Int8Weight(PackedWeight):
    """`W = code · absmax / 127`. Scheme: `bits` 8."""

    codes: Tensor  # int8 [O, I]
    absmax: Tensor  # fp32 [O]

    name: ClassVar[str] = "int8"
    suffixes: ClassVar[dict[str, str]] = {"codes": "", "absmax": "_absmax"}

    @classmethod
    def layout(cls, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int | None, ...], torch.dtype]]:
        if scheme["bits"] != 8:
            raise ValueError(f"int8: {scheme['bits']} bits per code, expected 8")
        return {"": (shape, torch.int8), "_absmax": ((shape[0],), torch.float32)}

    @classmethod
    def encode(cls, codes: Tensor, absmax: Tensor) -> Int8Weight:
        """codes `[O, I]` from -127 to 127, absmax `[O]`."""
        return cls((codes.shape[0], codes.shape[1]), {"format": cls.name, "bits": 8}, codes.to(torch.int8), absmax)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return int8_weight(self.codes, self.absmax).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return self._product(x)

    def check(self) -> None:
        if not torch.isfinite(self.absmax).all():
            raise ValueError("int8: a scale is not finite")

    @classmethod
    def nominal_bits(cls, shape: tuple[int, int], scheme: Scheme, **counts: int) -> float:
        return 8 + 32 / shape[1]

    @cached_property
    def _product(self) -> Product:
        """The way this weight is multiplied, chosen at its first use."""
        dequantize = replace(self).dequantize  # a twin's, so that nothing points back here and keeps a cache alive
        return product("int8", self.operands() | self.numbers(), dequantize, self.shape[1], **self.numbers())

    def numbers(self) -> dict[str, Any]:
        return {}
