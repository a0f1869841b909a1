"""SpQR: small groups with quantised statistics, and the few weights that matter most kept apart (arXiv 2306.03078)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..calibrate.base import Statistic
from ..calibrate.hessian import normalised
from ..formats.base import Scheme
from ..formats.spqr import SpQRWeight
from . import descent
from .base import Event, Method, around
from .descent import TINY, Matrices, Prepared, feed_forward


class SpQR(Method):
    """Quantises column after column, lets later columns make up for the error, and keeps what cannot be rounded.

    The output error of a layer is quadratic in its weights, with the Hessian `H = 2 E[x xᵀ]`. Each column's error is
    spread over the columns after it as the inverse Hessian says (GPTQ, arXiv 2210.17323). Small groups follow the
    weights closely, and cost little because their scales and zeros are quantised too. A weight whose error would still
    be large, measured at the output, keeps a 16-bit correction; which weights would spoil the grid of their group is
    found by leaving each one out.

    Unlike the authors' code, statistics have their stored precision before codes are chosen, so that the errors made
    up for are those of the file; and their codes are those of least error, not each the nearest to its real value,
    which at the same settings leaves 15% less error with a third fewer outliers (SmolLM2-135M).

    The defaults won the ablation of tests/bench/ablation.py: less damping than the authors', statistics shared by four
    times as many rows and a higher threshold (half a bit less), and learned rounding after it.

    Limits: a correction costs 24 bits, so that with a low threshold another bit per weight is cheaper.
    """

    needs: ClassVar[tuple[str, ...]] = ("hessian",)
    format: ClassVar[str] = "spqr"
    refine: ClassVar[int] = 16

    bits: int = Field(3, ge=2, le=8, description="bits per code")
    group_size: Literal[8, 16, 32, 64, 128] = Field(16, description="inputs that share a scale and a zero")
    scale_bits: int = Field(3, ge=1, le=8, description="bits per scale")
    zero_bits: int = Field(3, ge=1, le=8, description="bits per zero")
    stat_group_size: int = Field(64, ge=2, description="rows whose scales, and zeros, share one second-level grid")
    outlier_threshold: float | None = Field(
        0.5, ge=0, description="relative error above which a weight is kept apart; higher: fewer are; null: none"
    )
    damp_percent: float = Field(0.1, ge=0, description="multiple of its mean added to the Hessian's diagonal")
    sweeps: int = Field(1, ge=0, description="passes over all columns after the first, each weight set anew")
    order: Literal["act_order", "identity"] = Field("act_order", description="strongest inputs first, or as they are")

    def prepare(self, statistics: dict[str, Statistic], event: Event) -> Prepared:
        hessian = normalised(statistics["hessian"], event)
        diagonal = hessian.diagonal()
        perm = torch.arange(len(diagonal), device=diagonal.device)
        if self.order == "act_order":
            perm = diagonal.argsort(descending=True, stable=True)
        return Prepared.of(hessian, perm, self.damp_percent, event)

    def alternatives(self, bits: float) -> list[SpQR]:
        """With larger groups fewer weights are kept apart: both save bits where they are worth least."""
        found = []
        for code, (group, least) in itertools.product(around(bits), ((16, 0.0), (32, 1.0), (64, 2.0))):
            threshold = None if self.outlier_threshold is None else max(self.outlier_threshold, least)
            found.append(self.model_copy(update={"bits": code, "group_size": group, "outlier_threshold": threshold}))
        return found

    def compress(self, weight: Tensor, prepared: Prepared, event: Event) -> SpQRWeight:
        return self.compress_all([weight], [prepared], [event])[0]

    def compress_all(self, weights: list[Tensor], prepared: list[Prepared], events: list[Event]) -> list[SpQRWeight]:
        dtypes = [stat_dtype(weight, event) for weight, event in zip(weights, events)]
        packed: list[SpQRWeight] = []
        for members in side_by_side(weights, dtypes, self.stat_group_size):
            matrices = Matrices([prepared[m] for m in members], [len(weights[m]) for m in members])
            columns = torch.cat([weights[m].float().T[prepared[m].perm] for m in members], 1)  # [I, O], copies
            exact = columns.clone() if self.sweeps else columns
            codes, grids, deltas = solve(columns, matrices, self, dtypes[members[0]])
            for _ in range(self.sweeps):
                sweep(columns, exact, codes, deltas, grids, matrices, self.group_size)
            for m, span in zip(members, matrices.spans):
                packed.append(self.encode(codes[:, span], [g.of(span) for g in grids], deltas[:, span], prepared[m]))
        return packed

    def encode(self, codes: Tensor, grids: list[GroupGrid], deltas: Tensor, prepared: Prepared) -> SpQRWeight:
        """codes and deltas `[I, O]` in packed order, a grid per group of inputs."""
        column, row = deltas.nonzero(as_tuple=True)
        return SpQRWeight.encode(
            codes.T,
            torch.stack([grid.scale_codes for grid in grids]),
            torch.stack([grid.zero_codes for grid in grids]),
            torch.stack([grid.stat for grid in grids]),
            None if self.order == "identity" else prepared.perm,
            (row, column, deltas[column, row]),
            self.scheme(deltas.dtype),
        )

    def scheme(self, dtype: torch.dtype) -> Scheme:
        """What `SpQRWeight` needs to know of the settings; statistics and corrections are stored in `dtype`."""
        settings = self.model_dump(exclude={"outlier_threshold", "damp_percent", "sweeps"})
        return {**settings, "stat_dtype": str(dtype).removeprefix("torch.")}

    def planned(self, shape: tuple[int, int]) -> tuple[Scheme, dict[str, int]]:
        """The number of outliers is what matrices of real models had on average: see `outlier_share`."""
        share = outlier_share(self.bits, self.outlier_threshold)
        return {"format": self.format, **self.scheme(torch.float16)}, {"outliers": round(share * shape[0] * shape[1])}


# Share of the weights kept apart, by the square of a step of the grid, in units of the threshold: between what
# SmolLM2-135M and the demo model had with groups of 16 and 32 (tests/bench/results/{ablation-*,demo,smollm2-135m}.json;
# at 0.04 and below, where it adds less than 0.04 bits, one of them has up to twice as many and the other half).
OUTLIER_SHARES = (
    (0.0044, 0.00003),
    (0.0222, 0.0004),
    (0.0408, 0.0011),
    (0.102, 0.0108),
    (0.1111, 0.0122),
    (0.2222, 0.0278),
    (0.5556, 0.0916),
)


def outlier_share(bits: int, threshold: float | None) -> float:
    """An estimate, before any data: along straight lines between what was measured, both axes logarithmic."""
    if threshold is None:
        return 0.0
    if threshold == 0:
        return 1.0  # whatever cannot be told exactly
    points = [(math.log(step), math.log(share)) for step, share in OUTLIER_SHARES]
    at = -math.log(threshold) - 2 * math.log((1 << bits) - 1)
    segment = sum(at > step for step, _ in points[1:-1])
    (left, low), (right, high) = points[segment : segment + 2]
    return math.exp(min(0.0, low + (high - low) * (at - left) / (right - left)))


def side_by_side(weights: list[Tensor], dtypes: list[torch.dtype], share: int) -> list[list[int]]:
    """Which consecutive matrices are solved as one: equal types, and no second-level group across their border."""
    batches: list[list[int]] = []
    for m, dtype in enumerate(dtypes):
        before = batches[-1][-1] if batches else None
        if before is not None and dtypes[before] == dtype and len(weights[before]) % share == 0:
            batches[-1].append(m)
        else:
            batches.append([m])
    return batches


def stat_dtype(weight: Tensor, event: Event) -> torch.dtype:
    """float16 for second-level statistics and outliers, unless weights so small or large would lose digits.

    Measured: down to 2^-18 for the greatest weight float16 errs no more than bfloat16, at 2^-20 1.7 times as much.
    """
    largest = float(weight.abs().amax())
    if largest == 0 or 2**-17 <= largest <= 2**14:
        return torch.float16
    event("stat_dtype", dtype="bfloat16", largest_weight=largest)
    return torch.bfloat16


def solve(
    columns: Tensor, matrices: Matrices, settings: SpQR, dtype: torch.dtype
) -> tuple[Tensor, list[GroupGrid], Tensor]:
    """The column loop over `columns [I, O]`, which is overwritten with what `dequantize` will return.

    Returns codes uint8 `[I, O]`, a grid per group, and corrections `[I, O]` in `dtype`, zero for all but outliers.
    """
    threshold, size, importance = settings.outlier_threshold, settings.group_size, matrices.importance()
    prices = [
        kept_from(columns[:, span], importance[:, m : m + 1], of.dead[:, None], threshold)
        for m, (of, span) in enumerate(zip(matrices.inputs, matrices.spans))
    ]
    price = torch.cat(prices, 1)  # [I, M]
    codes, deltas = torch.empty_like(columns, dtype=torch.uint8), torch.zeros_like(columns, dtype=dtype)
    grids: list[GroupGrid] = []
    tolerance: list[Tensor | None] = []

    def fit_group(group: slice, weigh: Tensor) -> None:
        limit = matrices.spread(price[group])
        grids.append(fit(columns[group], weigh, limit, settings, dtype))
        tolerance.extend(limit / weigh.square() if threshold is not None else [None] * len(limit))

    def round_(j: int, column: Tensor) -> Tensor:
        return round_column(column, codes[j], deltas[j], grids[j // size], tolerance[j])

    feed_forward(columns, matrices, size, fit_group, round_)
    return codes, grids, deltas


def kept_from(columns: Tensor, importance: Tensor, dead: Tensor, relative: float | None) -> Tensor:
    """τ `[I, 1]`, the squared error at the output above which a weight is kept apart: relative to the mean variance of
    weights there. For dead inputs nothing is kept, as nothing of them reaches the output."""
    if relative is None:
        return torch.full_like(importance, torch.inf)
    spread = columns.var(1, keepdim=True) if columns.shape[1] > 1 else columns.square()
    if not spread.any():  # equal rows
        spread = columns.square().mean(1, keepdim=True)
    tau = relative * (spread * importance.square())[~dead].mean()
    return torch.where(dead, torch.inf, tau)


def round_column(column: Tensor, code: Tensor, delta: Tensor, grid: GroupGrid, tolerance: Tensor | None) -> Tensor:
    """Quantises `column [O]` in place, writes its codes and corrections, and returns what was lost."""
    value = (column / grid.step).add_(grid.zero).round_().clamp_(0, grid.top)
    code.copy_(value)
    value.sub_(grid.zero).mul_(grid.scale)
    error = column - value
    if tolerance is not None:
        delta.copy_(torch.where(error.square() > tolerance, error, 0))
        error = column - value.add_(delta)
    column.copy_(value)
    return error


def sweep(
    columns: Tensor,
    exact: Tensor,
    codes: Tensor,
    deltas: Tensor,
    grids: list[GroupGrid],
    matrices: Matrices,
    group_size: int,
) -> None:
    """One pass of coordinate descent. Grids, and which weights are kept apart, stay.

    `exact` are the weights to come close to; `columns`, codes and corrections `[I, O]` are changed in place.
    """

    def round_(j: int, column: Tensor) -> Tensor:
        apart = torch.where(deltas[j] != 0, -1.0, torch.inf)
        return round_column(column, codes[j], deltas[j], grids[j // group_size], apart)

    descent.sweep(columns, exact, matrices, group_size, round_)


@dataclass(frozen=True)
class GroupGrid:
    """The values `scale · (code - zero)`, code 0 to `top`, that the weights of one group may take, row by row."""

    scale: Tensor  # fp32 [O]
    zero: Tensor  # fp32 [O]
    step: Tensor  # fp32 [O], the scale to divide by
    top: int
    scale_codes: Tensor  # uint8 [O]
    zero_codes: Tensor  # uint8 [O]
    stat: Tensor  # [ceil(O / stat_group_size), 4]
    share: int  # stat_group_size

    def of(self, rows: slice) -> GroupGrid:
        """The same for some of the rows, whole second-level groups of them."""
        stat = self.stat[rows.start // self.share : -(-rows.stop // self.share)]
        scale, zero, step = self.scale[rows], self.zero[rows], self.step[rows]
        return GroupGrid(scale, zero, step, self.top, self.scale_codes[rows], self.zero_codes[rows], stat, self.share)


def fit(group: Tensor, importance: Tensor, price: Tensor, settings: SpQR, dtype: torch.dtype) -> GroupGrid:
    """`group [g, O]`, importance and price `[g, O]` or `[g, 1]` -> the grid of each row, its statistics as stored."""
    top, share = (1 << settings.bits) - 1, settings.stat_group_size
    low, high = group.amin(0), group.amax(0)
    if settings.outlier_threshold is not None:
        spoilers = leave_one_out(group, importance, top) > price
        spoilers &= ~spoilers.all(0)
        low = torch.where(spoilers, torch.inf, group).amin(0)
        high = torch.where(spoilers, -torch.inf, group).amax(0)
    scale, _ = even_grid(low, high, top)
    scales = Levels.of(scale, settings.scale_bits, share, dtype)
    scale_codes = scales.nearest(scale)
    # the middle of the grid stays in the middle of the weights, whatever became of the scale
    zero = (top - (low + high) / scales.value(scale_codes).clamp(min=TINY)) / 2
    zero.clamp_(-top, 2 * top)
    zeros = Levels.of(zero, settings.zero_bits, share, dtype)
    scale_codes, zero_codes = search(group, importance, price, top, scales, zeros, scale_codes, zeros.nearest(zero))
    scale, zero = scales.value(scale_codes), zeros.value(zero_codes)
    stat = torch.stack([scales.scale, scales.zero, zeros.scale, zeros.zero], -1)
    return GroupGrid(scale, zero, scale.clamp(min=TINY), top, scale_codes.byte(), zero_codes.byte(), stat, share)


def even_grid(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of `top` even steps from low to high.

    A range further from 0 than it is wide is stretched towards 0: the zero stays within -top and 2 top, where a few
    bits can tell it, and a constant group is exact.
    """
    scale = torch.maximum(high - low, torch.maximum(low, -high)) / top
    return scale, -low / scale.clamp(min=TINY)


