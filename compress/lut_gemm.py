"""LUT-GEMM: bit planes of plus and minus one, whose scales are fitted to the weights (arXiv 2206.09557)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..calibrate.base import Statistic
from ..calibrate.hessian import inverse_factor, normalised
from ..formats.bcq import BcqWeight
from .base import Event, Method

BLOCK = 128  # columns whose errors reach the columns after them in one matrix product
TINY = 1e-30
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

    Unlike the authors' code there is always an offset, statistics have their stored precision before the last signs are
    chosen, and a group of equal weights is exact. Planes come by falling scale, so that the first are a model of fewer
    bits.

    Limits: the values are symmetric around the offset; a scale per plane makes small groups dear.
    """

    format: ClassVar[str] = "bcq"

    bits: int = Field(3, ge=1, le=8, description="planes")
    group_size: Literal[-1, 8, 16, 32, 64, 128] = Field(128, description="inputs that share scales; -1: a whole row")
    scale_bits: Literal[8, 16] = Field(8, description="bits per scale and offset; 8: with 16-bit scales per row")
    activation_aware: bool = Field(True, description="fit to the layer's output; false: to the weights alone, no data")
    rounds: int = Field(15, ge=0, description="rounds of alternating least squares per group")
    starts: int = Field(3, ge=1, le=3, description="of greedy signs, an even grid and quantiles, the best one is kept")
    damp_percent: float = Field(0.1, ge=0, description="multiple of its mean added to the Hessian's diagonal")
    sweeps: int = Field(2, ge=0, description="passes after the first, scales and then signs of each group set anew")
    order: Literal["group_order", "identity"] = Field(
        "group_order", description="groups, and inputs within them, strongest first; or as they are"
    )

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("hessian",) if self.activation_aware else ()

    def prepare(self, statistics: dict[str, Statistic], event: Event) -> Prepared | None:
        if not self.activation_aware:
            return None
        hessian = normalised(statistics["hessian"], event)
        diagonal = hessian.diagonal().clone()
        groups = list(spans(len(diagonal), self.group_size))
        if self.order == "group_order":
            groups.sort(key=lambda span: -float(diagonal[span].mean()))
            runs = [diagonal[span].argsort(descending=True, stable=True) + span.start for span in groups]
            perm = torch.cat(runs)
        else:
            perm = torch.arange(len(diagonal), device=diagonal.device)
        hessian = hessian[perm][:, perm]
        factor = inverse_factor(hessian, self.damp_percent, event)
        hessian.diagonal().add_(self.damp_percent * diagonal[diagonal > 0].mean())
        return Prepared(perm, groups, factor, hessian)

    def compress(self, weight: Tensor, prepared: Prepared | None, event: Event) -> BcqWeight:
        return self.compress_all([weight], [prepared], [event])[0]

    def compress_all(
        self, weights: list[Tensor], prepared: list[Prepared | None], events: list[Event]
    ) -> list[BcqWeight]:
        dtypes = [scale_dtype(weight, event) for weight, event in zip(weights, events)]
        packed: dict[int, BcqWeight] = {}
        for members in side_by_side(prepared, dtypes):
            rows = torch.cat([weights[m].float() for m in members])
            known = prepared[members[0]]
            if known is None:
                codes, groups, store = self.fit_weights(rows, dtypes[members[0]])
            else:
                codes, groups, store = self.fit_outputs(rows, known, dtypes[members[0]])
            codes, groups = in_order(codes, groups, self.bits, self.group_size)
            cuts = [len(weights[m]) for m in members]
            scales = store.encode(groups)
            for m, part, *stored in zip(members, codes.split(cuts), *(each.split(cuts, -1) for each in scales)):
                packed[m] = self.encode(part, stored, dtypes[m])
        return [packed[m] for m in range(len(weights))]

    def fit_weights(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Store]:
        """`W [O, I]` -> codes `[O, I]` and scales `[G, O, bits + 1]` of least squared error in the weights."""
        groups = torch.stack([fit(rows[:, span], None, self) for span in spans(rows.shape[1], self.group_size)])
        store = Store.of(groups, self.scale_bits, dtype)
        codes = torch.empty_like(rows, dtype=torch.uint8)
        for g, span in enumerate(spans(rows.shape[1], self.group_size)):
            groups[g] = store.round(groups[g])
            codes[:, span] = Codebook.of(groups[g]).nearest(rows[:, span].T)[0].T
        return codes, groups, store

    def fit_outputs(self, rows: Tensor, known: Prepared, dtype: torch.dtype) -> tuple[Tensor, Tensor, Store]:
        """The same of least error in the outputs."""
        columns = rows.T[known.perm]  # [I, O]
        exact = columns.clone() if self.sweeps else columns
        codes, groups = solve(columns, known, self, Store(dtype))
        store = Store.of(groups, self.scale_bits, dtype)
        if store.stat is not None:  # the sweeps make up for what the rounding to 8 bits loses
            groups = store.round(groups)
            for g, span in enumerate(known.places()):
                columns[span] = value_of(codes[span], groups[g])
        for _ in range(self.sweeps):
            sweep(columns, exact, codes, groups, known, store)
        original = torch.empty_like(codes)
        original[known.perm] = codes
        order = sorted(range(len(known.groups)), key=lambda g: known.groups[g].start)
        return original.T, groups[order], store

    def encode(self, codes: Tensor, stored: list[Tensor], dtype: torch.dtype) -> BcqWeight:
        scheme = {
            "bits": self.bits,
            "group_size": self.group_size,
            "scales": "codes" if self.scale_bits == 8 else "free",
            "scale_dtype": str(dtype).removeprefix("torch."),
        }
        scale, offset, *stat = stored
        return BcqWeight.encode(codes, scale, offset, stat[0].contiguous() if stat else None, scheme)


