"""SpQR: small groups with quantised statistics, and the few weights that matter most kept apart (arXiv 2306.03078)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..calibrate.base import Statistic
from ..formats.spqr import SpQRWeight
from ..kernels.spqr import statistic
from .base import Event, Method

BLOCK = 128  # columns whose errors reach the columns after them in one matrix product


@dataclass(frozen=True)
class Prepared:
    """What matrices with the same input share, columns in packed order."""

    perm: Tensor  # packed column -> input, int64 [I]
    factor: Tensor  # U [I, I], upper triangular, Uᵀ U = inverse of the damped Hessian
    dead: Tensor  # bool [I]: inputs that were always zero


class SpQR(Method):
    """Quantises column after column; columns not yet done make up for the error, and weights that cannot be rounded are kept.

    The output error of a layer is quadratic in the weights, with the Hessian `H = 2 E[x xᵀ]`. Going through the columns of `W`,
    each error is spread over later columns as the inverse Hessian says (GPTQ, arXiv 2210.17323). Groups of few
    weights follow the weights closely; their scales and zeros are themselves quantised, so that they cost less than half a bit.
    A weight whose error would still be large, in units of the output, keeps a 16-bit correction. Which weights would spoil
    their group's grid is found by leaving each out (section 4 of the paper).

    Differs from the authors' code: statistics are rounded to their stored precision before codes are chosen, so the
    errors made up for are those of the file; an outlier is a correction added to the nearest code; dead inputs take no part
    in the threshold; a grid never lies further from zero than its own width.

    Limits: corrections are 16 bits of value and 8 of position each, so a low threshold costs more than another bit per weight.
    """

    needs: ClassVar[tuple[str, ...]] = ("hessian",)
    format: ClassVar[str] = "spqr"

    bits: int = Field(3, ge=2, le=8, description="bits per code")
    group_size: Literal[8, 16, 32, 64, 128] = Field(16, description="inputs that share a scale and a zero")
    scale_bits: int = Field(3, ge=1, le=8, description="bits per scale")
    zero_bits: int = Field(3, ge=1, le=8, description="bits per zero")
    stat_group_size: int = Field(16, ge=2, description="rows whose scales share a scale of scales")
    outlier_threshold: float | None = Field(
        0.2, ge=0, description="error, relative to the spread of the weights, above which a weight is kept; higher: fewer; null: none"
    )
    damp_percent: float = Field(1.0, ge=0, description="multiple of its mean that is added to the Hessian's diagonal")
    order: Literal["act_order", "identity"] = Field("act_order", description="columns with the largest inputs first, or as they are")

    def prepare(self, statistics: dict[str, Statistic], event: Event) -> Prepared:
        hessian = usable(statistics["hessian"], event)
        diagonal = hessian.diagonal()
        perm = torch.arange(len(diagonal), device=diagonal.device)
        if self.order == "act_order":
            perm = diagonal.argsort(descending=True, stable=True)
        hessian = hessian[perm][:, perm]
        return Prepared(perm, inverse_factor(hessian, self.damp_percent, event), hessian.diagonal() == 0)

    def compress(self, weight: Tensor, prepared: Prepared, event: Event) -> SpQRWeight:
        columns = weight.float().T[prepared.perm]  # [I, O], a copy
        dtype = stat_dtype(columns, event)
        codes, scale, zero, stat, outliers = solve(columns, prepared, self, dtype)
        return SpQRWeight.encode(
            codes.T,
            scale,
            zero,
            stat,
            None if self.order == "identity" else prepared.perm,
            outliers,
            {
                **self.model_dump(include={"bits", "group_size", "scale_bits", "zero_bits", "stat_group_size", "order"}),
                "stat_dtype": str(dtype).removeprefix("torch."),
            },
        )


def usable(statistic: Statistic, event: Event) -> Tensor:
    """The Hessian `[I, I]`, its mean diagonal 1; the identity, which makes of SpQR a rounding, when nothing is known."""
    hessian = statistic.value()
    mean = float(hessian.diagonal().mean())
    if statistic.tokens and 0 < mean < float("inf") and torch.isfinite(hessian).all():
        return hessian / mean
    event("rounding", reason="no tokens" if not statistic.tokens else "inputs are all zero" if mean == 0 else "hessian is not finite")
    return torch.eye(len(hessian), device=hessian.device)


def inverse_factor(hessian: Tensor, damp_percent: float, event: Event) -> Tensor:
    """`U` upper triangular with `Uᵀ U = (H + λ)^-1`, by one factorisation: with `J` the reversal of order and `L` the Cholesky
    factor of `J (H + λ) J`, `U = J L^-1 J`. Tries harder, and says so, when the matrix is not positive in fp32."""
    live = hessian.diagonal()[hessian.diagonal() > 0]
    flipped = hessian.flip(0, 1)
    attempts = [(torch.float32, damp_percent)] + [(torch.float64, max(damp_percent, f)) for f in (0.0, 0.01, 0.1, 1.0)]
    for dtype, damp in attempts:
        damped = flipped.to(dtype, copy=True)
        damped.diagonal().add_(damp * live.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=dtype, device=lower.device), upper=False)
            factor = inverse.flip(0, 1).float()
            if torch.isfinite(factor).all() and (factor.diagonal() > 0).all():
                if (dtype, damp) != attempts[0]:
                    event("damping_retry", dtype=str(dtype).removeprefix("torch."), damp_percent=damp)
                return factor
    event("rounding", reason="the Hessian has no Cholesky factor")
    return torch.eye(len(hessian), device=hessian.device)


def stat_dtype(columns: Tensor, event: Event) -> torch.dtype:
    """float16 for second-level statistics and outliers, unless the weights are so small or large that it would lose digits."""
    largest = float(columns.abs().amax()) if columns.numel() else 0.0
    if largest == 0 or 2**-9 <= largest <= 2**14:
        return torch.float16
    event("stat_dtype", dtype="bfloat16", largest_weight=largest)
    return torch.bfloat16


def solve(columns: Tensor, prepared: Prepared, settings: SpQR, dtype: torch.dtype) -> tuple[Tensor, list[Grid], Tensor]:
    """The column loop over `Wᵀ [I, O]` in packed order, which is overwritten with what `dequantize` will return.

    Returns codes uint8 `[I, O]`, a grid per group, and corrections `[I, O]` in `dtype`, zero for all but the outliers.
    """
    inputs = len(columns)
    factor, tau = prepared.factor, threshold(columns, prepared, settings.outlier_threshold)
    importance = 1 / factor.diagonal()[:, None]  # of an error in a column for the layer's output
    tolerance = torch.where(prepared.dead, torch.inf, tau * factor.diagonal().square()).tolist()
    codes, deltas = torch.empty_like(columns, dtype=torch.uint8), torch.zeros_like(columns, dtype=dtype)
    grids = []
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = torch.empty_like(columns[start:stop])
        for first in range(start, stop, settings.group_size):
            last = min(first + settings.group_size, stop)
            live = ~prepared.dead[first:last, None]
            grid = fit(columns[first:last], importance[first:last], live, tau, settings, dtype)
            for j in range(first, last):
                errors[j - start] = round_column(columns[j], codes[j], deltas[j], grid, tolerance[j]) * importance[j]
                columns[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j - start], alpha=-1)
            columns[last:stop].addmm_(factor[first:last, last:stop].T, errors[first - start : last - start], alpha=-1)
            grids.append(grid)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes, grids, deltas


def threshold(columns: Tensor, prepared: Prepared, relative: float | None) -> float:
    """The squared error, in units of the output, above which a weight is kept: relative to the mean over live columns of their
    variance in those units (step 6 of the algorithm)."""
    if relative is None:
        return torch.inf
    spread = columns.var(1) if columns.shape[1] > 1 else columns.square().mean(1)
    if not spread.any():
        spread = columns.square().mean(1)
    return relative * float((spread / prepared.factor.diagonal().square())[~prepared.dead].mean())


def round_column(column: Tensor, code: Tensor, delta: Tensor, grid: Grid, tolerance: float) -> Tensor:
    """Quantises `column [O]` in place, writes its codes and corrections, and returns what was lost."""
    value = (column / grid.step).add_(grid.zero).round_().clamp_(0, grid.top)
    code.copy_(value)
    value.sub_(grid.zero).mul_(grid.scale)
    error = column - value
    if tolerance < torch.inf:
        delta.copy_(torch.where(error.square() > tolerance, error, 0))
        value.add_(delta)
        error = column - value
    column.copy_(value)
    return error


@dataclass(frozen=True)
class Grid:
    """The values `scale · (code - zero)`, codes from 0 to `top`, that the weights of one group of each row may take."""

    scale: Tensor  # fp32 [O]
    zero: Tensor  # fp32 [O]
    top: int
    scale_codes: Tensor  # uint8 [O]
    zero_codes: Tensor  # uint8 [O]
    stat: Tensor  # [ceil(O / stat_group_size), 4]

    @cached_property
    def step(self) -> Tensor:
        """The scale to divide by: a group of zeros has scale 0, and any code."""
        return torch.where(self.scale > 0, self.scale, torch.inf)


def fit(group: Tensor, importance: Tensor, live: Tensor, tau: float, settings: SpQR, dtype: torch.dtype) -> Grid:
    """`group [g, O]`, importance and live `[g, 1]` -> the grid of each row, from statistics as they are stored."""
    top = (1 << settings.bits) - 1
    low, high = group.amin(0), group.amax(0)
    if tau < torch.inf:
        spoilers = leave_one_out(group, importance, tau, top) & live
        spoilers &= ~spoilers.all(0)
        low = torch.where(spoilers, torch.inf, group).amin(0)
        high = torch.where(spoilers, -torch.inf, group).amax(0)
    scale, _ = even_grid(low, high, top)
    scales = Levels.of(scale, settings.scale_bits, settings.stat_group_size, dtype)
    scale_codes = scales.nearest(scale)
    # with the scale that is stored, the middle of the grid stays in the middle of the weights
    middle = (low + high) / 2 / scales.value(scale_codes).clamp(min=TINY)
    zero = (top / 2 - middle).clamp(-top, 2 * top)
    zeros = Levels.of(zero, settings.zero_bits, settings.stat_group_size, dtype)
    scale_codes, zero_codes = search(group, importance, tau, top, scales, zeros, scale_codes, zeros.nearest(zero))
    stat = torch.stack([scales.scale, scales.zero, zeros.scale, zeros.zero], -1)
    return Grid(scales.value(scale_codes), zeros.value(zero_codes), top, scale_codes, zero_codes, stat)


def even_grid(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and zero `[O]` of `top + 1` even steps from low to high. A range further from 0 than its width is widened, so that
    the zero stays between -top and 2 top and constant weights, zero or not, are exact."""
    scale = torch.maximum(high - low, torch.maximum(low, -high)) / top
    return scale, -low / scale.clamp(min=TINY)