def grid_error(
    group: Tensor,
    scale: Tensor,
    zero: Tensor,
    importance: Tensor,
    top: int,
    scratch: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Squared errors at the output `[..., g, O]` of the nearest values of grids with scale and zero `[..., 1, O]`, in
    the second tensor of `scratch` if there is one."""
    step = scale.clamp(min=TINY)
    exact = torch.add(group / step, zero, out=scratch[0])
    return torch.round(exact, out=scratch[1]).clamp_(0, top).sub_(exact).mul_(step * importance).square_()


def leave_one_out(group: Tensor, importance: Tensor, top: int) -> Tensor:
    """By how much less squared error `[g, O]` the group would be rounded, each weight left out in turn.

    Leaving out a weight that is neither the least nor the greatest leaves the grid as it was: the gain is the weight's
    own error. Only for those two is the grid fitted again (to the same range, if there are two of them): O(g), not
    O(g²).
    """
    low, at_low = group.min(0, keepdim=True)
    high, at_high = group.max(0, keepdim=True)
    gain = grid_error(group, *even_grid(low, high, top), importance, top)
    total = gain.sum(0, keepdim=True)
    next_low = group.scatter(0, at_low, torch.inf).amin(0, keepdim=True)
    next_high = group.scatter(0, at_high, -torch.inf).amax(0, keepdim=True)
    for at, left in ((at_low, (next_low, high)), (at_high, (low, next_high))):
        others = grid_error(group, *even_grid(*left, top), importance, top).scatter_(0, at, 0)
        gain.scatter_(0, at, total - others.sum(0, keepdim=True))
    return gain


@dataclass(frozen=True)
class Levels:
    """Second level: the `2^bits` values that a statistic of `share` neighbouring rows may take, as they are stored."""

    top: int
    scale: Tensor  # [ceil(O / share)], in the stored type
    zero: Tensor
    row_scale: Tensor  # the same for each row, fp32 [O]
    row_zero: Tensor

    @classmethod
    def of(cls, values: Tensor, bits: int, share: int, dtype: torch.dtype) -> Levels:
        """Even steps between the least and the greatest of `values [O]` in each `share` rows. Where these are equal, as
        far as the stored type can tell, code 0 meets them."""
        rows, top = len(values), (1 << bits) - 1
        shared = torch.cat([values, values[-1:].expand(-rows % share)]).view(-1, share)
        low, high = shared.amin(1), shared.amax(1)
        largest = torch.maximum(high, -low)
        scale = torch.maximum((high - low) / top, largest * 2**-14).to(dtype)  # the zero must not overflow
        equal = (high - low <= largest * 2**-11) | (scale == 0)
        scale = torch.where(equal, torch.where(largest > 0, largest, 1).to(dtype), scale)
        zero = torch.where(equal, -low.sign(), -low / scale.float()).to(dtype)
        row_scale, row_zero = (t.float().repeat_interleave(share)[:rows] for t in (scale, zero))
        return cls(top, scale, zero, row_scale, row_zero)

    def value(self, codes: Tensor) -> Tensor:
        """fp32 `[..., O]` of codes `[..., O]`, the bits that `kernels.spqr.statistic` computes."""
        return self.row_scale * (codes - self.row_zero)

    def nearest(self, values: Tensor) -> Tensor:
        return (values / self.row_scale + self.row_zero).round().clamp(0, self.top)


def search(
    group: Tensor,
    importance: Tensor,
    price: Tensor,
    top: int,
    scales: Levels,
    zeros: Levels,
    scale: Tensor,
    zero: Tensor,
) -> tuple[Tensor, Tensor]:
    """Codes `[O]` of scale and zero with the least `Σ min(error², τ)`: what errs by more will be kept apart.

    Starts from given codes. Of 3 bits and less all are tried, of more every 8th part and then nearer and nearer ones.
    """
    best = grid_error(group, scales.value(scale), zeros.value(zero), importance, top).clamp_(max=price).sum(0)
    strides = [-(-levels.top // 8) for levels in (scales, zeros)]
    scale_tries = [torch.full_like(scale, code) for code in range(0, scales.top + 1, strides[0])]
    zero_tries = torch.arange(0.0, zeros.top + 1, strides[1], device=zero.device)[:, None].expand(-1, len(zero))
    while True:
        scratch = group.new_empty(len(zero_tries), *group.shape), group.new_empty(len(zero_tries), *group.shape)
        for scale_try in scale_tries:
            values = scales.value(scale_try), zeros.value(zero_tries)[:, None]
            errors = grid_error(group, *values, importance, top, scratch)
            least, at = errors.clamp_(max=price).sum(1).min(0)  # [tries, g, O] -> [O]
            better = least < best
            best = torch.where(better, least, best)
            scale = torch.where(better, scale_try, scale)
            zero = torch.where(better, zero_tries.gather(0, at[None])[0], zero)
        if strides == [1, 1]:
            return scale, zero
        strides = [-(-stride // 2) for stride in strides]
        near = torch.tensor([[-1.0], [0.0], [1.0]], device=zero.device)
        scale_tries = list((scale + strides[0] * near).clamp(0, scales.top))
        zero_tries = (zero + strides[1] * near).clamp(0, zeros.top)