@dataclass(frozen=True)
class Prepared:
    """What matrices with the same input share; columns in the order in which they are solved."""

    perm: Tensor  # int64 [I]: column -> input
    groups: list[slice]  # the inputs of each group, in that order
    factor: Tensor  # U [I, I], upper triangular, Uᵀ U = inverse of the damped Hessian
    hessian: Tensor  # [I, I], damped

    def places(self) -> Iterator[slice]:
        """The columns of each group."""
        last = 0
        for span in self.groups:
            first, last = last, last + span.stop - span.start
            yield slice(first, last)


def spans(columns: int, group_size: int) -> Iterator[slice]:
    size = columns if group_size == -1 else group_size
    return (slice(first, min(first + size, columns)) for first in range(0, columns, size))


def side_by_side(prepared: list[Prepared | None], dtypes: list[torch.dtype]) -> list[list[int]]:
    """Which matrices are solved as one: those that share their input and the type of their scales."""
    batches: dict[tuple[int, torch.dtype], list[int]] = {}
    for m, (known, dtype) in enumerate(zip(prepared, dtypes)):
        batches.setdefault((id(known), dtype), []).append(m)
    return list(batches.values())


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


def fit(weights: Tensor, importance: Tensor | None, settings: LutGemm) -> Tensor:
    """`weights [O, g]`, importance `[g]` -> scales and offset `[O, bits + 1]` of least `Σ importance · error²`."""
    rows = max(1, BUDGET // (weights.shape[1] * 4 + (1 << settings.bits) * 4))
    importance = weights.new_ones(weights.shape[1]) if importance is None else importance / importance.mean()
    parts = [fit_rows(part.T.contiguous(), importance[:, None], settings) for part in weights.split(rows)]
    return torch.cat(parts)


def fit_rows(weights: Tensor, importance: Tensor, settings: LutGemm) -> Tensor:
    """The same for `weights [g, O]`, importance `[g, 1]`: from every start, the best of what they lead to.

    Rows are centred and scaled first, so that no tolerance is absolute; rows of equal weights are all offset.
    """
    middle = (weights * importance).sum(0) / importance.sum()
    size = ((weights - middle).square() * importance).sum(0).div(importance.sum()).sqrt()
    flat = weights.amax(0) == weights.amin(0)
    middle, size = torch.where(flat, weights[0], middle), torch.where(flat, 0.0, size)
    unit = (weights - middle) / torch.where(size > 0, size, 1.0)
    best, least = None, None
    for start in (greedy, even, quantiles)[: settings.starts]:
        scales, error = alternate(unit, importance, start(unit, importance, settings.bits), settings.rounds)
        if best is None or least is None:
            best, least = scales, error
        else:
            best = torch.where((error < least)[:, None], scales, best)
            least = torch.minimum(error, least)
    assert best is not None
    best = best * size[:, None]
    best[:, -1] += middle
    return best


def greedy(weights: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Plane after plane the signs of what is left, with the scale that suits them (A.2 of the paper)."""
    left, scales = weights.clone(), []
    for _ in range(bits):
        scale = (left.abs() * importance).sum(0) / importance.sum()
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


def alternate(weights: Tensor, importance: Tensor, scales: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Nearest values, then scales for their signs, in turn -> scales `[O, bits + 1]` and their error `[O]`.

    Neither step raises the error; ends early when rows gain less than 1e-4 of it on the whole.
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
        scales = least_squares(weights, importance, codes, scales)
    return best, least


def least_squares(weights: Tensor, importance: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Scales `[O, bits + 1]` of least error for given signs, codes int64 `[g, O]`.

    The normal equations need but two sums per code, of the importance and of the weights (spec (h)): O(g), whatever the
    number of planes. Solved for the change from `scales`, which so stay where the signs say nothing of them.
    """
    table = signs(scales.shape[1] - 1, weights.device)
    count, total = (weights.new_zeros(len(table), weights.shape[1]) for _ in range(2))
    count.scatter_add_(0, codes, importance.expand_as(weights))
    total.scatter_add_(0, codes, weights * importance)
    pairs = (table[:, :, None] * table[:, None]).flatten(1)
    matrix = (count.T @ pairs).unflatten(1, (table.shape[1], -1))
    return scales + solve_small(matrix, total.T @ table - (matrix @ scales[..., None])[..., 0])


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


def solve(columns: Tensor, known: Prepared, settings: LutGemm, store: Store) -> tuple[Tensor, Tensor]:
    """The column loop over `columns [I, O]`, which is overwritten with the values of the codes.

    Returns codes uint8 `[I, O]` and scales `[G, O, bits + 1]`. A group's values are fitted when it begins, by what its
    errors would cost after all that later columns can make up for: the inverse square of the factor's diagonal.
    """
    factor, importance = known.factor, 1 / known.factor.diagonal()
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    groups = columns.new_empty(len(known.groups), columns.shape[1], settings.bits + 1)

    def pass_on(first: int, last: int, to: slice) -> None:
        columns[to].addmm_(factor[first:last, to].T, errors[first:last], alpha=-1)

    behind = 0  # the first column whose error has not reached all columns after it
    for g, span in enumerate(known.places()):
        if span.start - behind >= BLOCK:
            pass_on(behind, span.start, slice(span.start, None))
            behind = span.start
        pass_on(behind, span.start, span)
        groups[g] = store.round(fit(columns[span].T, importance[span].square(), settings))
        book = Codebook.of(groups[g])
        for first, last in blocks(span):
            for j in range(first, last):
                code, value = book.nearest(columns[j : j + 1])
                codes[j], errors[j] = code[0], (columns[j] - value[0]) * importance[j]
                columns[j] = value[0]
                columns[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j], alpha=-1)
            if last < span.stop:
                pass_on(first, last, slice(last, None))
                behind = last
    return codes, groups


def blocks(span: slice) -> Iterator[tuple[int, int]]:
    return ((first, min(first + BLOCK, span.stop)) for first in range(span.start, span.stop, BLOCK))


def sweep(columns: Tensor, exact: Tensor, codes: Tensor, groups: Tensor, known: Prepared, store: Store) -> None:
    """Group after group, the scales and then every code are set to the least of `tr(Δ H Δᵀ)` while all else stands.

    Neither raises it. `exact` are the weights to come close to; the other tensors are changed in place.
    """
    error = columns - exact
    for g, span in enumerate(known.places()):
        slope = known.hessian[span] @ error  # half the gradient
        moved = refit(columns[span], codes[span], slope, known.hessian[span, span], groups[g], store)
        columns[span] += moved
        error[span] += moved
        book = Codebook.of(groups[g])
        for first, last in blocks(span):
            hessian = known.hessian[first:last, first:last]
            slope = known.hessian[first:last] @ error
            for i, j in enumerate(range(first, last)):
                code, value = book.nearest((columns[j] - slope[i] / hessian[i, i].clamp(min=TINY))[None])
                step = value[0] - columns[j]
                codes[j] = code[0]
                columns[j] += step
                slope[i + 1 :].addr_(hessian[i, i + 1 :], step)
            error[first:last] = columns[first:last] - exact[first:last]


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
