"""Binary coding: bit planes of plus and minus one, with a scale per plane and group of inputs (arXiv 2206.09557)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.base import Product, product
from ..kernels.bcq import bcq_weight, pack_planes, plane_scales, unpack_planes
from ..kernels.packing import CHUNK
from .base import Grid, Levels, PackedWeight, Scheme, look_up

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ("free", "codes", "even")


@dataclass(frozen=True)
class BcqWeight(PackedWeight):
    """`W = offset + Σ scale_b · B_b` with `bits` planes `B_b` of plus and minus one.

    Scheme: `bits` 1-8; `group_size` along the inputs (-1: a whole row); `scales`, what is stored of a group; and
    `scale_dtype`.

    `free`: a scale per plane and an offset, 16 bits each. `codes`: they are 8-bit codes, with one 16-bit scale per row
    for the scales and one for the offsets. `even`: the planes are powers of two steps of an even grid, as integers with
    a scale and a zero point are; the step is stored, and the offset in steps.

    Planes of greater scale come first, so that the first few of them are the same weight with fewer bits.
    """

    codes: Tensor  # int32 [ceil(I / 32), bits, O], bit k for input 32 c + k
    scale: Tensor  # [G, bits, O]; even: [G, O]
    offset: Tensor  # [G, O]
    stat: Tensor | None  # codes: [2, O]

    name: ClassVar[str] = "bcq"
    planes: ClassVar[bool] = True
    suffixes: ClassVar[dict[str, str]] = {"codes": "", "scale": "_scale", "offset": "_offset", "stat": "_stat"}

    @classmethod
    def layout(cls, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int | None, ...], torch.dtype]]:
        (rows, columns), bits, kind = shape, scheme["bits"], scheme["scales"]
        if not 1 <= bits <= 8:
            raise ValueError(f"bcq: {bits} planes, expected 1 to 8")
        if kind not in KINDS:
            raise ValueError(f"bcq: scales are {kind!r}, expected one of {', '.join(KINDS)}")
        stored = DTYPES[scheme["scale_dtype"]]
        groups = -(-columns // _width(shape, scheme))
        kept = torch.uint8 if kind == "codes" else stored
        layout: dict[str, tuple[tuple[int | None, ...], torch.dtype]] = {
            "": ((-(-columns // CHUNK), bits, rows), torch.int32),
            "_scale": ((groups, rows) if kind == "even" else (groups, bits, rows), kept),
            "_offset": ((groups, rows), kept),
        }
        return layout | ({"_stat": ((2, rows), stored)} if kind == "codes" else {})

    @classmethod
    def encode(cls, codes: Tensor, scale: Tensor, offset: Tensor, stat: Tensor | None, scheme: Scheme) -> BcqWeight:
        """codes `[O, I]`, bit `b` for plane `b`; the rest as stored."""
        return cls(
            shape=(codes.shape[0], codes.shape[1]),
            scheme={"format": cls.name, **scheme},
            codes=pack_planes(codes, scheme["bits"]),
            scale=scale.contiguous(),
            offset=offset.contiguous(),
            stat=stat,
        )

    @classmethod
    def of_grid(cls, grid: Grid) -> BcqWeight:
        """The very same weights as those of an even grid, to the last bit of fp32.

        For `u` of `q` bits `s (u - zero) = s (Σ 2^(b - 1) B_b + (2^q - 1) / 2 - zero)` with `B_b = 2 bit_b(u) - 1`.
        Raises ValueError with the reason where that cannot be stored.
        """
        bits = grid.top.bit_length()
        offset = grid.top / 2 - grid.zero
        exact = [grid.scale, offset]
        stored = next((n for n, kind in DTYPES.items() if all(torch.equal(t.to(kind).float(), t) for t in exact)), None)
        reasons = {
            f"it has {grid.top + 1} values, which is no power of two": grid.top + 1 != 1 << bits or bits > 8,
            "it has corrections beside its grid": grid.extra is not None and bool(grid.extra.any()),
            "its inputs are in another order": grid.perm is not None,
            "its zero points are no halves of integers": bool((offset * 2 % 1 != 0).any()),
            "its scales need more than 16 bits": stored is None,
        }
        for reason, found in reasons.items():
            if found:
                raise ValueError(f"bcq: this weight cannot be converted without loss: {reason}")
        assert stored is not None
        columns = grid.codes.shape[1]
        size = -1 if grid.group_size >= columns else grid.group_size
        scheme = {"bits": bits, "group_size": size, "scales": "even", "scale_dtype": stored}
        kind = DTYPES[stored]
        return cls.encode(_reversed(grid.codes, bits), grid.scale.to(kind), offset.to(kind), None, scheme)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return bcq_weight(**self.operands(), **self.numbers(), columns=self.shape[1]).to(dtype).contiguous()

    def matmul(self, x: Tensor) -> Tensor:
        return self._product(x)

    def grid(self) -> Grid | None:
        """An even grid only where the scales are `even`."""
        if self.scheme["scales"] != "even":
            return None
        bits = self.scheme["bits"]
        top = (1 << bits) - 1
        codes = _reversed(unpack_planes(self.codes, self.shape[1]), bits)
        zero = top / 2 - self.offset.float()
        return Grid(codes, top, self.scale.float(), zero, _width(self.shape, self.scheme))

    def levels(self) -> Grid | Levels:
        if (grid := self.grid()) is not None:
            return grid
        size = _width(self.shape, self.scheme)
        values, order = self._values()
        rank = order.argsort(1)  # of each sum of planes among its group's
        ranks = look_up(rank, unpack_planes(self.codes, self.shape[1]), size)
        return Levels(ranks.byte(), values.shape[1] - 1, values.gather(1, order), size)

    def with_codes(self, codes: Tensor) -> BcqWeight:
        bits = self.scheme["bits"]
        if self.scheme["scales"] == "even":
            return replace(self, codes=pack_planes(_reversed(codes, bits), bits))
        _, order = self._values()
        planes = look_up(order, codes, _width(self.shape, self.scheme))
        return replace(self, codes=pack_planes(planes, bits))

    def _values(self) -> tuple[Tensor, Tensor]:
        """What each code means, fp32 `[G, 2^bits, O]`, bit `b` for plane `b`; and the codes by rising value, int64."""
        bits = self.scheme["bits"]
        scales, offset = plane_scales(self.scale, self.offset, self.stat, bits)
        each = torch.arange(1 << bits, device=offset.device)[:, None]
        values = offset[:, None].repeat(1, 1 << bits, 1)
        for b, scale in enumerate(scales):
            values += torch.where((each >> b & 1).bool(), scale[:, None], -scale[:, None])
        return values, values.argsort(dim=1, stable=True)

    def first_planes(self, planes: int) -> BcqWeight:
        bits = self.scheme["bits"]
        if planes >= bits:
            return self
        scheme = self.scheme | {"bits": planes}
        codes = self.codes[:, :planes].contiguous()
        if self.scheme["scales"] == "even":  # the offset stays where it is, in wider steps
            wider = 2.0 ** (bits - planes)
            return replace(self, scheme=scheme, codes=codes, scale=self.scale * wider, offset=self.offset / wider)
        return replace(self, scheme=scheme, codes=codes, scale=self.scale[:, :planes].contiguous())

    def check(self) -> None:
        kept = (self.scale, self.offset) if self.stat is None else (self.stat,)
        if not all(torch.isfinite(tensor).all() for tensor in kept):
            raise ValueError("bcq: a scale or an offset is not finite")
        if any((tensor < 0).any() for tensor in (self.scale, *(() if self.stat is None else (self.stat,)))):
            raise ValueError("bcq: a scale is negative")

    @classmethod
    def nominal_bits(cls, shape: tuple[int, int], scheme: Scheme, **counts: int) -> float:
        """`q + 16 (q + 1) / g` for free scales; half of that, and 32 bits per row, for 8-bit codes of them."""
        bits, width = scheme["bits"], _width(shape, scheme)
        statistics = {"free": 16 * (bits + 1), "codes": 8 * (bits + 1), "even": 32}[scheme["scales"]]
        return bits + statistics / width + (32 / shape[1] if scheme["scales"] == "codes" else 0)

    @cached_property
    def _product(self) -> Product:
        """The way this weight is multiplied, chosen at its first use."""
        dequantize = replace(self).dequantize  # a twin's, so that nothing points back here and keeps a cache alive
        return product("bcq", self.operands() | self.numbers(), dequantize, self.shape[1], **self.numbers())

    def numbers(self) -> dict[str, Any]:
        return {"bits": self.scheme["bits"], "group_size": _width(self.shape, self.scheme)}


def _width(shape: tuple[int, int], scheme: Scheme) -> int:
    return shape[1] if scheme["group_size"] == -1 else scheme["group_size"]


def _reversed(codes: Tensor, bits: int) -> Tensor:
    """Codes whose lowest bit becomes the highest: integers count from the last plane, planes from the first."""
    return sum(((codes >> b & 1) << (bits - 1 - b) for b in range(bits)), torch.zeros_like(codes))
