"""A budget for the whole model: what each part loses at each setting is measured, and the best table for it is proved.

Parts are what a runtime needs in one form: matrices that share an input (q, k, v; gate, up), all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import csr_array
from torch import Tensor, nn

from ..calibrate.program import milp
from ..calibrate.stream import Block, Statistics, Stream
from ..formats.base import PackedWeight
from ..formats.model import Matrix
from ..formats.source import Source
from .apply import STATISTICS_BYTES, passes, solve
from .base import Method
from .recipe import Step
from .refine import Rounding, distance, learn

GAP = 1e-4  # how near to the best a table has to be proved, relative
SECONDS = 60.0  # for proving it


@dataclass(frozen=True)
class Part:
    """Matrices of one block that get one setting: their stored tensors, and how many weights they have."""

    block: int
    tensors: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Choice:
    """A part at one setting: the bytes it would take, and what is lost by it alone."""

    part: Part
    method: str
    settings: Method
    nbytes: int
    firm: bool  # whether it will be just so many bytes, whatever the weights become
    loss: float

    @property
    def bits(self) -> float:
        return 8 * self.nbytes / self.part.weights


@dataclass(frozen=True)
class Table:
    """One choice for every part. Of those within the same limit, none has less than `bound` of what was to be least:
    of the sum of what parts lose, or of bytes."""

    choices: tuple[Choice, ...]
    bound: float

    @property
    def loss(self) -> float:
        return sum(choice.loss for choice in self.choices)

    @property
    def nbytes(self) -> int:
        return sum(choice.nbytes for choice in self.choices)

    def steps(self) -> list[Step]:
        """The steps of a recipe: one for each setting, with the tensors that it is for."""
        tensors: dict[tuple[str, Method], list[str]] = {}
        for choice in self.choices:
            tensors.setdefault((choice.method, choice.settings), []).extend(choice.part.tensors)
        return [
            Step(method=method, targets=tuple(names), settings=settings)
            for (method, settings), names in tensors.items()
        ]


@torch.no_grad()
def measure(
    source: Source,
    targets: set[str],
    methods: Sequence[tuple[str, Method]],
    batches: Sequence[Tensor],
    *,
    bits: float,
    scaled: bool = True,
    refine: int = 0,
    per_expert: bool = False,
    device: str = "cpu",
    report: Callable[[float, str], None] = lambda fraction, what: None,
) -> list[list[Choice]]:
    """What each part of `targets` loses at each of `methods`, alone, in an otherwise dense model in fp32.

    `batches` are token ids `[B, T]`; the first of them is what losses are measured on. A loss is the squared error of
    the block's output relative to each token's size.

    With `refine` steps of learned rounding, taken on the other batches at the setting that is nearest to `bits` stored
    bits, all losses of a part shrink by the share that these take away. It may be two thirds of what is lost in q and
    k, and nothing of what is lost in the last projection of a block, so a mix that is refined afterwards is another
    than one that is not.

    Where they are to be `scaled`, losses become what they do to the logits: each part's output at that setting is
    carried through the blocks after it, and its loss is the mean divergence KL(dense || packed) in nats per token. One
    pass over the model does it for all parts.
    """
    stream = Stream(source, dtype=torch.float32, device=device)
    needs = tuple(dict.fromkeys(n for _, method in methods for n in method.needs))
    table: list[list[Choice]] = []
    carried: list[Tensor] = []  # of the parts, where losses are scaled: hidden states of the first batch
    places: list[int] = []  # which of its choices was carried, for each part
    for block in stream.blocks(batches):
        report(block.index / len(stream.skeleton.layers), f"measuring {block.name}")
        wanted, before = [matrix for matrix in block.matrices if matrix.tensor in targets], len(carried)
        steps = [{name: Step(method=kind, settings=method) for name in targets} for kind, method in methods]
        groups = passes(wanted, steps[0], max(STATISTICS_BYTES, block.nbytes)) if wanted else []
        if not groups:
            block.run()
        for group in groups:
            statistics = block.observe(group, needs, outputs=block.outputs is None)  # and who shares an input
            made = [{m: packed for m, packed, _ in solve(block, group, step, statistics)} for step in steps]
            for part in parts(block, group, statistics, per_expert):
                inside = [matrix for matrix in group if matrix.tensor in part.tensors]
                packed = [{matrix: each[matrix] for matrix in inside} for each in made]
                sizes = [sum(map(_nbytes, each.values())) for each in packed]
                nearest = min(range(len(sizes)), key=lambda at: abs(8 * sizes[at] / part.weights - bits))
                losses, output = _losses(block, packed, nearest, statistics, refine)
                table.append(
                    [
                        Choice(part, kind, method, nbytes, all(map(_firm, each.values())), loss)
                        for (kind, method), each, nbytes, loss in zip(methods, packed, sizes, losses, strict=True)
                    ]
                )
                if scaled:
                    places.append(nearest)
                    carried.append(output)
            del statistics, made
        carried = [block.forward(0, hidden) if at < before else hidden for at, hidden in enumerate(carried)]
    if scaled:
        table = _scaled(stream, table, places, carried)
    stream.close()
    return table


def parts(block: Block, group: Sequence[Matrix], statistics: Statistics, per_expert: bool) -> Iterator[Part]:
    """Cuts matrices of a block into parts: linears by the input they share, experts by their layer or one by one.

    Matrices of one stored tensor stay together."""
    members: dict[object, list[Matrix]] = {}
    of_tensor: dict[str, object] = {}
    for matrix in group:
        if matrix.role == "linear":
            key: object = statistics.key(matrix)
        else:
            key = (matrix.module, matrix.expert if per_expert else None)
        key = of_tensor.setdefault(matrix.tensor, key)
        members.setdefault(key, []).append(matrix)
    for matrices in members.values():
        names = dict.fromkeys(matrix.tensor for matrix in matrices)
        yield Part(block.index, tuple(names), sum(m.shape[0] * m.shape[1] for m in matrices))


def best_table(options: Sequence[Sequence[Choice]], limit: int) -> Table:
    """The table of least loss that takes at most `limit` bytes.

    Raises ValueError, naming the least that is possible, when even the smallest choices take more."""
    least = sum(min(choice.nbytes for choice in choices) for choices in options)
    if least > limit:
        raise ValueError(
            f"the budget leaves {limit:,} bytes for packed weights; the smallest settings take {least:,} bytes:"
            " allow so much, or pack more of the model with --targets"
        )
    return _proved(options, lambda choice: choice.loss, lambda choice: choice.nbytes, limit)


def smallest_table(options: Sequence[Sequence[Choice]], most: float) -> Table:
    """The table of fewest bytes that loses at most `most`, in the sum of what parts lose.

    Raises ValueError, naming the least loss that is possible, when even the best choices lose more."""
    least = sum(min(choice.loss for choice in choices) for choices in options)
    if least > most:
        raise ValueError(
            f"no settings lose less than {least:.3g} together, {most:g} is allowed: allow so much, or leave"
            " sensitive tensors as they are with --ignore"
        )
    return _proved(options, lambda choice: choice.nbytes, lambda choice: choice.loss, most)


def _proved(
    options: Sequence[Sequence[Choice]],
    least: Callable[[Choice], float],
    limited: Callable[[Choice], float],
    limit: float,
) -> Table:
    """The table with the least sum of one thing whose sum of another is within a limit: one integer program (HiGHS)."""
    flat = [choice for choices in options for choice in choices]
    costs, sizes = (np.array([float(of(choice)) for choice in flat]) for of in (least, limited))
    owners = np.repeat(np.arange(len(options)), [len(choices) for choices in options])
    one_each = csr_array((np.ones(len(flat)), (owners, np.arange(len(flat)))), shape=(len(options), len(flat)))
    scale = costs.max() or 1.0
    found = milp(
        costs / scale,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint((sizes / (limit or 1.0))[None], -np.inf, 1)],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None:
        raise ValueError(f"no table was found within {SECONDS:.0f} seconds ({found.message}); try fewer settings")
    taken = tuple(choice for choice, chosen in zip(flat, found.x, strict=True) if chosen > 0.5)
    return Table(taken, float(found.mip_dual_bound) * scale)


def _losses(
    block: Block, packed: Sequence[dict[Matrix, PackedWeight]], nearest: int, statistics: Statistics, refine: int
) -> tuple[list[float], Tensor]:
    """What the block's output for the first batch loses with some of its weights packed, at each setting; and that
    output at the `nearest`, learned if it is to be."""
    assert block.outputs is not None
    target, others = block.outputs[0], range(min(1, len(block.outputs) - 1), len(block.outputs))
    losses, kept = [], torch.empty(0)
    for at, made in enumerate(packed):
        with _instead(block, made):
            output = block.forward(0)
        losses.append(float(distance(output, target)))
        kept = output if at == nearest else kept
    if not refine or losses[nearest] == 0:
        return losses, kept
    known = {matrix: statistics.of(matrix).values() for matrix in packed[nearest]}
    begun = {matrix: Rounding.of(made, block.weight(matrix), known[matrix]) for matrix, made in packed[nearest].items()}
    if roundings := {matrix: rounding for matrix, rounding in begun.items() if rounding is not None}:
        with _instead(block, packed[nearest]):
            learn(block, roundings, block.outputs, [others[step % len(others)] for step in range(refine)])
            output = block.forward(0)
        share = float(distance(output, target)) / losses[nearest]
        if share < 1:
            losses, kept = [loss * share for loss in losses], output
    return losses, kept


@contextmanager
def _instead(block: Block, made: dict[Matrix, PackedWeight]) -> Iterator[None]:
    """Some of a block's weights packed; they are put back."""
    places = block.places(list(made))
    kept = [cut(parameter.data).clone() for parameter, cut in places]
    _put(places, [packed.dequantize() for packed in made.values()])
    try:
        yield
    finally:
        _put(places, kept)


