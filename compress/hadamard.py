"""Hadamard matrices of almost every size, and their product with a tensor in `n log n` steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 64  # order of a factor whose product is one matrix multiplication


class Rotation:
    """An orthogonal matrix `R [n, n]`: random signs, then a Hadamard matrix, never held as a whole.

    Where no Hadamard matrix of order `n` is at hand, blocks of the largest power of two that divides it.
    """

    def __init__(self, size: int, generator: torch.Generator):
        self.size = size
        self.signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        self.factors = factors(size) or factors(size & -size) or []
        self.order = math.prod(len(factor) for factor in self.factors)

    def __call__(self, x: Tensor) -> Tensor:
        """`x [..., k * n]` fp64 -> every `n` of them times `R`."""
        signed = x.reshape(-1, self.size) * self.signs.to(x.device)
        y = signed.reshape(-1, self.order)
        for factor in self.factors:  # the leading axis of what is left becomes the last; after all, order is restored
            y = y.reshape(len(y), len(factor), -1).transpose(1, 2) @ factor.to(x.device)
        return (y.reshape(x.shape)) / math.sqrt(self.order)

    def __str__(self) -> str:
        blocks = "" if self.order == self.size else f"{self.size // self.order} blocks of "
        return blocks + " x ".join(str(len(factor)) for factor in self.factors)


def factors(order: int) -> list[Tensor] | None:
    """Hadamard matrices whose Kronecker product has this order, the smallest possible base first; None where neither
    Paley's constructions nor Sylvester's reach it."""
    base = order // (order & -order)
    while base <= order:
        first = torch.ones(1, 1, dtype=torch.float64) if base == 1 else paley(base)
        if first is not None:
            return [*([first] if base > 1 else []), *_sylvester(order // base)] or [first]
        base *= 2
    return None


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix of order `q + 1` (q mod 4 = 3) or `2 (q + 1)` (q mod 4 = 1), q prime; else None."""
    if order % 4 == 0 and _prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1, -1.0)
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _prime(q):
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_conference(q, 1.0), one) + torch.kron(torch.eye(q + 1, dtype=torch.float64), other)
    return None


def _sylvester(order: int) -> list[Tensor]:
    """Factors of a Hadamard matrix whose order is a power of two."""
    found = []
    while order > 1:
        factor = torch.ones(1, 1, dtype=torch.float64)
        while len(factor) < min(order, LARGEST):
            factor = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), factor)
        found.append(factor)
        order //= len(factor)
    return found


def _conference(q: int, corner: float) -> Tensor:
    """`[q + 1, q + 1]`: quadratic residues of differences modulo q, framed by ones; symmetric or skew by `corner`."""
    residues = torch.full((q,), -1.0, dtype=torch.float64)
    residues[torch.arange(1, q) ** 2 % q] = 1.0
    residues[0] = 0.0
    number = torch.arange(q)
    framed = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    framed[0, 1:], framed[1:, 0] = 1.0, corner
    framed[1:, 1:] = residues[(number[:, None] - number[None]) % q]
    return framed


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
