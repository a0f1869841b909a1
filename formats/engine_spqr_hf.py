"""The SpQR authors' checkpoints, as transformers with spqr-quant loads them on CUDA (github.com/Vahe1994/SpQR)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.packing import unpack, unpack_stream
from ..kernels.spqr import outlier_position
from .base import Entry, PackedWeight
from .engine import Engine, patterns
from .model import linear_modules
from .safefile import Layout
from .source import Source
from .spqr import SpQRWeight

TILE = 16
WANTED = {"bits": 3, "group_size": TILE, "scale_bits": 3, "zero_bits": 3, "stat_group_size": TILE}
COLUMNS = 1 << 15  # their column numbers are signed and have 16 bits


class SpqrHf(Engine):
    """A 64-bit word per row of a 16 x 16 tile, and the corrections by row, as CSR.

    A word holds, from its lowest bit, the code of the scale, that of the zero, 16 codes of 3 bits each, and a byte of
    the tile's four statistics, which two rows share. Numbers are acc's; their kernel computes weights in float16, where
    acc uses 32 bits.

    Limits: 3 bits, groups of 16 with statistics of 16 rows, float16, rows in multiples of 16 and inputs of 32: quantise
    with `--bits 3 --stat-group-size 16`. Transformers 5.23 calls a function that spqr-quant 0.2.0 spells otherwise; its
    own loader has to be mended before it reads any such checkpoint, the authors' included.
    """

    def __init__(self, source: Source):
        super().__init__(source)
        shapes = {name: source.info(name).shape for name in source.names()}
        self.linears = linear_modules(str(source.folder), shapes, source.dtype)  # stored name -> module

    def refuses(self, name: str, entry: Entry) -> str | None:
        if entry.cls is not SpQRWeight:
            return f"it is packed as {entry.cls.name}, and only spqr can be stored"
        if name not in self.linears or entry.stack is not None or entry.transposed:
            return "only linear layers can be stored, and this is none of them"
        for key, value in WANTED.items():
            if entry.scheme[key] != value:
                return f"its {key} is {entry.scheme[key]}, and only {value} can be stored"
        if entry.scheme["stat_dtype"] != "float16":
            return f"its statistics are {entry.scheme['stat_dtype']}, and only float16 can be stored"
        rows, columns = entry.shape
        if rows % TILE or columns % 32 or columns >= COLUMNS:
            return f"it is {rows} x {columns}: expected multiples of 16 and 32, and fewer than {COLUMNS} inputs"
        return None

    def plan(self, packed: Mapping[str, Entry], kept: list[str]) -> dict[str, Any]:
        inside = {self.linears[name] for name in packed}
        dense = [module for module in self.linears.values() if module not in inside]
        shapes = {}
        for name, entry in packed.items():
            for tensor, (shape, _) in self.layout(name, entry).items():
                shapes[f"{tensor}.shape"] = shape[0]
        table = {
            "quant_method": "spqr",
            "bits": 3,
            "beta1": TILE,
            "beta2": TILE,
            "shapes": shapes,
            "modules_to_not_convert": patterns(dense, inside),
        }
        self.notes.append("transformers 5.23 with spqr-quant 0.2.0 needs a mend to load it: see the file's docstring")
        return {"quantization_config": table, "dtype": "float16"}

    def layout(self, name: str, entry: Entry) -> Layout:
        (rows, columns), stem = entry.shape, name.removesuffix("weight")
        outliers = self.source.shards.extents[f"{name}_outlier_value"].shape[0]
        return {
            f"{stem}dense_weights": ((rows * columns // TILE,), torch.int64),
            f"{stem}row_offsets": ((rows + 1,), torch.int32),
            f"{stem}col_vals": ((outliers,), torch.int32),
            f"{stem}in_perm": ((columns // 2,), torch.int32),
        }

    def tensors(self, name: str, packed: PackedWeight) -> dict[str, Tensor]:
        assert isinstance(packed, SpQRWeight)
        stem, (offsets, corrections) = name.removesuffix("weight"), rows_of(packed)
        columns = packed.shape[1]
        perm = torch.arange(columns) if packed.perm is None else packed.perm.long()
        return {
            f"{stem}dense_weights": tiles_of(packed),
            f"{stem}row_offsets": offsets,
            f"{stem}col_vals": corrections,
            f"{stem}in_perm": _signed(perm[0::2] | perm[1::2] << 16),
        }


def tiles_of(packed: SpQRWeight) -> Tensor:
    """The words, int64 `[O · I / 16]`: by tile of rows, by tile of inputs, by row of the tile."""
    rows, columns = packed.shape
    scale, zero = (unpack_stream(stream, 3, rows).long().T for stream in (packed.scale, packed.zero))  # [O, G]
    words = scale | zero << 3
    codes = unpack(packed.codes, 3, columns).reshape(rows, -1, TILE)
    for place in range(TILE):
        words |= codes[:, :, place].long() << 6 + 3 * place
    # scale of scale, scale of zero, zero of scale, zero of zero: a byte for each two rows of the tile
    stat = packed.stat.transpose(0, 1)[..., [0, 2, 1, 3]].contiguous()  # [O / 16, G, 4]
    pieces = stat.view(torch.uint8).repeat_interleave(2, -1)  # [O / 16, G, 16]
    words = words.view(rows // TILE, TILE, -1).transpose(1, 2)  # [O / 16, G, 16]
    return (words | pieces.long() << 54).reshape(-1)


def rows_of(packed: SpQRWeight) -> tuple[Tensor, Tensor]:
    """Where each row's corrections begin, int32 `[O + 1]`, and the corrections by row and column, int32 `[N]`: the
    value's bits above, the packed column below."""
    row, column = outlier_position(packed.outlier_count, packed.outlier_column, packed.shape[1])
    order = (row * packed.shape[1] + column).argsort()
    offsets = torch.bincount(row, minlength=packed.shape[0]).cumsum(0)
    bits = packed.outlier_value[order].view(torch.int16).long() << 16
    return torch.cat([offsets.new_zeros(1), offsets]).int(), (bits | column[order]).int()


def _signed(words: Tensor) -> Tensor:
    """int64 with 32 bits in use -> int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
