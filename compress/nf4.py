"""NF4: each weight to the nearest quantile of a normal distribution (QLoRA, arXiv 2305.14314). Needs no data."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from ..formats.nf4 import Nf4Weight
from ..kernels.nf4 import BLOCK, NESTED, block_scales, dynamic_map, levels
from .base import Event, Method

LEAST = 1e-38  # a block of zeros is divided by this


class Nf4(Method):
    """Divides each block of 64 weights by its greatest and rounds to one of 16 values that a normal weight takes
    equally often.

    Trained weights are close to normal, so that the codes are used evenly. `double_quant` stores the blocks' scales in
    8 bits: their mean, and the rest as dynamic codes by blocks of 256. Without it the codes are bitsandbytes', bit for
    bit; with it they are chosen for the scales as stored, where bitsandbytes takes those before rounding.

    Experts are packed like any matrix, which bitsandbytes' own integration does not do. `acc export --to bnb` writes
    linear layers as stock transformers loads them.

    Limits: nothing is known of the inputs. A block with a weight far above the others loses them, and with
    `double_quant` so do the scales of the 255 blocks around it.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    format: ClassVar[str] = "nf4"

    bits: Literal[4] = Field(4, description="bits per code")
    double_quant: bool = Field(False, description="scales in 8 bits: 4.13 bits per weight instead of 4.5")

    def compress(self, weight: Tensor, prepared: Any, event: Event) -> Nf4Weight:
        blocks = in_blocks(weight.float())
        absmax = blocks.abs().amax(1)
        stored = nested(absmax) if self.double_quant else (absmax, None, None)
        codes = nearest(blocks, block_scales(*stored)).view(-1)[: weight.numel()].view(weight.shape)
        return Nf4Weight.encode(codes, *stored)


def in_blocks(weight: Tensor) -> Tensor:
    """`W [O, I]` -> `[B, 64]`, row after row; zeros fill the last block."""
    flat = weight.flatten()
    return pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def nested(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales `[B]` -> their codes uint8 `[B]`, the codes' scales `[ceil(B / 256)]`, their mean `[1]`; section 3."""
    offset = absmax.mean()[None]
    groups = pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    scale = groups.abs().amax(1)
    codes = _nearest_of(dynamic_map(absmax.device), groups, scale)
    return codes.view(-1)[: len(absmax)], scale, offset


def nearest(blocks: Tensor, scale: Tensor) -> Tensor:
    """Blocks `[B, 64]`, their scales `[B]` -> codes uint8 `[B, 64]`; equation 4."""
    return _nearest_of(levels(blocks.device), blocks, scale)


def _nearest_of(values: Tensor, groups: Tensor, scale: Tensor) -> Tensor:
    """The value nearest to each number divided by its group's scale, as an index."""
    scaled = groups * (1 / scale.clamp(min=LEAST))[:, None]
    return torch.bucketize(scaled, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
