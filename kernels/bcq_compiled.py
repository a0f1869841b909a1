"""The product with a weight of bit planes on a CPU, in C++: see `packed_cpu.cpp`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from . import native
from .bcq import bcq

LOOKUP = 4  # columns that one look into a table is for; tests/bench/lut_cpu.py compares it with 8, and with no table


def prepare(columns: int, lookup: int = LOOKUP, **operands: Any) -> native.Compiled:
    """The operands of `bcq` -> `x [..., I] -> x Wᵀ [..., O]`. Raises OSError where nothing can be compiled."""
    scale, stat = operands["scale"], operands["stat"]
    found = native.library(
        BCQ=1,
        SPQR=0,
        BITS=operands["bits"],
        GROUP=0 if operands["group_size"] >= columns else operands["group_size"],
        KIND=1 if stat is not None else 2 if scale.dim() == 2 else 0,
        LOOKUP=lookup,
        SCALE_BITS=0,
        ZERO_BITS=0,
        STAT_GROUP=1,
        BFLOAT=int((scale if stat is None else stat).dtype == torch.bfloat16),
    )
    tensors = {"codes": operands["codes"], "stat": stat}
    coded = {"scale_codes": scale, "zero_codes": operands["offset"]}
    tensors |= {"scale": scale, "offset": operands["offset"]} if stat is None else coded
    return native.Compiled(found, (operands["codes"].shape[-1], columns), tensors, partial(bcq, **operands))
