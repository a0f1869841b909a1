"""SpQR: codes in small groups, whose scales and zeros are codes too, and sparse corrections (arXiv 2306.03078)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.base import Product, product
from ..kernels.packing import CHUNK, pack, pack_stream, unpack, unpack_stream
from ..kernels.spqr import OUTLIER_BLOCK, outlier_position, outliers_per_row, spqr_weight, statistic
from .base import Grid, PackedWeight, Scheme

STAT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SpQRWeight(PackedWeight):
    """`W[:, perm[j]] = scale · (code - zero) + outlier`, computed column by packed column in fp32.

    Scheme: `bits` 2-8; `group_size` along the inputs; `scale_bits`, `zero_bits` of the statistics' codes, which have
    their own scale and zero per `stat_group_size` rows; `order`: `act_order` with a permutation, or `identity`;
    `stat_dtype`: float16, or bfloat16 for weights that float16 cannot scale.

    Outliers are differences from the dequantised code, the one nearest to the weight. They lie sorted by block of 256
    packed columns, row and column, 24 bits each; one byte per row and block says how many there are. At 3 bits, groups
    of 16 and 3-bit statistics the rest takes 3.625 bits per weight (the authors' kernel: 4.0).
    """

    codes: Tensor  # int32 [ceil(I / 32), bits, O], as kernels/packing.py packs
    scale: Tensor  # uint8 [G, ceil(O / 8) * scale_bits], a bit stream
    zero: Tensor  # uint8 [G, ceil(O / 8) * zero_bits]
    stat: Tensor  # [G, ceil(O / stat_group_size), 4]: scale of scale, zero of scale, scale of zero, zero of zero
    perm: Tensor | None  # uint16 or int32 [I]
    outlier_count: Tensor  # uint8 [ceil(I / 256), O]; 255: every column of the block
    outlier_column: Tensor  # uint8 [N], within the block
    outlier_value: Tensor  # [N]

    name: ClassVar[str] = "spqr"
    suffixes: ClassVar[dict[str, str]] = {
        "codes": "",
        "scale": "_scale",
        "zero": "_zero",
        "stat": "_stat",
        "perm": "_perm",
        "outlier_count": "_outlier_count",
        "outlier_column": "_outlier_column",
        "outlier_value": "_outlier_value",
    }

    @classmethod
    def layout(cls, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int | None, ...], torch.dtype]]:
        rows, columns = shape
        groups, bytes_ = -(-columns // scheme["group_size"]), -(-rows // 8)
        if not 2 <= scheme["bits"] <= 8:
            raise ValueError(f"spqr: {scheme['bits']} bits per code, expected 2 to 8")
        stat_dtype = STAT_DTYPES[scheme["stat_dtype"]]
        layout: dict[str, tuple[tuple[int | None, ...], torch.dtype]] = {
            "": ((-(-columns // CHUNK), scheme["bits"], rows), torch.int32),
            "_scale": ((groups, bytes_ * scheme["scale_bits"]), torch.uint8),
            "_zero": ((groups, bytes_ * scheme["zero_bits"]), torch.uint8),
            "_stat": ((groups, -(-rows // scheme["stat_group_size"]), 4), stat_dtype),
            "_perm": ((columns,), torch.uint16 if columns <= 1 << 16 else torch.int32),
            "_outlier_count": ((-(-columns // OUTLIER_BLOCK), rows), torch.uint8),
            "_outlier_column": ((None,), torch.uint8),
            "_outlier_value": ((None,), stat_dtype),
        }
        if scheme["order"] == "identity":
            del layout["_perm"]
        return layout

    @classmethod
    def encode(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        stat: Tensor,
        perm: Tensor | None,
        outliers: tuple[Tensor, Tensor, Tensor],
        scheme: Scheme,
    ) -> SpQRWeight:
        """codes `[O, I]` in packed order, scale and zero codes `[G, O]`, stat in its stored type, perm `[I]` or None,
        outliers `(row, packed column, value)`, `[N]` each, in any order."""
        rows, columns = codes.shape
        count, column, value = _sort_outliers(*outliers, (rows, columns))
        return cls(
            shape=(rows, columns),
            scheme={"format": cls.name, **scheme},
            codes=pack(codes, scheme["bits"]),
            scale=pack_stream(scale, scheme["scale_bits"]),
            zero=pack_stream(zero, scheme["zero_bits"]),
            stat=stat.contiguous(),
            perm=None if perm is None else perm.to(torch.uint16 if columns <= 1 << 16 else torch.int32),
            outlier_count=count,
            outlier_column=column,
            outlier_value=value.to(stat.dtype),
        )

    @classmethod
    def unstack(
        cls, tensors: dict[str, Tensor], parts: int, shape: tuple[int, int], scheme: Scheme
    ) -> list[PackedWeight]:
        """Each matrix has its own number of outliers, which its counts tell."""
        layout = cls.layout(shape, scheme)
        if odd := sorted(tensors.keys() ^ layout.keys()):
            raise ValueError(f"spqr: expected tensors {sorted(layout)}, difference {odd}")
        cut, sizes = {}, []
        for suffix in sorted(layout, key=lambda s: layout[s][0][0] is None):  # "_outlier_count" before what it counts
            tensor, (first, *rest) = tensors[suffix], layout[suffix][0]
            if list(tensor.shape) != [sum(sizes) if first is None else first * parts, *rest]:
                raise ValueError(f"spqr: {suffix or 'codes'!r} {tuple(tensor.shape)} does not split in {parts} parts")
            cut[suffix] = tensor.split(sizes if first is None else first)
            if suffix == "_outlier_count":
                sizes = [int(outliers_per_row(count, shape[1]).sum()) for count in cut[suffix]]
        return [cls.from_tensors({s: cut[s][part] for s in cut}, shape, scheme) for part in range(parts)]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        operands = {field: tensor for field, tensor in self.operands().items() if field != "perm"}
        weight = spqr_weight(**operands, **self.numbers(), columns=self.shape[1]).to(dtype)
        if self.perm is not None:
            original = torch.empty_like(weight)
            original[:, self.perm.long()] = weight
            weight = original
        return weight.contiguous()

    def matmul(self, x: Tensor) -> Tensor:
        return self._product(x)

    def grid(self) -> Grid:
        (rows, columns), numbers = self.shape, self.numbers()
        share, scale_bits, zero_bits = (numbers[k] for k in ("stat_group_size", "scale_bits", "zero_bits"))
        extra = torch.zeros(rows, columns, dtype=self.outlier_value.dtype, device=self.codes.device)
        row, column = outlier_position(self.outlier_count, self.outlier_column, columns)
        extra[row, column] = self.outlier_value
        return Grid(
            unpack(self.codes, numbers["bits"], columns),
            (1 << numbers["bits"]) - 1,
            statistic(unpack_stream(self.scale, scale_bits, rows), self.stat[..., 0], self.stat[..., 1], share),
            statistic(unpack_stream(self.zero, zero_bits, rows), self.stat[..., 2], self.stat[..., 3], share),
            numbers["group_size"],
            extra,
            None if self.perm is None else self.perm.long(),
        )

    def with_codes(self, codes: Tensor) -> SpQRWeight:
        return replace(self, codes=pack(codes, self.scheme["bits"]))

    def check(self) -> None:
        columns = self.shape[1]
        if not (torch.isfinite(self.stat).all() and torch.isfinite(self.outlier_value).all()):
            raise ValueError("spqr: a statistic or an outlier is not finite")
        if self.perm is not None and self.perm.long().sort().values.tolist() != list(range(columns)):
            raise ValueError(f"spqr: the order of columns is not a permutation of 0 to {columns - 1}")
        counted = int(outliers_per_row(self.outlier_count, columns).sum())
        stored = len(self.outlier_column), len(self.outlier_value)
        if stored != (counted, counted):
            raise ValueError(f"spqr: {counted} outliers are counted, {stored[0]} columns and {stored[1]} values stored")
        row, column = outlier_position(self.outlier_count, self.outlier_column, columns)
        place = (column // OUTLIER_BLOCK * self.shape[0] + row) * OUTLIER_BLOCK + column % OUTLIER_BLOCK
        if (column >= columns).any() or (place.diff() <= 0).any():
            raise ValueError("spqr: the columns of the outliers are out of range or out of order")

    @classmethod
    def nominal_bits(cls, shape: tuple[int, int], scheme: Scheme, **counts: int) -> float:
        """A.5 of the paper with 24 bits per outlier; `counts` may hold `outliers`."""
        statistics = scheme["scale_bits"] + scheme["zero_bits"] + 4 * 16 / scheme["stat_group_size"]
        outliers = 24 * counts.get("outliers", 0) / (shape[0] * shape[1])
        return scheme["bits"] + statistics / scheme["group_size"] + outliers

    def counts(self) -> dict[str, int]:
        return {"outliers": len(self.outlier_value)}

    @cached_property
    def _product(self) -> Product:
        """The way this weight is multiplied, chosen at its first use."""
        dequantize = replace(self).dequantize  # a twin's, so that nothing points back here and keeps a cache alive
        return product("spqr", self.operands() | self.numbers(), dequantize, self.shape[1], **self.numbers())

    def numbers(self) -> dict[str, Any]:
        return {k: self.scheme[k] for k in ("bits", "group_size", "scale_bits", "zero_bits", "stat_group_size")}


def _sort_outliers(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """In any order `[N]` -> counts uint8 `[ceil(I / 256), O]`, columns uint8 and values in their stored order."""
    rows, columns = shape
    blocks = -(-columns // OUTLIER_BLOCK)
    segment = column // OUTLIER_BLOCK * rows + row
    within = column % OUTLIER_BLOCK
    count = torch.bincount(segment, minlength=blocks * rows)
    # 255 will mean all 256: there, add the missing column with a correction of zero
    short = (count[: columns // OUTLIER_BLOCK * rows] == 255).nonzero()[:, 0]
    if len(short):
        seen = torch.zeros_like(count).index_add_(0, segment, within)
        missing = OUTLIER_BLOCK * (OUTLIER_BLOCK - 1) // 2 - seen[short]
        segment, within = torch.cat([segment, short]), torch.cat([within, missing])
        value = torch.cat([value, value.new_zeros(len(short))])
    order = (segment * OUTLIER_BLOCK + within).argsort()
    return count.clamp(max=255).to(torch.uint8).view(blocks, rows), within[order].to(torch.uint8), value[order]
