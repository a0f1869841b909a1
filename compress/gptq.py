"""GPTQ: every column's rounding error made up for by the columns after it, in files that other engines load."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..calibrate.base import Statistic
from ..calibrate.hessian import normalised
from ..formats.grouped import SCALE_DTYPES, GroupedWeight
from .base import Event, Method, around, scale_dtype
from .descent import TINY, Matrices, Prepared, feed_forward, strongest_first, sweep

ENDS = (1.0, 0.85, 0.7, 0.55)  # parts of a range that are tried for each of its ends
HALVES = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.5)  # the same for a range whose ends are tied
NEAR = ((0.92, 0.96, 1.0, 1.04, 1.08), (0.98, 1.0, 1.02))  # then around the best scale so far


class GPTQ(Method):
    """Quantises column after column onto a grid per group, and lets later columns make up for the error.

    The output error of a layer is quadratic in its weights, with the Hessian `H = 2 E[x xᵀ]`. Each column's error is
    spread over the columns after it as the inverse Hessian says (Frantar et al., arXiv 2210.17323). Strong inputs go
    first, while there is most left to make up with: groups in the order of their strongest input, and inputs within
    their group, so that groups stay what they are and nothing is looked up at run time. A group's grid is chosen when
    its turn comes, for the weights as they are by then, with an error counted as much as it will weigh at the output;
    and its scale has its stored precision before any code is chosen. Passes of coordinate descent follow, over codes
    (QuantEase, arXiv 2309.01885) and over scales.

    The defaults erred least on held-out text at 2, 3 and 4 bits (SmolLM2-135M); learned rounding after it halves what
    is lost at 3 bits. At 2 bits `full_range` errs no more than `asymmetric`, without zero points to store.

    Limits: grids are what other engines read, a 16-bit scale for each group, which is costly in small groups; `spqr`
    errs less at the same size.
    """

    needs: ClassVar[tuple[str, ...]] = ("hessian",)
    format: ClassVar[str] = "grouped"
    refine: ClassVar[int] = 16

    bits: int = Field(3, ge=2, le=8, description="bits per code")
    group_size: Literal[-1, 8, 16, 32, 64, 128] = Field(64, description="inputs that share a scale; -1: a whole row")
    grid: Literal["asymmetric", "symmetric", "full_range"] = Field(
        "asymmetric", description="with a zero point; or around zero, without; full_range: its long side may point up"
    )
    damp_percent: float = Field(0.1, ge=0, description="multiple of its mean added to the Hessian's diagonal")
    search: bool = Field(True, description="try narrower ranges for each group; else from its least to its greatest")
    sweeps: int = Field(1, ge=0, description="passes after the first, each scale and each weight set anew")
    order: Literal["group_aware", "identity"] = Field(
        "group_aware", description="groups with strong inputs first, and strong inputs in them; or as they are"
    )

    def alternatives(self, bits: float) -> list[GPTQ]:
        sizes = itertools.product(around(bits), (32, 64, 128))
        return [self.model_copy(update={"bits": code, "group_size": group}) for code, group in sizes]

    def prepare(self, statistics: dict[str, Statistic], event: Event) -> Prepared:
        hessian = normalised(statistics["hessian"], event)
        perm = torch.arange(len(hessian), device=hessian.device)
        if self.order == "group_aware":
            perm = strongest_first(hessian.diagonal(), self.width(len(hessian)))
        return Prepared.of(hessian, perm, self.damp_percent, event)

    def compress(self, weight: Tensor, prepared: Prepared, event: Event) -> GroupedWeight:
        return self.compress_all([weight], [prepared], [event])[0]

    def compress_all(self, weights: list[Tensor], prepared: list[Prepared], events: list[Event]) -> list[GroupedWeight]:
        top = (1 << self.bits) - 1
        dtypes = [scale_dtype(widest(weight) / top, event) for weight, event in zip(weights, events)]
        packed: dict[int, GroupedWeight] = {}
        for dtype in dict.fromkeys(dtypes):
            members = [m for m, its in enumerate(dtypes) if its == dtype]
            matrices = Matrices([prepared[m] for m in members], [len(weights[m]) for m in members])
            columns = torch.cat([weights[m].float().T[prepared[m].perm] for m in members], 1)  # [I, O], copies
            grids = solve(columns, matrices, self, dtype)
            for m, span in zip(members, matrices.spans):
                packed[m] = self.encode(grids, span, prepared[m].perm)
        return [packed[m] for m in range(len(weights))]

    def width(self, columns: int) -> int:
        return columns if self.group_size == -1 else self.group_size

    def encode(self, grids: Grids, rows: slice, perm: Tensor) -> GroupedWeight:
        """Some rows of what was solved, columns back in the order of the inputs."""
        codes, groups = torch.empty_like(grids.codes[:, rows]), perm[:: grids.group_size] // grids.group_size
        codes[perm] = grids.codes[:, rows]
        scale, zero = torch.empty_like(grids.scale[:, rows]), torch.empty_like(grids.zero[:, rows])
        scale[groups], zero[groups] = grids.scale[:, rows], grids.zero[:, rows]
        symmetric = self.grid != "asymmetric"
        scheme = {"bits": self.bits, "group_size": self.group_size, "symmetric": symmetric}
        scheme["scale_dtype"] = next(name for name, dtype in SCALE_DTYPES.items() if dtype == grids.dtype)
        return GroupedWeight.encode(codes.T, scale.to(grids.dtype), None if symmetric else zero.byte(), scheme)


def widest(weight: Tensor) -> float:
    """The distance between the least and the greatest weight, zero among them."""
    return float(weight.amax().clamp(min=0) - weight.amin().clamp(max=0))


class Grids:
    """Codes uint8 `[I, O]` of matrices side by side, and scale and zero fp32 `[G, O]` of their groups, in packed order;
    scales have only values of `dtype`."""

    def __init__(self, columns: Tensor, settings: GPTQ, dtype: torch.dtype):
        self.group_size, self.top, self.dtype = settings.width(len(columns)), (1 << settings.bits) - 1, dtype
        self.codes = torch.empty_like(columns, dtype=torch.uint8)
        groups = -(-len(columns) // self.group_size)
        self.scale, self.zero, self.step = columns.new_empty(3, groups, columns.shape[1]).unbind()

    def put(self, group: int, scale: Tensor, zero: Tensor | None = None) -> None:
        self.scale[group] = scale
        self.step[group] = divisor(scale)
        if zero is not None:
            self.zero[group] = zero

    def round(self, j: int, column: Tensor) -> Tensor:
        """Rounds column j `[O]` in place, keeps its codes, and returns what was lost."""
        g = j // self.group_size
        value = (column / self.step[g]).add_(self.zero[g]).round_().clamp_(0, self.top)
        self.codes[j] = value
        value.sub_(self.zero[g]).mul_(self.scale[g])
        error = column - value
        column.copy_(value)
        return error


def solve(columns: Tensor, matrices: Matrices, settings: GPTQ, dtype: torch.dtype) -> Grids:
    """`columns [I, O]` in packed order, overwritten with what `dequantize` will return."""
    exact = columns.clone() if settings.sweeps else columns
    grids = Grids(columns, settings, dtype)
    dead = torch.stack([of.dead for of in matrices.inputs], 1)  # [I, M]

    def fit_group(group: slice, importance: Tensor) -> None:
        none = dead[group] & ~dead[group].all(0)  # a group that never saw anything is rounded all the same
        weights = columns[group].masked_fill(matrices.spread(none), 0)
        found = fit(weights, importance.masked_fill(matrices.spread(none), 0), settings, dtype)
        grids.put(group.start // grids.group_size, *found)

    feed_forward(columns, matrices, grids.group_size, fit_group, grids.round)
    for _ in range(settings.sweeps):
        rescale(columns, exact, grids, matrices, settings.grid)
        sweep(columns, exact, matrices, grids.group_size, grids.round)
    return grids


def fit(group: Tensor, importance: Tensor, settings: GPTQ, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`group [g, O]`, importance `[g, O]` or `[g, 1]` -> scale, as stored, and zero `[O]` of each row's grid: of those
    tried the one with the least weighted error of nearest values."""
    top = (1 << settings.bits) - 1
    tries = ranges(group, settings, top)
    scale, zero = grid_of(*next(tries), settings.grid, top, dtype)
    if not settings.search:
        return scale, zero
    scratch = torch.empty_like(group), torch.empty_like(group)
    best = grid_error(group, scale, zero, importance, top, scratch)

    def consider(tried: Tensor, at: Tensor) -> None:
        nonlocal best, scale, zero
        error = grid_error(group, tried, at, importance, top, scratch)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, tried, scale), torch.where(better, at, zero)

    for low, high in tries:
        consider(*grid_of(low, high, settings.grid, top, dtype))
    shifts = (-1, 0, 1) if settings.grid == "asymmetric" else (0,)
    for factors in NEAR:
        around = scale, zero
        for factor, shift in itertools.product(factors, shifts):
            consider(stored(around[0] * factor, dtype), (around[1] + shift).clamp(0, top))
    return scale, zero


