"""NF4: codes into the quantiles of a normal distribution, a scale per block of 64, as bitsandbytes stores them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.base import Product, product
from ..kernels.nf4 import BLOCK, NESTED, nf4_weight
from .base import PackedWeight, Scheme


@dataclass(frozen=True)
class Nf4Weight(PackedWeight):
    """`W = level[code] · absmax`. Scheme: `bits` 4, `block_size` 64, `double_quant`: whether the scales are codes too.

    The tensors have the bytes of bitsandbytes', which `acc export --to bnb` writes under its names, with the tables
    that are the same in every file. Here they keep acc's names: modules cannot hold buffers with dots in theirs, and
    experts, which stock transformers would leave dense, are packed like any matrix.
    """

    codes: Tensor  # uint8 [ceil(O · I / 2)], the first of two in the high half
    absmax: Tensor  # [ceil(O · I / 64)]: fp32, or codes of 8 bits
    nested_absmax: Tensor | None  # fp32, one per 256 of those
    offset: Tensor | None  # fp32 [1]: the mean of all scales

    name: ClassVar[str] = "nf4"
    suffixes: ClassVar[dict[str, str]] = {
        "codes": "",
        "absmax": "_absmax",
        "nested_absmax": "_nested_absmax",
        "offset": "_offset",
    }

    @classmethod
    def layout(cls, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int | None, ...], torch.dtype]]:
        if (scheme["bits"], scheme["block_size"]) != (4, BLOCK):
            raise ValueError(f"nf4: {scheme['bits']} bits, blocks of {scheme['block_size']}, expected 4 and {BLOCK}")
        weights = shape[0] * shape[1]
        blocks = -(-weights // BLOCK)
        if not scheme["double_quant"]:
            return {"": ((-(-weights // 2),), torch.uint8), "_absmax": ((blocks,), torch.float32)}
        return {
            "": ((-(-weights // 2),), torch.uint8),
            "_absmax": ((blocks,), torch.uint8),
            "_nested_absmax": ((-(-blocks // NESTED),), torch.float32),
            "_offset": ((1,), torch.float32),
        }

    @classmethod
    def encode(
        cls, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None = None, offset: Tensor | None = None
    ) -> Nf4Weight:
        """codes `[O, I]`, absmax `[B]` in fp32, or codes of scales with what they need."""
        flat = codes.to(torch.uint8).flatten()
        flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)]).view(-1, 2)
        return cls(
            shape=(codes.shape[0], codes.shape[1]),
            scheme={"format": cls.name, "bits": 4, "block_size": BLOCK, "double_quant": offset is not None},
            codes=flat[:, 0] << 4 | flat[:, 1],
            absmax=absmax,
            nested_absmax=nested_absmax,
            offset=offset,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return nf4_weight(**self.operands(), rows=self.shape[0], columns=self.shape[1]).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return self._product(x)

    def check(self) -> None:
        scales = [self.absmax, self.nested_absmax, self.offset]
        if not all(torch.isfinite(t).all() for t in scales if t is not None):
            raise ValueError("nf4: a scale is not finite")

    @classmethod
    def nominal_bits(cls, shape: tuple[int, int], scheme: Scheme, **counts: int) -> float:
        return 4 + (8 + 32 / NESTED if scheme["double_quant"] else 32) / BLOCK

    @cached_property
    def _product(self) -> Product:
        """The way this weight is multiplied, chosen at its first use."""
        dequantize = replace(self).dequantize  # a twin's, so that nothing points back here and keeps a cache alive
        return product("nf4", self.operands() | self.numbers(), dequantize, self.shape[1], **self.numbers())

    def numbers(self) -> dict[str, Any]:
        return {"rows": self.shape[0]}
