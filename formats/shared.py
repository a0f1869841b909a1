"""Packed linears that are given one and the same tensor, as q, k and v are, multiplied in one launch."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.base import SharedProduct


@dataclass
class Round:
    """The products with one tensor that are still to be picked up."""

    x: weakref.ref[Tensor]
    version: int
    thread: int
    products: dict[int, Tensor]

    def take(self, key: int, x: Tensor) -> Tensor | None:
        """The product of member `key` with `x`, once; None when it is not here."""
        return self.products.pop(key, None) if self.x() is x and self.version == x._version else None


class SharedInput:
    """Linears that may be given the same tensor: the first of them multiplies it for all, the others pick theirs up.

    Only a run can tell who shares, so all candidates start as members, and a member leaves for good when its product
    was not picked up: by the time `x` is gone or was changed in place, or somebody asked for another tensor. What waits
    is kept no longer than `x` lives. Whoever is no member, comes from another thread while products wait, or has an `x`
    whose changes are not counted (inference mode) is multiplied alone.

    `torch.compile` cannot see changes in place; there members share once they have shared outside of it.
    """

    def __init__(self, members: Sequence[Any]):
        """`members` are modules whose `parts()` is one packed weight; a member's key is its place among them."""
        self._members = {key: weakref.ref(member) for key, member in enumerate(members)}
        self._proven = False  # a round has ended: who is still a member has shared
        self.forget()

    def forget(self) -> None:
        """Drops what was made of the members and their weights, which are others now."""
        self._fresh = False  # whether `_launch` is up to date
        self._launch: tuple[list[int], SharedProduct] | None = None
        self._round: Round | None = None
        self._traced: dict[int, Tensor] = {}  # what waits while `torch.compile` traces
        self._traced_x: Tensor | None = None

    def product(self, key: int, x: Tensor) -> Tensor | None:
        """`x [..., I]` -> `x Wᵀ [..., O]` of member `key`; None when it has to be multiplied alone."""
        if not self._fresh:
            self._prepare()
        if self._launch is None or key not in self._launch[0]:
            return None
        if torch.compiler.is_compiling():
            return self._product_traced(key, x)
        waiting = self._round
        if x.is_inference() or (waiting is not None and waiting.thread != threading.get_ident()):
            return None
        if waiting is None:
            waiting = Round(weakref.ref(x, self._gone), x._version, threading.get_ident(), self._multiply(x))
            self._round = waiting
        found = waiting.take(key, x)
        if found is None:
            self._end(waiting)
            return self.product(key, x)
        if not waiting.products and self._round is waiting:
            self._round, self._proven = None, True
        return found

    def _prepare(self) -> None:
        alive = {key: member for key, reference in self._members.items() if (member := reference()) is not None}
        parts = [member.parts()[0] for member in alive.values()]
        run = type(parts[0]).shared_product(parts) if len(parts) > 1 else None
        self._launch = None if run is None else (list(alive), run)
        self._fresh = True

    def _multiply(self, x: Tensor) -> dict[int, Tensor]:
        assert self._launch is not None
        keys, run = self._launch
        return dict(zip(keys, run(x), strict=True))

    def _gone(self, x: weakref.ref[Tensor]) -> None:
        if self._round is not None and self._round.x is x:
            self._end(self._round)

    def _end(self, waiting: Round) -> None:
        """Those whose products still wait leave; the others have shared."""
        if self._round is waiting:
            self._members = {key: member for key, member in self._members.items() if key not in waiting.products}
            self._proven = True
            self.forget()

    def _product_traced(self, key: int, x: Tensor) -> Tensor | None:
        """As `product`; a graph holds what it computes, so nothing has to be let go of in time."""
        if self._traced_x is not x or key not in self._traced:
            if not self._proven:
                return None
            self._traced_x, self._traced = x, self._multiply(x)
        found = self._traced.pop(key)
        if not self._traced:
            self._traced_x = None
        return found

    def __getstate__(self) -> dict[int, Any]:
        """For copies: what is derived from the members is made anew there."""
        return {key: member() for key, member in self._members.items()}

    def __setstate__(self, state: dict[int, Any]) -> None:
        self._members = {key: weakref.ref(member) for key, member in state.items() if member is not None}
        self._proven = False
        self.forget()
