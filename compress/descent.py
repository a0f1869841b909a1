"""What methods share that round column after column: errors passed on to later columns, then coordinate descent."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate.hessian import inverse_factor
from .base import Event

BLOCK = 128  # columns whose errors reach the columns after them in one matrix product
TINY = 1e-30  # what is divided by instead of a zero

Round = Callable[[int, Tensor], Tensor]  # (j, column [O]): rounds column j in place -> what was lost [O]
Fit = Callable[[slice, Tensor], None]  # (columns, importance [g, O] or [g, 1]): chooses the grids of a group


@dataclass(frozen=True)
class Prepared:
    """What matrices with the same input share, columns in packed order."""

    perm: Tensor  # packed column -> input, int64 [I]
    factor: Tensor  # U [I, I], upper triangular, Uᵀ U = inverse of the damped Hessian
    dead: Tensor  # bool [I]: inputs that were always zero
    hessian: Tensor  # [I, I], damped

    @classmethod
    def of(cls, hessian: Tensor, perm: Tensor, damp_percent: float, event: Event) -> Prepared:
        """`hessian [I, I]` in the order of the inputs; λ is `damp_percent` times the mean of the living diagonal."""
        dead, hessian = hessian.diagonal()[perm] == 0, hessian[perm][:, perm]
        factor = inverse_factor(hessian, damp_percent, event)
        hessian.diagonal().add_(damp_percent * hessian.diagonal()[~dead].mean())
        return cls(perm, factor, dead, hessian)


def strongest_first(diagonal: Tensor, size: int) -> Tensor:
    """Group-aware activation order: diagonal of the Hessian `[I]` -> inputs int64 `[I]`, strongest first in each group
    of `size`, groups in the order of their strongest. A short last group stays last, so that all others stay whole."""
    whole = len(diagonal) // size * size
    groups = diagonal[:whole].view(-1, size)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    inside += torch.arange(0, whole, size, device=diagonal.device)[:, None]
    order = groups.amax(1).argsort(descending=True, stable=True)
    return torch.cat([inside[order].flatten(), whole + diagonal[whole:].argsort(descending=True, stable=True)])


class Matrices:
    """Matrices `Wᵀ [I, O]` that lie side by side, columns in packed order: what input each has, and which rows."""

    def __init__(self, inputs: list[Prepared], rows: list[int]):
        self.inputs = inputs
        self.spans = [slice(last - n, last) for n, last in zip(rows, itertools.accumulate(rows))]
        counts = torch.tensor(rows, device=inputs[0].perm.device)
        self._of_row = torch.arange(len(rows), device=counts.device).repeat_interleave(counts)

    def spread(self, values: Tensor) -> Tensor:
        """`[..., M]` of the matrices -> `[..., O]` of their rows, or `[..., 1]` where there is but one."""
        return values if len(self.spans) == 1 else values.index_select(-1, self._of_row)

    def importance(self) -> Tensor:
        """`1 / u_j [I, M]`: what an error of column j weighs at the output once later columns made up for it."""
        return 1 / torch.stack([of.factor.diagonal() for of in self.inputs], 1)


def feed_forward(columns: Tensor, matrices: Matrices, group_size: int, fit: Fit, round_: Round) -> None:
    """Rounds `columns [I, O]` in place one after the other and spreads what each lost over those after it, as the
    inverse Hessian says (GPTQ, arXiv 2210.17323, eq. 2 and 3; in blocks, its section 3.3).

    `fit` is called when a group begins, with its columns as errors before it have left them. Groups are cut where
    `BLOCK` is unless one is a multiple of the other.
    """
    inputs, spans, spread = matrices.inputs, matrices.spans, matrices.spread

    def pass_on(errors: Tensor, made: slice, to: slice) -> None:
        for of, span in zip(inputs, spans):
            columns[to, span].addmm_(of.factor[made, to].T, errors[:, span], alpha=-1)

    importance = matrices.importance()
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for first in range(start, stop, group_size):
            last = min(first + group_size, stop)
            weigh = spread(importance[first:last])
            if first % group_size == 0:
                group = slice(first, min(first + group_size, len(columns)))
                fit(group, weigh if group.stop == last else spread(importance[group]))
            within = torch.stack([of.factor[first:last, first:last] for of in inputs], 2)  # [g, g, M]
            lost = errors[first - start : last - start].unbind()
            for i, (column, weight) in enumerate(zip(columns[first:last].unbind(), weigh.unbind())):
                torch.mul(round_(first + i, column), weight, out=lost[i])
                columns[first + i + 1 : last].addcmul_(spread(within[i, i + 1 :]), lost[i], value=-1)
            pass_on(errors[first - start : last - start], slice(first, last), slice(last, stop))
        pass_on(errors, slice(start, stop), slice(stop, None))


def sweep(columns: Tensor, exact: Tensor, matrices: Matrices, group_size: int, round_: Round) -> None:
    """Sets every weight to the best value it may take while all others stand: one pass of coordinate descent on
    `tr(Δ H Δᵀ)` (QuantEase, arXiv 2309.01885), which never raises it. Grids stay.

    `exact` are the weights to come close to; `columns [I, O]` are changed in place.
    """
    error = columns - exact
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        slope = torch.empty_like(columns[start:stop])  # half the gradient
        for of, span in zip(matrices.inputs, matrices.spans):
            torch.mm(of.hessian[start:stop], error[:, span], out=slope[:, span])
        for first in range(start, stop, group_size):
            last = min(first + group_size, stop)
            among = matrices.spread(torch.stack([of.hessian[first:last, first:last] for of in matrices.inputs], 2))
            before = columns[first:last].clone()
            for i, j in enumerate(range(first, last)):
                best = columns[j] - slope[j - start] / among[i, i].clamp(min=TINY)
                round_(j, best)
                step = best - columns[j]
                columns[j] = best
                slope[j + 1 - start : last - start].addcmul_(among[i, i + 1 :], step)
            moved = columns[first:last] - before
            error[first:last] += moved
            for of, span in zip(matrices.inputs, matrices.spans):
                slope[last - start :, span].addmm_(of.hessian[last:stop, first:last], moved[:, span])
