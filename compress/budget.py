"""A budget for the whole model: what each part loses at each setting is measured, and the best table for it is proved.

Parts are what a runtime needs in one form: matrices that share an input (q, k, v; gate, up), all experts of a layer.
"""

from __future__ import annotations

import math
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
FLOOR = 0.2  # of a part's share by its weights: so much of its block's loss is a part's at least, as learning is noisy
COMPARED = 256  # tokens whose logits are in memory at once
IN_FP64 = 64  # of these, whose divergence is being summed


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
    bits, a block loses what is left when all its parts are learned together, and a part's share of that is what is
    gained when it is dense while the others are learned. Alone a part does not show it: q and k would lose most and
    learn most of it back, and the last projections take on errors of the others. What a part loses at other settings
    is in proportion to the errors of its matrices, since what learning leaves grows with these; not learned, a few
    tokens may make up most of it.

    Where losses are to be `scaled`, they become what they do to the logits: outputs at that setting, of each part alone
    or of the whole block if it was learned, are carried through the blocks after it, and lose the mean divergence
    KL(dense || packed) in nats per token. One pass over the model does it for all parts.
    """
    stream = Stream(source, dtype=torch.float32, device=device)
    needs = tuple(dict.fromkeys(n for _, method in methods for n in method.needs))
    table: list[list[Choice]] = []
    carried: list[Tensor] = []  # hidden states of the first batch, where losses are scaled
    origin: list[tuple[int, float]] = []  # of each part: what was carried for it, and what of the block that had lost
    for block in stream.blocks(batches):
        report(block.index / len(stream.skeleton.layers), f"measuring {block.name}")
        wanted, before = [matrix for matrix in block.matrices if matrix.tensor in targets], len(carried)
        steps = [{name: Step(method=kind, settings=method) for name in targets} for kind, method in methods]
        groups = passes(wanted, steps[0], max(STATISTICS_BYTES, block.nbytes)) if wanted else []
        if not groups:
            block.run()
        kinds: list[_Kind] = []
        for group in groups:
            statistics = block.observe(group, needs, outputs=block.outputs is None)  # and who shares an input
            made = [_solved(block, group, step, statistics) for step in steps]
            for whole in parts(block, group, statistics, per_expert=False):
                inside = [matrix for matrix in group if matrix.tensor in whole.tensors]
                pieces = [_Piece(part, made, inside, bits) for part in parts(block, inside, statistics, per_expert)]
                kind = _Kind(pieces, _roundings(block, pieces, statistics) if refine else {})
                for piece in pieces:
                    piece.measure(block, learned=bool(kind.roundings))
                kinds.append(kind)
            del statistics, made
        pieces = [piece for kind in kinds for piece in kind.pieces]
        together = _together(block, kinds, refine) if any(kind.roundings for kind in kinds) else None
        table += [piece.choices(methods) for piece in pieces]
        if scaled and together is not None:
            origin += [(before, together[0])] * len(pieces)
            carried.append(together[1])
        elif scaled:
            origin += [(before + at, piece.lost) for at, piece in enumerate(pieces)]
            carried += [piece.output for piece in pieces]
        carried = [block.forward(0, hidden) if at < before else hidden for at, hidden in enumerate(carried)]
    if scaled:
        table = _scaled(stream, table, origin, carried)
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


Made = dict[Matrix, tuple[PackedWeight, float]]  # packed, and its relative error


def _solved(block: Block, group: list[Matrix], step: dict[str, Step], statistics: Statistics) -> Made:
    return {m: (packed, record["relative_error"]) for m, packed, record in solve(block, group, step, statistics)}


class _Piece:
    """A part at every setting: its bytes and, once measured, what is lost; its packed weights at the one that is
    `nearest` to the bits that are wanted."""

    def __init__(self, part: Part, made: Sequence[Made], inside: Sequence[Matrix], bits: float):
        own = [matrix for matrix in inside if matrix.tensor in part.tensors]
        self.part, self._made = part, [{matrix: each[matrix] for matrix in own} for each in made]
        self.sizes = [sum(_nbytes(packed) for packed, _ in each.values()) for each in self._made]
        self.firm = [all(_firm(packed) for packed, _ in each.values()) for each in self._made]
        self.nearest = min(range(len(made)), key=lambda at: abs(8 * self.sizes[at] / part.weights - bits))
        self.packed = {matrix: packed for matrix, (packed, _) in self._made[self.nearest].items()}
        self.losses: list[float] = []
        self.output = torch.empty(0)

    @property
    def lost(self) -> float:
        return self.losses[self.nearest]

    def measure(self, block: Block, learned: bool) -> None:
        """What the block's output `[B, T, H]` for the first batch loses with this part packed, and that output at the
        nearest setting; if it will be learned, at that one, and at others in proportion to the matrices' own errors."""
        assert block.outputs is not None
        found: dict[int, float] = {}
        for at in [self.nearest] if learned else range(len(self._made)):
            with _instead(block, {matrix: packed for matrix, (packed, _) in self._made[at].items()}):
                output = block.forward(0)
            found[at] = float(distance(output, block.outputs[0]))
            self.output = output if at == self.nearest else self.output
        if learned:
            errors = [sum(math.prod(m.shape) * error for m, (_, error) in made.items()) for made in self._made]
            self.losses = [found[self.nearest] * error / (errors[self.nearest] or 1.0) for error in errors]
        else:
            self.losses = list(found.values())
        self._made = []

    def choices(self, methods: Sequence[tuple[str, Method]]) -> list[Choice]:
        each = zip(methods, self.sizes, self.firm, self.losses, strict=True)
        return [Choice(self.part, *method, nbytes, firm, loss) for method, nbytes, firm, loss in each]


