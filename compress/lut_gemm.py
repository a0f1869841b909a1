"""LUT-GEMM: bit planes of plus and minus one, whose scales are fitted to the weights (arXiv 2206.09557)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..calibrate.base import Statistic
from ..calibrate.hessian import normalised
from ..formats.bcq import BcqWeight
from .base import Event, Method, around
from .descent import TINY, Matrices, Prepared, feed_forward, strongest_first, sweep

BUDGET = 1 << 24  # numbers that a step of the solver holds at once; rows beyond wait
FEW = 32  # levels up to which a weight is compared with each


class LutGemm(Method):
    """Writes each group of weights as a sum of bit planes with a scale each, plus an offset.

    `q` planes with free scales give `2^q` values that need not be evenly spaced, and a kernel can multiply by planes
    without ever forming a weight. Scales and offset are fitted by alternating least squares from several starts: given
    the signs the scales have a closed form, given the scales each weight takes the nearest value.

    With `activation_aware` this happens inside GPTQ's column loop (arXiv 2210.17323): a group's values are fitted with
    the weights that its errors have at the output, later columns make up for what earlier ones lost, and sweeps set
    scales and then signs anew, each to the least error at the output while all else stands.

    Without it an error counts in relation to its column, as weights are small where inputs are large, and one value is
    zero wherever a group has weights on both sides of it. Fitted to squared errors, as the paper does, a model loses
    more than by rounding though its weights err less: those of the largest inputs are next to zero, and no value is.
    Starts are even grids there: from the others errors end lower, by leaving out weights that models need more.

    Unlike the authors' code there is always an offset, statistics have their stored precision before the last signs are
    chosen, and a group of equal weights is exact. Planes come by falling scale, so that the first are a model of fewer
    bits.

    Limits: the values are symmetric around the offset; a scale per plane makes small groups dear; 8-bit scales are too
    coarse for more than about six planes.
    """

    format: ClassVar[str] = "bcq"

    bits: int = Field(3, ge=1, le=8, description="planes")
    group_size: Literal[-1, 8, 16, 32, 64, 128] = Field(128, description="inputs that share scales; -1: a whole row")
    scale_bits: Literal[8, 16] = Field(8, description="bits per scale and offset; 8: with 16-bit scales per row")
    activation_aware: bool = Field(True, description="fit to the layer's output; false: to the weights alone, no data")
    rounds: int = Field(10, ge=0, description="rounds of alternating least squares per group")
    starts: int = Field(
        4, ge=1, le=4, description="a clipped grid, quantiles, signs, a full grid: the best; without data four grids"
    )
    damp_percent: float = Field(0.1, ge=0, description="multiple of its mean added to the Hessian's diagonal")
    sweeps: int = Field(2, ge=0, description="passes after the first, scales and then signs of each group set anew")
    order: Literal["group_order", "identity"] = Field(
        "group_order", description="groups, and inputs within them, strongest first; or as they are"
    )

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("hessian",) if self.activation_aware else ()

    @property
    def refine(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 16 if self.activation_aware else 0

    def alternatives(self, bits: float) -> list[LutGemm]:
        sizes = itertools.product(around(bits), (32, 64, 128))
        return [self.model_copy(update={"bits": code, "group_size": group}) for code, group in sizes]

    def prepare(self, statistics: dict[str, Statistic], event: Event) -> Prepared | None:
        if not self.activation_aware:
            return None
        hessian = normalised(statistics["hessian"], event)
        perm = torch.arange(len(hessian), device=hessian.device)
        if self.order == "group_order":
            perm = strongest_first(hessian.diagonal(), width(len(hessian), self.group_size))
        return Prepared.of(hessian, perm, self.damp_percent, event)

    def compress(self, weight: Tensor, prepared: Prepared | None, event: Event) -> BcqWeight:
        return self.compress_all([weight], [prepared], [event])[0]

    def compress_all(
        self, weights: list[Tensor], prepared: list[Prepared | None], events: list[Event]
    ) -> list[BcqWeight]:
        dtypes = [scale_dtype(weight, event) for weight, event in zip(weights, events)]
        packed: dict[int, BcqWeight] = {}
        for dtype in dict.fromkeys(dtypes):
            members = [m for m in range(len(weights)) if dtypes[m] == dtype]
            rows = [weights[m].float() for m in members]
            known = [one for m in members if (one := prepared[m]) is not None]
            codes, groups, store = self.fit_outputs(rows, known, dtype) if known else self.fit_weights(rows, dtype)
            codes, groups = in_order(codes, groups, self.bits, self.group_size)
            cuts = [len(each) for each in rows]
            parts = zip(codes.split(cuts), *(stored.split(cuts, -1) for stored in store.encode(groups)))
            for m, (own, *scales) in zip(members, parts):
                packed[m] = self.encode(own, scales, dtype)
        return [packed[m] for m in range(len(weights))]

    def fit_weights(self, weights: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Store]:
        """`W [O, I]`, one above the other -> codes `[O, I]` and scales `[G, O, bits + 1]`, of least squared error in
        relation to the column's size."""
        columns = torch.cat(weights).T.contiguous()
        importance = torch.cat([relative(weight)[:, None].expand(-1, len(weight)) for weight in weights], 1)
        places = list(spans(len(columns), self.group_size))
        zero = self.bits > 1  # of two values both are needed
        groups = torch.stack([fit(columns[place], importance[place], self, zero) for place in places])
        store = Store.of(groups, self.scale_bits, dtype)
        groups = store.round(groups)
        codes = [Codebook.of(scales).nearest(columns[place])[0].byte() for scales, place in zip(groups, places)]
        return torch.cat(codes).T, groups, store

    def fit_outputs(
        self, weights: list[Tensor], known: list[Prepared], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Store]:
        """The same of least error in the outputs."""
        matrices = Matrices(known, [len(weight) for weight in weights])
        columns = torch.cat([weight.T[one.perm] for one, weight in zip(known, weights)], 1)  # [I, O]
        exact = columns.clone()
        solved = solve(columns, matrices, self, Store(dtype))
        store = solved.store = Store.of(solved.groups, self.scale_bits, dtype)
        if store.stat is not None:  # the sweeps make up for what the rounding to 8 bits loses
            solved.put_all(store.round(solved.groups), columns)
        for _ in range(self.sweeps):
            rescale(columns, exact, solved, matrices)
            sweep(columns, exact, matrices, solved.group_size, solved.round)
        codes, groups = torch.empty_like(solved.codes), torch.empty_like(solved.groups)
        for one, rows in zip(known, matrices.spans):
            codes[one.perm, rows] = solved.codes[:, rows]
            groups[one.perm[:: solved.group_size] // solved.group_size, rows] = solved.groups[:, rows]
        return codes.T, groups, store

    def encode(self, codes: Tensor, stored: list[Tensor], dtype: torch.dtype) -> BcqWeight:
        scheme = {
            "bits": self.bits,
            "group_size": self.group_size,
            "scales": "codes" if self.scale_bits == 8 else "free",
            "scale_dtype": str(dtype).removeprefix("torch."),
        }
        scale, offset, *stat = stored
        return BcqWeight.encode(codes, scale, offset, stat[0].contiguous() if stat else None, scheme)


def relative(weight: Tensor) -> Tensor:
    """`[O, I]` -> the inverse mean square of each column `[I]`, of those with next to nothing in them as if of 1%."""
    square = weight.square().mean(0)
    return 1 / square.clamp(min=1e-4 * float(square.mean()) + TINY)


def width(columns: int, group_size: int) -> int:
    return columns if group_size == -1 else group_size


def spans(columns: int, group_size: int) -> Iterator[slice]:
    size = width(columns, group_size)
    return (slice(first, min(first + size, columns)) for first in range(0, columns, size))


def scale_dtype(weight: Tensor, event: Event) -> torch.dtype:
    """float16, unless weights so small or large would lose digits; where formats/spqr.py draws the line too."""
    largest = float(weight.abs().amax())
    if largest == 0 or 2**-17 <= largest <= 2**14:
        return torch.float16
    event("scale_dtype", dtype="bfloat16", largest_weight=largest)
    return torch.bfloat16


@dataclass(frozen=True)
class Store:
    """How scales and offsets `[..., O, bits + 1]`, the offset last, are rounded and stored."""

    dtype: torch.dtype
    stat: Tensor | None = None  # [2, O], for 8-bit codes

    @classmethod
    def of(cls, groups: Tensor, scale_bits: int, dtype: torch.dtype) -> Store:
        """For 8-bit codes the greatest of each row's scales and offsets `[G, O, bits + 1]` have the last code."""
        if scale_bits == 16:
            return cls(dtype)
        largest = groups.abs().amax(0)  # [O, bits + 1]
        stat = torch.stack([largest[:, :-1].amax(-1) / 255, largest[:, -1] / 127])
        return cls(dtype, stat.to(dtype))

    def of_rows(self, rows: slice) -> Store:
        return self if self.stat is None else Store(self.dtype, self.stat[:, rows])

    def codes(self, groups: Tensor) -> Tensor:
        """The 8-bit codes as real numbers; the sign of a scale is kept, which its signs take up later."""
        assert self.stat is not None
        of_scale, of_offset = (row[:, None].clamp(min=TINY) for row in self.stat.float())
        scale = (groups[..., :-1] / of_scale).round_().clamp_(-255, 255)
        return torch.cat([scale, (groups[..., -1:] / of_offset).round_().clamp_(-128, 127)], -1)

    def round(self, groups: Tensor) -> Tensor:
        """`[..., O, bits + 1]` as they will be read back, in fp32."""
        if self.stat is None:
            return groups.to(self.dtype).float()
        of_scale, of_offset = (row[:, None] for row in self.stat.float())
        codes = self.codes(groups)
        return torch.cat([codes[..., :-1] * of_scale, codes[..., -1:] * of_offset], -1)

    def encode(self, groups: Tensor) -> list[Tensor]:
        """Rounded `[G, O, bits + 1]` with scales of 0 and more -> scale `[G, bits, O]`, offset `[G, O]`, stat."""
        if self.stat is None:
            kept = groups.to(self.dtype)
            return [kept[..., :-1].transpose(1, 2), kept[..., -1]]
        codes = self.codes(groups)
        return [codes[..., :-1].transpose(1, 2).byte(), (codes[..., -1] + 128).byte(), self.stat]


def signs(bits: int, device: torch.device) -> Tensor:
    """`[2^bits, bits + 1]`: what each code takes of the scales, plus or minus one, and of the offset, one."""
    codes = torch.arange(1 << bits, device=device)[:, None]
    planes = (codes >> torch.arange(bits, device=device) & 1) * 2.0 - 1
    return torch.cat([planes, torch.ones_like(planes[:, :1])], 1)


def value_of(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes `[g, O]`, scales `[O, bits + 1]` -> the values `[g, O]`."""
    return (signs(scales.shape[1] - 1, scales.device) @ scales.T).gather(0, codes.long())


class Codebook(NamedTuple):
    """The `2^bits` values that the weights of a group may take, row by row, in rising order."""

    values: Tensor  # [2^bits, O]
    codes: Tensor  # the code of each, int64 [2^bits, O]
    between: Tensor  # [2^bits - 1, O]: where the nearest one changes; for many values [O, 2^bits - 1]

    @classmethod
    def of(cls, scales: Tensor) -> Codebook:
        """scales `[O, bits + 1]`."""
        values, codes = (signs(scales.shape[1] - 1, scales.device) @ scales.T).sort(0)
        between = (values[1:] + values[:-1]) / 2
        return cls(values, codes, between if len(values) <= FEW else between.T.contiguous())

    def nearest(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, O]` -> the codes int64 and the values of the nearest, `[n, O]`."""
        if len(self.values) > FEW:
            place = torch.searchsorted(self.between, weights.T.contiguous()).T
        else:
            count = torch.zeros_like(weights, dtype=torch.uint8)
            for edge in self.between:
                count += weights > edge
            place = count.long()
        return self.codes.gather(0, place), self.values.gather(0, place)


def fit(weights: Tensor, importance: Tensor, settings: LutGemm, zero: bool = False) -> Tensor:
    """`weights [g, O]`, importance `[g, O]` or `[g, 1]` -> scales and offset `[O, bits + 1]` of least
    `Σ importance · error²`; with `zero` among those that one value is zero of, where weights are on both sides."""
    importance = importance / importance.mean(0)
    rows = max(1, BUDGET // (4 * (len(weights) + (1 << settings.bits))))
    cuts = [part.contiguous() for part in importance.split(rows, 1)] if importance.shape[1] > 1 else None
    parts = weights.split(rows, 1)
    each = (fit_rows(p, importance if cuts is None else cuts[i], settings, zero) for i, p in enumerate(parts))
    return torch.cat(list(each))


def fit_rows(weights: Tensor, importance: Tensor, settings: LutGemm, zero: bool) -> Tensor:
    """The same for as many rows as are taken at once: from every start, the best of what they lead to.

    Rows are centred (but on zero where a value has to be zero) and scaled first, so that no tolerance is absolute; rows
    of equal weights are all offset.
    """
    low, high = weights.aminmax(dim=0)
    flat = low == high
    anchored = (low <= 0) & (high >= 0) & ~flat if zero else None
    middle = (weights * importance).sum(0) / importance.sum(0)
    if anchored is not None:
        middle = torch.where(anchored, 0.0, middle)
    size = ((weights - middle).square() * importance).sum(0).div(importance.sum(0)).sqrt()
    middle, size = torch.where(flat, weights[0], middle), torch.where(flat, 0.0, size)
    unit = (weights - middle) / torch.where(size > 0, size, 1.0)
    best = torch.zeros(weights.shape[1], settings.bits + 1, device=weights.device)
    least = torch.full_like(middle, torch.inf)
    for start in (GRIDS if zero else STARTS)[: settings.starts]:
        begun = start(unit, importance, settings.bits)
        if anchored is not None:
            begun = torch.where(anchored[:, None], through_zero(begun), begun)
        scales, error = alternate(unit, importance, begun, settings.rounds, anchored)
        best = torch.where((error < least)[:, None], scales, best)
        least = torch.minimum(error, least)
    best *= size[:, None]
    best[:, -1] += middle
    return best


def greedy(weights: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Plane after plane the signs of what is left, with the scale that suits them (A.2 of the paper)."""
    left, scales = weights.clone(), []
    for _ in range(bits):
        scale = (left.abs() * importance).sum(0) / importance.sum(0)
        left -= torch.where(left >= 0, scale, -scale)
        scales.append(scale)
    return torch.stack([*scales, torch.zeros_like(scales[0])], 1)


def even(weights: Tensor, importance: Tensor, bits: int) -> Tensor:
    """An even grid from the least weight to the greatest."""
    low, high = weights.aminmax(dim=0)
    step = (high - low) / ((1 << bits) - 1)
    return torch.stack([*(step * 2.0 ** (bits - 2 - b) for b in range(bits)), (high + low) / 2], 1)


def quantiles(weights: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Free values that equally many weights are nearest to, and the planes closest to those."""
    ranks = weights.argsort(0).argsort(0)
    codes = ranks * (1 << bits) // len(weights)
    codes = sum(((codes >> b & 1) << (bits - 1 - b) for b in range(bits)), torch.zeros_like(codes))
    start = torch.zeros(weights.shape[1], bits + 1, device=weights.device)
    return least_squares(weights, importance, codes, start)


def grid(share: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    """An even grid over so much of their range."""
    return lambda weights, importance, bits: share * even(weights, importance, bits)


STARTS = (grid(0.7), quantiles, greedy, even)
GRIDS = tuple(grid(share) for share in (1.0, 0.9, 0.75, 0.6))  # where one value is to be zero


def through_zero(scales: Tensor) -> Tensor:
    """Scales `[O, bits + 1]` whose values are shifted so that the one nearest to zero is zero, and signs are turned so
    that it is the one with every sign minus: the offset is the sum of the scales."""
    table = signs(scales.shape[1] - 1, scales.device)
    nearest = (table @ scales.T).abs().argmin(0)
    turned = -table[nearest, :-1] * scales[:, :-1]
    return torch.cat([turned, turned.sum(1, keepdim=True)], 1)


def alternate(
    weights: Tensor, importance: Tensor, scales: Tensor, rounds: int, anchored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Nearest values, then scales for their signs, in turn -> scales `[O, bits + 1]` and their error `[O]`.

    Rows that are `anchored [O]` begin as `through_zero` makes them and stay so. Neither step raises the error; ends
    early when rows gain less than 1e-4 of it on the whole.
    """
    best, least = scales, torch.full_like(weights[0], torch.inf)
    for turn in range(rounds + 1):
        codes, values = Codebook.of(scales).nearest(weights)
        error = ((weights - values).square_() * importance).sum(0)
        better = error < least
        gain = float((least - error)[better].sum()) if turn else torch.inf
        best, least = torch.where(better[:, None], scales, best), torch.minimum(error, least)
        if turn == rounds or gain <= 1e-4 * float(least.sum()):
            break
        scales = least_squares(weights, importance, codes, scales, anchored)
    return best, least


def least_squares(
    weights: Tensor, importance: Tensor, codes: Tensor, scales: Tensor, anchored: Tensor | None = None
) -> Tensor:
    """Scales `[O, bits + 1]` of least error for given signs, codes int64 `[g, O]`; in rows that are `anchored` the
    offset stays the sum of the others.

    The normal equations need but two sums per code, of the importance and of the weights: O(g), whatever the
    number of planes. Solved for the change from `scales`, which so stay where the signs say nothing of them.
    """
    table = signs(scales.shape[1] - 1, weights.device)
    count, total = (weights.new_zeros(len(table), weights.shape[1]) for _ in range(2))
    count.scatter_add_(0, codes, importance.expand_as(weights))
    total.scatter_add_(0, codes, weights * importance)
    pairs = (table[:, :, None] * table[:, None]).flatten(1)
    matrix = (count.T @ pairs).unflatten(1, (table.shape[1], -1))
    right = total.T @ table - (matrix @ scales[..., None])[..., 0]
    if anchored is None or not anchored.any():
        return scales + solve_small(matrix, right)
    tied = torch.cat([torch.eye(table.shape[1] - 1), torch.ones(1, table.shape[1] - 1)]).to(matrix)
    change = solve_small(tied.T @ matrix @ tied, right @ tied) @ tied.T
    if not anchored.all():
        change = torch.where(anchored[:, None], change, solve_small(matrix, right))
    return scales + change


def solve_small(matrix: Tensor, right: Tensor) -> Tensor:
    """`[O, n, n]`, symmetric and not negative, and `[O, n]` -> the solutions `[O, n]`, by elimination on all rows at
    once, in fp64. A ridge of 1e-8 of the mean diagonal keeps what is undetermined small."""
    n = right.shape[1]
    work = torch.cat([matrix, right[..., None]], 2).permute(1, 2, 0).double()  # [n, n + 1, O]
    ridge = 1e-8 * sum(work[i, i] for i in range(n)) / n + TINY
    for i in range(n):
        work[i] /= (work[i, i] + ridge).clamp(min=TINY)
        others = [k for k in range(n) if k != i]
        work[others] -= work[others, i, None] * work[i]
    return work[:, n].T.to(right.dtype)


class Solved:
    """Codes uint8 `[I, O]` of matrices side by side, and scales `[G, O, bits + 1]` of their groups as stored, both in
    packed order."""

    def __init__(self, columns: Tensor, settings: LutGemm, store: Store):
        self.group_size, self.store = width(len(columns), settings.group_size), store
        self.places = list(spans(len(columns), settings.group_size))
        self.codes = torch.empty_like(columns, dtype=torch.uint8)
        self.groups = columns.new_zeros(len(self.places), columns.shape[1], settings.bits + 1)
        self._books: list[Codebook] = [Codebook.of(scales) for scales in self.groups]

    def put(self, group: int, scales: Tensor) -> None:
        self.groups[group] = scales
        self._books[group] = Codebook.of(self.groups[group])

    def put_all(self, groups: Tensor, columns: Tensor) -> None:
        """Other scales for the codes that are there; `columns [I, O]` become what they now mean."""
        for group, (scales, place) in enumerate(zip(groups, self.places)):
            self.put(group, scales)
            columns[place] = value_of(self.codes[place], scales)

    def round(self, j: int, column: Tensor) -> Tensor:
        """Rounds column j `[O]` in place, keeps its codes, and returns what was lost."""
        code, value = self._books[j // self.group_size].nearest(column[None])
        self.codes[j] = code[0]
        lost = column - value[0]
        column.copy_(value[0])
        return lost


def solve(columns: Tensor, matrices: Matrices, settings: LutGemm, store: Store) -> Solved:
    """The column loop over `columns [I, O]`, which is overwritten with the values of the codes.

    A group's values are fitted when it begins, by what its errors would cost after all that later columns can make up
    for: the inverse square of the factor's diagonal.
    """
    solved = Solved(columns, settings, store)

    def fit_group(group: slice, importance: Tensor) -> None:
        found = fit(columns[group], importance.square(), settings)
        solved.put(group.start // solved.group_size, store.round(found))

    feed_forward(columns, matrices, solved.group_size, fit_group, solved.round)
    return solved


def rescale(columns: Tensor, exact: Tensor, solved: Solved, matrices: Matrices) -> None:
    """Sets the scales of group after group to the least of `tr(Δ H Δᵀ)` while all else stands, which never raises it.

    `exact` are the weights to come close to; `columns [I, O]` follow the scales.
    """
    error = columns - exact
    for group, place in enumerate(solved.places):
        scales = solved.groups[group].clone()
        for of, rows in zip(matrices.inputs, matrices.spans):
            slope = of.hessian[place] @ error[:, rows]  # half the gradient
            store = solved.store.of_rows(rows)
            moved = refit(
                columns[place, rows], solved.codes[place, rows], slope, of.hessian[place, place], scales[rows], store
            )
            columns[place, rows] += moved
            error[place, rows] += moved
        solved.put(group, scales)


def refit(values: Tensor, codes: Tensor, slope: Tensor, hessian: Tensor, scales: Tensor, store: Store) -> Tensor:
    """Scales `[O, bits + 1]` of one group, changed in place, for given codes `[g, O]` -> by how much its values move.

    With the signs `Φ [g, bits + 1]` of a row, the change `θ` of least output error solves `Φᵀ H Φ θ = -Φᵀ slope`. Rows
    that would lose by rounding the scales as stored keep theirs.
    """
    table = signs(scales.shape[1] - 1, scales.device)
    wanted = torch.empty_like(scales)
    rows = max(1, BUDGET // (2 * len(values) * table.shape[1]))
    for first in range(0, len(scales), rows):
        part = slice(first, first + rows)
        taken = table[codes[:, part].T.long()]  # [O, g, bits + 1]
        matrix = taken.mT @ (hessian @ taken)
        wanted[part] = scales[part] + solve_small(matrix, -(taken.mT @ slope[:, part].T[..., None])[..., 0])
    wanted = store.round(wanted)
    moved = value_of(codes, wanted) - values
    gains = (moved * (2 * slope + hessian @ moved)).sum(0) < 0
    scales.copy_(torch.where(gains[:, None], wanted, scales))
    return torch.where(gains, moved, 0.0)


def in_order(codes: Tensor, groups: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """The same weights with scales that are not negative and fall from plane to plane: codes `[O, I]`, scales
    `[G, O, bits + 1]`."""
    turned = torch.empty_like(codes)
    ordered = groups.clone()
    for g, span in enumerate(spans(codes.shape[1], group_size)):
        size, plane = groups[g, :, :-1].abs().sort(dim=1, descending=True, stable=True)
        negative = (groups[g, :, :-1] < 0).gather(1, plane).byte()
        ordered[g, :, :-1] = size
        here = torch.zeros_like(codes[:, span])
        for b in range(bits):
            here |= ((codes[:, span] >> plane[:, b, None].byte() & 1) ^ negative[:, b, None]) << b
        turned[:, span] = here
    return turned, ordered
