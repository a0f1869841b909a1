"""The product with a SpQR weight on a CPU, in C++: see `packed_cpu.cpp`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .spqr import OUTLIER_BLOCK, outliers_per_row, spqr


def prepare(columns: int, **operands: Any) -> native.Compiled:
    """The operands of `spqr` -> `x [..., I] -> x Wᵀ [..., O]`. Adds an int32 per 16 rows and 256 columns.

    Raises OSError where nothing can be compiled, and ValueError for indices out of range, with which C++ would read
    what is not its own.
    """
    rows, perm = operands["codes"].shape[-1], operands["perm"]
    found = native.library(
        SPQR=1,
        BITS=operands["bits"],
        GROUP=operands["group_size"],
        SCALE_BITS=operands["scale_bits"],
        ZERO_BITS=operands["zero_bits"],
        STAT_GROUP=operands["stat_group_size"],
        BFLOAT=int(operands["stat"].dtype == torch.bfloat16),
    )
    if perm is not None and not 0 <= int(perm.int().min()) <= int(perm.int().max()) < columns:
        raise ValueError("spqr: the order of the columns is no permutation; acc verify tells what is wrong")
    tensors = {name: operands[name] for name in ("codes", "stat", "perm")}
    tensors |= {"scale_codes": operands["scale"], "zero_codes": operands["zero"]}
    if len(operands["outlier_value"]):
        tensors |= {name: operands[name] for name in ("outlier_count", "outlier_column", "outlier_value")}
        tensors["outlier_start"] = _starts(operands, columns, found.acc_lanes())
    return native.Compiled(found, (rows, columns), tensors, partial(spqr, **operands))


def _starts(operands: dict[str, Any], columns: int, lanes: int) -> Tensor:
    """int32 `[ceil(I / 256), ceil(O / lanes)]`: where the outliers of a block of columns and a tile of rows begin."""
    count, column = operands["outlier_count"], operands["outlier_column"]
    per_tile = F.pad(outliers_per_row(count, columns), (0, -count.shape[1] % lanes)).unflatten(1, (-1, lanes)).sum(-1)
    ends = per_tile.flatten().cumsum(0)
    last = column[len(column) - int(per_tile[-1].sum()) :]
    whole = int(ends[-1]) == len(column) == len(operands["outlier_value"])
    if not whole or (last.int() >= columns - (count.shape[0] - 1) * OUTLIER_BLOCK).any():
        raise ValueError("spqr: outliers are miscounted or out of range; acc verify tells what is wrong")
    return (ends.view_as(per_tile) - per_tile).int()