def ranges(group: Tensor, settings: GPTQ, top: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ends `[O]` of the ranges to try for `group [g, O]`, the whole one first; zero is between them."""
    low, high = group.amin(0).clamp(max=0), group.amax(0).clamp(min=0)
    if settings.grid == "asymmetric":
        yield from ((low * a, high * b) for a, b in itertools.product(ENDS, ENDS))
        return
    reach = torch.maximum(-low, high)
    if settings.grid == "symmetric":
        yield from ((-reach * part, reach * part) for part in HALVES)
        return
    short = (top - 1) / (top + 1)  # the side that has a code less, as a part of the other
    for part, turn in itertools.product(HALVES, (1, -1)):
        up = (high > -low) == (turn > 0)
        ends = -reach * part, reach * part
        yield torch.where(up, ends[0] * short, ends[0]), torch.where(up, ends[1], ends[1] * short)


def grid_of(low: Tensor, high: Tensor, kind: str, top: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale, as stored, and zero `[O]` of the grids from `low` to `high`."""
    scale = stored((high - low) / top, dtype)
    if kind == "asymmetric":
        return scale, (-low / divisor(scale)).round_().clamp_(0, top)
    middle = torch.full_like(scale, (top + 1) // 2)
    return (torch.where(high > -low, -scale, scale) if kind == "full_range" else scale), middle


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that are left of scales in `dtype`."""
    largest = torch.finfo(dtype).max
    return scale.clamp(-largest, largest).to(dtype).to(scale.dtype)


def divisor(scale: Tensor) -> Tensor:
    """What to divide by: a scale of 0 leaves every code at the zero point."""
    return torch.where(scale != 0, scale, torch.inf)


def grid_error(
    group: Tensor, scale: Tensor, zero: Tensor, importance: Tensor, top: int, scratch: tuple[Tensor, Tensor]
) -> Tensor:
    """Weighted squared error `[O]` of the nearest values of grids with scale and zero `[O]` for `group [g, O]`."""
    exact = torch.add(torch.div(group, divisor(scale), out=scratch[0]), zero, out=scratch[0])
    error = torch.round(exact, out=scratch[1]).clamp_(0, top).sub_(zero).mul_(scale).sub_(group)
    return error.mul_(importance).square_().sum(0)


def rescale(columns: Tensor, exact: Tensor, grids: Grids, matrices: Matrices, kind: str) -> None:
    """Sets each group's scale to the best value while all codes and other scales stand: coordinate descent on
    `tr(Δ H Δᵀ)`, a step of least squares per group and row, taken only where the stored scale does lower it. Dead
    inputs have no say."""
    error = columns - exact
    for g, first in enumerate(range(0, len(columns), grids.group_size)):
        group = slice(first, min(first + grids.group_size, len(columns)))
        units = grids.codes[group] - grids.zero[g]  # [g, O]
        slope, curve = torch.empty_like(units), torch.empty_like(units)
        for of, span in zip(matrices.inputs, matrices.spans):
            living = units[:, span] * ~of.dead[group, None]
            slope[:, span] = (of.hessian[group] @ error[:, span]).mul_(living)
            curve[:, span] = (of.hessian[group, group] @ living).mul_(living)
        slope, curve = slope.sum(0), curve.sum(0)
        scale = stored(grids.scale[g] - slope / curve.clamp(min=TINY), grids.dtype)
        step = scale - grids.scale[g]
        lower = 2 * step * slope + step.square() * curve < 0
        if kind != "full_range":
            lower &= scale > 0
        grids.put(g, torch.where(lower, scale, grids.scale[g]))
        value = units.mul_(grids.scale[g])
        error[group] += value - columns[group]
        columns[group] = value
