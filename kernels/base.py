"""How a packed weight is multiplied: the ways there are, and choosing one of them, once, when a module is built."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("reference", "cache", "triton")

Product = Callable[[Tensor], Tensor]  # x [..., I] -> x Wᵀ [..., O]


def product(
    op: str, operands: dict[str, Any], dequantize: Callable[[torch.dtype], Tensor], device: str = "cpu", **problem: Any
) -> Product:
    """`x -> x Wᵀ` for one weight whose tensors and numbers are the `operands` of `op`, a file of this folder.

    `ACC_KERNELS` chooses the way: `reference`, the torch definition; `cache`, the dense weight kept after its first
    use; `triton`, the kernel of that name. Unset: what is fastest of those that keep the weight packed.
    """
    if _forced() == "cache":
        return Cached(dequantize)
    return partial(pick(op, device, **problem), **operands)


def pick(op: str, device: str = "cpu", **problem: Any) -> Callable:
    """The function that runs `op` on tensors of `device`.

    `kernels/<op>.py` defines `<op>`; `kernels/<op>_triton.py`, where it exists, defines a function of the same name and
    signature and `refuses(device=..., **problem) -> str | None`. Raises ValueError when a forced kernel refuses, with
    its reason.
    """
    forced = _forced()
    reference = getattr(importlib.import_module(f".{op}", __package__), op)
    if forced in ("reference", "cache"):
        return reference
    if not (Path(__file__).parent / f"{op}_triton.py").exists():
        reason = f"{op} has no Triton kernel"
    elif device == "cpu" and forced != "triton":
        reason = "tensors are on the CPU"
    else:
        twin = importlib.import_module(f".{op}_triton", __package__)
        reason = twin.refuses(device=device, **problem)
        if reason is None:
            return getattr(twin, op)
    if forced == "triton":
        raise ValueError(f"ACC_KERNELS=triton, but {reason}; unset it to use the default")
    return reference


def _forced() -> str:
    forced = os.environ.get("ACC_KERNELS", "")
    if forced not in ("", *MODES):
        raise ValueError(f"ACC_KERNELS={forced!r}: expected one of {', '.join(MODES)}, or nothing")
    return forced


class Cached:
    """The product with the dense weight, which is made at the first use, in the type of that `x`, and then kept."""

    def __init__(self, dequantize: Callable[[torch.dtype], Tensor]):
        self.dequantize = dequantize
        self.weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None or self.weight.dtype != x.dtype:
            self.weight = self.dequantize(x.dtype)
        return F.linear(x, self.weight)
