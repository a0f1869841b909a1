"""Choosing between the torch definition of an operation and its Triton twin, once, when a module is built."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def pick(op: str, device: str = "cpu", **problem: Any) -> Callable:
    """The function that runs `op` (a file of this folder) on tensors of `device`.

    `kernels/<op>.py` defines `<op>`; `kernels/<op>_triton.py`, where it exists, defines a function of the same name and
    signature and `refuses(device=..., **problem) -> str | None`. `ACC_KERNELS=reference|triton` forces one of the two.

    Raises ValueError when a forced kernel refuses, with its reason.
    """
    forced = os.environ.get("ACC_KERNELS", "")
    if forced not in ("", "reference", "triton"):
        raise ValueError(f"ACC_KERNELS={forced!r}: expected 'reference' or 'triton'")
    reference = getattr(importlib.import_module(f".{op}", __package__), op)
    if forced == "reference":
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
        raise ValueError(f"ACC_KERNELS=triton, but {reason}; unset it to use the reference")
    return reference
