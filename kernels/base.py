"""How a packed weight is multiplied: the ways there are, and choosing one of them, once, when a module is built."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WAYS = ("reference", "cache", "compiled", "triton")

Product = Callable[[Tensor], Tensor]  # x [..., I] -> x Wᵀ [..., O]
SharedProduct = Callable[[Tensor], list[Tensor]]  # x [..., I] -> x Wᵀ [..., O] per weight
ExpertsProduct = Callable[[Tensor, Tensor], Tensor]  # x [N, I] sorted by expert, ends [E] -> [N, O]


def product(
    op: str, operands: dict[str, Any], dequantize: Callable[[torch.dtype], Tensor], columns: int, **problem: Any
) -> Product:
    """`x -> x Wᵀ` for one weight of `columns` inputs, whose tensors and numbers are the `operands` of `op`.

    `ACC_KERNELS` chooses the way: `reference`, the torch definition; `cache`, the dense weight kept after its first
    use; `compiled`, C++ on the CPU; `triton`, the kernel of that name. Unset, it is the fastest one that keeps the
    weight packed. Raises ValueError, with the reason, when a way is asked for that cannot be gone.
    """
    forced, device = _forced(), operands["codes"].device.type
    if forced == "cache":
        return Cached(dequantize)
    if forced == "compiled" or (forced == "" and device == "cpu"):
        if device != "cpu":
            raise ValueError(f"ACC_KERNELS=compiled runs on the CPU, the weights are on {device}; unset it")
        try:
            if not (Path(__file__).parent / f"{op}_compiled.py").exists():
                raise OSError(f"{op} has no kernel for the CPU")
            return importlib.import_module(f".{op}_compiled", __package__).prepare(columns, **operands)
        except OSError as error:
            if forced:
                raise ValueError(f"ACC_KERNELS=compiled, but {error}") from None
            # said once, as the same text from the same line is
            warnings.warn(
                f"acc: packed weights run slowly: {error}. ACC_KERNELS=cache is fast and takes the memory of the dense"
                " model",
                stacklevel=2,
            )
    return partial(pick(op, device, **problem), **operands)


def shared_product(op: str, operands: Sequence[dict[str, Any]], **problem: Any) -> SharedProduct | None:
    """`x -> x Wᵀ` for several weights at once, `operands` the tensors of `op` for each, `problem` what they share.

    None where nothing multiplies them in one launch: one by one is then as good.
    """
    kinds = {kind: [tensors[kind] for tensors in operands] for kind in operands[0]}
    devices = {codes.device for codes in kinds["codes"]}
    function = _one_launch(f"{op}_shared", next(iter(devices)).type, **problem)
    if function is None or len(devices) > 1:
        return None
    return partial(function, **{k: None if kind[0] is None else kind for k, kind in kinds.items()}, **problem)


def experts_product(op: str, operands: dict[str, Any], **problem: Any) -> ExpertsProduct | None:
    """The product with a stack of weights, `operands` the tensors of `op` for all, one after the other on dim 0.

    None where nothing multiplies by all of them in one launch.
    """
    function = _one_launch(f"{op}_experts", operands["codes"].device.type, **problem)
    return None if function is None else partial(function, **operands, **problem)


def pick(op: str, device: str = "cpu", **problem: Any) -> Callable:
    """The function that runs `op` on tensors of `device`.

    `kernels/<op>.py` defines `<op>`; `kernels/<op>_triton.py`, where it exists, defines a function of the same name and
    signature and `refuses(device=..., **problem) -> str | None`. Raises ValueError when a forced kernel refuses, with
    its reason.
    """
    forced = _forced()
    reference = getattr(importlib.import_module(f".{op}", __package__), op)
    if forced not in ("", "triton"):
        return reference
    if not (Path(__file__).parent / f"{op}_triton.py").exists():
        reason = f"{op} has no Triton kernel"
    elif device == "cpu" and forced != "triton":
        reason = "tensors are on the CPU"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    else:
        twin = importlib.import_module(f".{op}_triton", __package__)
        reason = twin.refuses(device=device, **problem)
        if reason is None:
            return getattr(twin, op)
    if forced == "triton":
        raise ValueError(f"ACC_KERNELS=triton, but {reason}; unset it to use the default")
    return reference


def _one_launch(op: str, device: str, **problem: Any) -> Callable | None:
    """What `pick` gives for an `op` that stands for several products; None where that runs them one by one."""
    if not (Path(__file__).parent / f"{op}_triton.py").exists():
        return None
    picked = pick(op, device, **problem)
    return picked if picked.__module__.endswith("_triton") else None


def _forced() -> str:
    forced = os.environ.get("ACC_KERNELS", "")
    if forced not in ("", *WAYS):
        raise ValueError(f"ACC_KERNELS={forced!r}: expected one of {', '.join(WAYS)}, or nothing")
    return forced


def computed_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """The type that what is of type `dtype` is best multiplied in: its own, but float32 on a processor without
    instructions for products of that type, where these take 5 to 50 times as long (measured with AVX2)."""
    if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if not torch.backends.mkldnn.is_available():
        return torch.float32
    known = torch.ops.mkldnn
    quick = known._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else known._is_mkldnn_fp16_supported()
    return dtype if quick else torch.float32


class Cached:
    """The product with the dense weight, which is made at the first use, in the type of that `x`, and then kept.

    Where the processor has no products of that type, three tokens and more are multiplied in float32: in bfloat16 these
    took 1.5 to 10 times as long with AVX2, one or two, for which reading the weight is most of the work, less.
    """

    def __init__(self, dequantize: Callable[[torch.dtype], Tensor]):
        self.dequantize = dequantize
        self.weight: Tensor | None = None

    @property
    def kept(self) -> list[Tensor]:
        """What this takes beside the packed weight."""
        return [] if self.weight is None else [self.weight]

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None or self.weight.dtype != x.dtype:
            self.weight = self.dequantize(x.dtype)
        if torch.compiler.is_compiling() or x.numel() <= 2 * x.shape[-1]:
            return F.linear(x, self.weight)
        dtype = computed_in(x.dtype, x.device.type)
        return F.linear(x.to(dtype), self.weight.to(dtype)).to(x.dtype)