@dataclass
class _Kind:
    """The parts of a block that share an input, or its experts: what is learned, or left dense, as one."""

    pieces: list[_Piece]
    roundings: dict[Matrix, Rounding]  # where learning begins

    @property
    def packed(self) -> dict[Matrix, PackedWeight]:
        return {matrix: packed for piece in self.pieces for matrix, packed in piece.packed.items()}

    @property
    def weights(self) -> int:
        return sum(piece.part.weights for piece in self.pieces)

    def scale(self, lost: float) -> None:
        """Makes all that is lost at the nearest settings `lost`, and the rest in proportion."""
        known = sum(piece.lost for piece in self.pieces)
        for piece in self.pieces:
            piece.losses = [loss * lost / known if known > 0 else 0.0 for loss in piece.losses]


def _roundings(block: Block, pieces: Sequence[_Piece], statistics: Statistics) -> dict[Matrix, Rounding]:
    found = {}
    for matrix, packed in ((matrix, packed) for piece in pieces for matrix, packed in piece.packed.items()):
        begun = Rounding.of(packed, block.weight(matrix), statistics.of(matrix).values())
        if begun is not None:
            found[matrix] = begun
    return found


def _together(block: Block, kinds: Sequence[_Kind], steps: int) -> tuple[float, Tensor]:
    """Scales losses to what is left when a block's parts are learned together, and to each one's share of that.

    Returns what is left, and the block's output `[B, T, H]`."""
    outputs = block.outputs
    assert outputs is not None
    others = range(min(1, len(outputs) - 1), len(outputs))
    order = [others[step % len(others)] for step in range(steps)]

    def left(dense: _Kind | None = None) -> tuple[float, Tensor]:
        """With one kind dense. As in a run, what was learned is left out where it does not help."""
        packed, learned = {}, {}
        for kind in kinds:
            if kind is not dense:
                packed |= kind.packed
                learned |= {matrix: rounding.copy() for matrix, rounding in kind.roundings.items()}
        found = []
        with _instead(block, packed):
            found.append(block.forward(0))
            if learned:
                learn(block, learned, outputs, order)
                found.append(block.forward(0))
        return min(((float(distance(output, outputs[0])), output) for output in found), key=lambda each: each[0])

    lost, output = left()
    every = sum(kind.weights for kind in kinds)
    shares = [max(lost - left(kind)[0], FLOOR * lost * kind.weights / every) for kind in kinds]
    for kind, share in zip(kinds, shares, strict=True):
        kind.scale(lost * share / (sum(shares) or 1.0))
    return lost, output


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


def _scaled(
    stream: Stream, table: list[list[Choice]], origin: list[tuple[int, float]], carried: list[Tensor]
) -> list[list[Choice]]:
    """Losses at the blocks' outputs, as divergences of the logits: in proportion, from what was carried."""
    diverged = [0.0] * len(carried)
    for at, dense, logits in stream.compared(0, carried, COMPARED):
        diverged[at] += divergence(dense, logits) * dense.shape[1] / carried[at].shape[1]
    found = []
    for choices, (at, lost) in zip(table, origin, strict=True):
        factor = diverged[at] / lost if lost > 0 else 0.0
        found.append([replace(choice, loss=choice.loss * factor) for choice in choices])
    return found


def divergence(dense: Tensor, logits: Tensor) -> float:
    """KL(dense || logits) of `[B, T, V]`, the mean over positions, in nats."""
    total = 0.0
    for here, there in zip(dense.flatten(0, 1).split(IN_FP64), logits.flatten(0, 1).split(IN_FP64), strict=True):
        log_p, log_q = here.double().log_softmax(-1), there.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return max(total, 0.0) / (dense.shape[0] * dense.shape[1])
