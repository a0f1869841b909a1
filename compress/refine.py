"""Learned rounding: what a block's weights were rounded to is set anew so that the block's output comes out closer.

SignRound (arXiv 2309.05516), begun from what a method made instead of from the nearest values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy

import torch
from torch import Tensor

from ..calibrate.base import Statistic
from ..calibrate.stream import Block, Hidden
from ..formats.base import Grid, Levels, PackedWeight
from ..formats.model import Matrix

REACH = 0.5  # about twice as far as all steps together move a weight, in steps of its grid
STEP_TOKENS = 2048  # of one step: the batches that a run is cut into
MEASURED = 4  # batches, spread over all, that tell whether it helped


class Rounding:
    """The codes of one matrix while they are learned: a real number for each, whose nearest integer is the code."""

    def __init__(self, packed: PackedWeight, levels: Grid | Levels, aim: Tensor):
        """`aim [O, I]`: what each weight would best be if it were not rounded. There it starts, or at the near edge of
        its code; so what was rounded far is what changes first."""
        self.packed, self.levels = packed, levels
        edge = 0.5 - 2**-11
        self.value = (levels.places(aim) - levels.codes).clamp_(-edge, edge).add_(levels.codes)

    @classmethod
    def of(cls, packed: PackedWeight, weight: Tensor, statistics: Iterable[Statistic]) -> Rounding | None:
        """For what was made of `weight [O, I]`, with what is known of its input; None where there are no codes to
        learn."""
        levels = packed.levels()
        if levels is None:
            return None
        error = packed.dequantize() - weight.float()
        known = next((statistic for statistic in statistics if statistic.tokens), None)
        return cls(packed, levels, weight + (known.alone(error) if known is not None else torch.zeros_like(error)))

    def copy(self) -> Rounding:
        """One that is learned apart from this."""
        other = copy(self)
        other.value = self.value.clone()
        return other

    def codes(self) -> Tensor:
        return self.value.round().clamp_(0, self.levels.top)

    def dense(self) -> Tensor:
        """`[O, I]` as `dequantize` will give it."""
        return self.levels.weights(self.codes())

    def descend(self, gradient: Tensor, rate: float) -> None:
        """One step against the sign of the loss's gradient `[O, I]` by the dense weight."""
        self.value.sub_(self.levels.slopes(gradient), alpha=rate)

    def pack(self) -> PackedWeight:
        return self.packed.with_codes(self.codes().byte())


def distance(output: Tensor, target: Tensor) -> Tensor:
    """The squared error of `[B, T, H]` relative to each token's own size, which a norm takes out: the mean."""
    target = target.float()
    size = target.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((output.float() - target).square().mean(-1) / size).mean()


@torch.no_grad()
def refine(
    block: Block,
    roundings: dict[Matrix, Rounding],
    targets: Hidden,
    steps: int,
    seed: int,
    tick: Callable[[], None],
) -> dict[str, float]:
    """Learns the codes of a block's matrices in `steps` steps of signed descent, each on one batch.

    `targets` are the block's outputs `[B, T, H]` with its dense weights, for the same inputs. Returns how far its
    outputs are from them before and after, over a few batches. The block is left with packed weights in its parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(targets), generator=generator) for _ in range(-(-steps // len(targets)))])

    def measure() -> float:
        batches = range(0, len(targets), -(-len(targets) // MEASURED))
        return sum(float(distance(block.forward(batch), targets[batch])) for batch in batches) / len(batches)

    put(block, roundings)
    before = measure()
    learn(block, roundings, targets, order[:steps].tolist(), tick)
    return {"before": before, "after": measure()}


def put(block: Block, roundings: dict[Matrix, Rounding]) -> None:
    """Writes the weights that the codes stand for into the block's parameters."""
    for (parameter, cut), rounding in zip(block.places(list(roundings)), roundings.values(), strict=True):
        cut(parameter.data).copy_(rounding.dense())


def learn(
    block: Block,
    roundings: dict[Matrix, Rounding],
    targets: Hidden,
    order: Sequence[int],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Steps of signed descent, one on each batch of `order`, ever shorter. The block is left with the weights that were
    learned."""
    places = block.places(list(roundings))
    parameters = list(dict.fromkeys(parameter for parameter, _ in places))
    try:
        for step, batch in enumerate(order):
            for parameter in parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                loss = distance(block.forward(batch), targets[batch])
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = dict(zip(parameters, found, strict=True))
            for rounding, (parameter, cut) in zip(roundings.values(), places, strict=True):
                if (gradient := gradients[parameter]) is not None:
                    rounding.descend(cut(gradient).float(), REACH / len(order) * (1 - step / len(order)))
            put(block, roundings)
            tick()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
