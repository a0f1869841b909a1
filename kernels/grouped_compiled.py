"""The product with a weight of grouped integers on a CPU, in C++: see `packed_cpu.cpp`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from . import native
from .grouped import grouped


def prepare(columns: int, **operands: Any) -> native.Compiled:
    """The operands of `grouped` -> `x [..., I] -> x Wᵀ [..., O]`. Raises OSError where nothing can be compiled."""
    zero, whole = operands["zero"], operands["group_size"] >= columns
    found = native.library(
        SPQR=0,
        BITS=operands["bits"],
        GROUP=0 if whole else operands["group_size"],
        SCALE_BITS=0,
        ZERO_BITS=0 if zero is None else operands["bits"],
        STAT_GROUP=1,
        BFLOAT=int(operands["scale"].dtype == torch.bfloat16),
    )
    tensors = {"codes": operands["codes"], "scale": operands["scale"], "zero_codes": zero}
    return native.Compiled(found, (operands["codes"].shape[-1], columns), tensors, partial(grouped, **operands))