def grid_error(group: Tensor, scale: Tensor, zero: Tensor, importance: Tensor, top: int) -> Tensor:
    """Squared errors in units of the output, `[..., g, O]`, of the nearest values of grids `scale · (code - zero)`, `[..., 1, O]`."""
    exact = group / torch.where(scale > 0, scale, torch.inf) + zero
    return exact.round().clamp_(0, top).sub_(exact).mul_(scale * importance).square_()


def leave_one_out(group: Tensor, importance: Tensor, tau: float, top: int) -> Tensor:
    """bool `[g, O]`: weights without which the rest of their group is rounded better by more than `tau` (step 7).

    Leaving out a weight that is not extremal leaves the grid as it was: the gain is the weight's own error. Only for the
    least and the greatest is the grid fitted again; if there are two of them, to the same range. So O(g) per row, not O(g²).
    """
    low, at_low = group.min(0, keepdim=True)
    high, at_high = group.max(0, keepdim=True)
    own = grid_error(group, *even_grid(low, high, top), importance, top)
    total, gain = own.sum(0, keepdim=True), own.clone()
    next_low = group.scatter(0, at_low, torch.inf).amin(0, keepdim=True)
    next_high = group.scatter(0, at_high, -torch.inf).amax(0, keepdim=True)
    for at, left in ((at_low, (next_low, high)), (at_high, (low, next_high))):
        rest = grid_error(group, *even_grid(*left, top), importance, top).scatter_(0, at, 0)
        gain.scatter_(0, at, total - rest.sum(0, keepdim=True))
    return gain > tau