def _put(places: list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]], weights: list[Tensor]) -> None:
    for (parameter, cut), weight in zip(places, weights, strict=True):
        cut(parameter.data).copy_(weight)


def _nbytes(packed: PackedWeight) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors().values())


def _firm(packed: PackedWeight) -> bool:
    return all(None not in size for size, _ in packed.layout(packed.shape, packed.scheme).values())


def _scaled(stream: Stream, table: list[list[Choice]], scaled: list[int], carried: list[Tensor]) -> list[list[Choice]]:
    """Losses at the blocks' outputs, as divergences of the logits: in proportion, from the one that was carried."""
    dense = next(stream.logits())
    found = []
    for choices, at, logits in zip(table, scaled, stream.logits_of(0, carried), strict=True):
        here = choices[at].loss
        factor = divergence(dense, logits) / here if here > 0 else 0.0
        found.append([replace(choice, loss=choice.loss * factor) for choice in choices])
    return found


def divergence(dense: Tensor, logits: Tensor) -> float:
    """KL(dense || logits) of `[B, T, V]`, the mean over positions, in nats."""
    total = 0.0
    for here, there in zip(dense.flatten(0, 1).split(256), logits.flatten(0, 1).split(256), strict=True):
        log_p, log_q = here.double().log_softmax(-1), there.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return max(total, 0.0) / (dense.shape[0] * dense.shape[1])
