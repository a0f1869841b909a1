"""NF4: each weight to the nearest quantile of a normal distribution (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from ..calibrate.base import Statistic
from ..calibrate.hessian import normalised
from ..formats.nf4 import Nf4Weight
from ..kernels.nf4 import BLOCK, NESTED, block_scales, dynamic_map, levels
from .base import Event, Method
from .descent import Matrices, Prepared, feed_forward

SHARES = [0.7 + 0.025 * step for step in range(15)]  # of a block's greatest weight, to 1.05
LEAST = 1e-38  # a block of zeros is divided by this


class Nf4(Method):
    """Divides each block of 64 weights by its greatest and rounds to one of 16 values that a normal weight takes
    equally often.

    Trained weights are close to normal, so that the codes are used evenly. `double_quant` stores the blocks' scales in
    8 bits: their mean, and the rest as dynamic codes by blocks of 256. Without it the codes are bitsandbytes', bit for
    bit; with it they are chosen for the scales as stored, where bitsandbytes takes those before rounding.

    Experts are packed like any matrix, which bitsandbytes' own integration does not do. `acc export --to bnb` writes
    linear layers as stock transformers loads them.

    `activation_aware` is GPTQ (arXiv 2210.17323) with these values for a grid: one input after the other, the error of
    each made up for by those after it; and each block's scale is the share of its greatest weight that errs least,
    errors weighed as the inverse Hessian says. The file is of the same form and size.

    Limits: without it, nothing is known of the inputs. A block with a weight far above the others loses them, and with
    `double_quant` so do the scales of the 255 blocks around it.
    """

    format: ClassVar[str] = "nf4"

    bits: Literal[4] = Field(4, description="bits per code")
    double_quant: bool = Field(False, description="scales in 8 bits: 4.13 bits per weight instead of 4.5")

    activation_aware: bool = Field(False, description="later inputs make up for the errors of earlier ones; needs text")
    damp_percent: float = Field(0.1, ge=0, description="multiple of its mean added to the Hessian's diagonal, if so")

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("hessian",) if self.activation_aware else ()

    def prepare(self, statistics: dict[str, Statistic], event: Event) -> Prepared | None:
        if not self.activation_aware:
            return None
        hessian = normalised(statistics["hessian"], event)
        return Prepared.of(hessian, torch.arange(len(hessian), device=hessian.device), self.damp_percent, event)

    def compress(self, weight: Tensor, prepared: Prepared | None, event: Event) -> Nf4Weight:
        if prepared is not None and weight.shape[1] % BLOCK:
            event("rounding", reason=f"{weight.shape[1]} inputs are no multiple of {BLOCK}")
            prepared = None
        blocks = in_blocks(weight.float())
        absmax = blocks.abs().amax(1)
        if prepared is not None:
            absmax = best_scales(blocks, absmax, prepared.factor.diagonal())
        stored = nested(absmax) if self.double_quant else (absmax, None, None)
        scales = block_scales(*stored)
        if prepared is not None:
            codes = made_up_for(weight.float(), scales.view(len(weight), -1), prepared)
        else:
            codes = nearest(blocks, scales).view(-1)[: weight.numel()].view(weight.shape)
        return Nf4Weight.encode(codes, *stored)


def in_blocks(weight: Tensor) -> Tensor:
    """`W [O, I]` -> `[B, 64]`, row after row; zeros fill the last block."""
    flat = weight.flatten()
    return pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def best_scales(blocks: Tensor, absmax: Tensor, diagonal: Tensor) -> Tensor:
    """Blocks `[B, 64]` of rows of `I` weights, diagonal of the factor `[I]` -> the scale of each, `[B]`, among shares
    of its greatest weight, of least squared error, each weight's divided by the square of its diagonal entry."""
    importance = (1 / diagonal.square()).view(-1, BLOCK).repeat(len(blocks) * BLOCK // len(diagonal), 1)
    best, least = absmax, torch.full_like(absmax, torch.inf)
    for share in SHARES:
        scale = absmax * share
        delta = levels(blocks.device)[nearest(blocks, scale).int()] * scale[:, None] - blocks
        loss = (delta.square() * importance).sum(1)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best


def made_up_for(weight: Tensor, scales: Tensor, prepared: Prepared) -> Tensor:
    """`W [O, I]`, scales `[O, I / 64]` -> codes `[O, I]`, each input's error made up for by those after it."""
    columns, values = weight.T.contiguous(), levels(weight.device)
    codes = torch.empty_like(columns, dtype=torch.uint8)

    def round_(j: int, column: Tensor) -> Tensor:
        scale = scales[:, j // BLOCK]
        codes[j] = nearest(column[:, None], scale)[:, 0]
        value = values[codes[j].int()] * scale
        error = column - value
        column.copy_(value)
        return error

    feed_forward(columns, Matrices([prepared], [len(weight)]), BLOCK, lambda group, importance: None, round_)
    return codes.T.contiguous()


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