@dataclass(frozen=True)
class Levels:
    """Second level: the `2^bits` values that a statistic of `share` neighbouring rows may take, as they are stored."""

    bits: int
    scale: Tensor  # [ceil(O / share)], in the stored type
    zero: Tensor
    row_scale: Tensor  # fp32 [O]
    row_zero: Tensor

    @classmethod
    def of(cls, values: Tensor, bits: int, share: int, dtype: torch.dtype) -> Levels:
        """Levels between the least and the greatest of each `share` rows' `values [O]`. Values that are equal, as far as the
        stored type can tell, are met by code 0."""
        rows = len(values)
        filled = torch.cat([values, values[-1:].expand(-rows % share)]).view(-1, share)
        low, high = filled.amin(1), filled.amax(1)
        largest = torch.maximum(high, -low)
        equal = high - low <= largest * 2**-11
        scale = torch.where(equal, largest, (high - low) / ((1 << bits) - 1))
        scale = torch.where(scale > 0, scale, 1).to(dtype)
        zero = torch.where(equal, -low.sign(), -low / scale.float()).to(dtype)
        row_scale, row_zero = (t.float().repeat_interleave(share)[:rows] for t in (scale, zero))
        return cls(bits, scale, zero, row_scale, row_zero)

    def value(self, codes: Tensor) -> Tensor:
        """What `kernels.spqr.statistic` computes from codes `[..., O]` of any type."""
        return self.row_scale * (codes.float() - self.row_zero)

    def nearest(self, values: Tensor) -> Tensor:
        return (values / self.row_scale + self.row_zero).round().clamp(0, (1 << self.bits) - 1)


def search(
    group: Tensor, importance: Tensor, tau: float, top: int, scales: Levels, zeros: Levels, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes `[O]` of the scale and the zero of least `Σ min(error², tau)`, starting from given ones: a weight whose error costs
    more than `tau` will be kept apart. All codes up to 3 bits are tried, of more bits a coarse grid and then its refinements."""
    best = grid_error(group, scales.value(scale), zeros.value(zero), importance, top).clamp_(max=tau).sum(0)
    wide = [max(1, (1 << levels.bits) // 8) for levels in (scales, zeros)]
    tries = [[torch.arange(0, 1 << levels.bits, stride) for levels, stride in zip((scales, zeros), wide)]]
    for scale_try in range(0, 1 << scales.bits):
        at = torch.full_like(scale, scale_try)
        ...
    return scale, zero
