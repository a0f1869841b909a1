"""Bit planes of acc's own: any evenly spaced weight, the same to the last bit, for kernels that multiply by planes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from .base import Entry, PackedWeight, quantization_config
from .bcq import DTYPES, BcqWeight
from .engine import Engine
from .grouped import GroupedWeight
from .safefile import Layout


class Bcq(Engine):
    """The format of `lut-gemm`, from grouped integers: `rtn`, `gptq`, or a checkpoint of GPTQ or compressed-tensors.

    `s (u - zero)` of `q` bits is a sum of `q` planes of plus and minus one, with the scales `s 2^(b-1)`, and an offset
    (LUT-GEMM, arXiv 2206.09557, section 3). The folder is loaded as any that acc packed.
    """

    readable: ClassVar[str | None] = "acc"

    def refuses(self, name: str, entry: Entry) -> str | None:
        if entry.cls is not GroupedWeight:
            return f"it is packed as {entry.cls.name}, and only grouped integers are evenly spaced"
        if entry.stack is not None or entry.transposed:
            return f"it is a stack of {entry.stack} matrices, and each needs a name of its own"
        return None

    def plan(self, packed: Mapping[str, Entry], kept: list[str]) -> dict[str, Any]:
        table = {name: (entry.shape, scheme_of(entry)) for name, entry in packed.items()}
        return {"quantization_config": quantization_config(table)}

    def layout(self, name: str, entry: Entry) -> Layout:
        return {name + suffix: size for suffix, size in BcqWeight.layout(entry.shape, scheme_of(entry)).items()}  # pyright: ignore[reportReturnType]

    def tensors(self, name: str, packed: PackedWeight) -> dict[str, Tensor]:
        grid = packed.grid()
        assert grid is not None
        made, kind = BcqWeight.of_grid(grid), DTYPES[packed.scheme["scale_dtype"]]
        made = replace(made, scale=made.scale.to(kind), offset=made.offset.to(kind))  # as exact in the scales' own type
        return {name + suffix: tensor for suffix, tensor in made.tensors().items()}


def scheme_of(entry: Entry) -> dict[str, Any]:
    """The scheme that a grouped weight has as bit planes."""
    known = {key: entry.scheme[key] for key in ("bits", "group_size", "scale_dtype")}
    size = known["group_size"] if 0 < known["group_size"] < entry.shape[1] else -1
    return {"format": BcqWeight.name, **known, "group_size": size, "scales": "even"}
