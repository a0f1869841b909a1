"""Second moments of a linear layer's input, the Hessian of its squared output error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..formats.source import all_finite
from .base import Statistic


class Hessian(Statistic):
    """`H = 2/T · Σ x xᵀ [I, I]` over all tokens `x [I]` (Frantar et al., GPTQ, arXiv 2210.17323, eq. 1-3).

    Every token weighs the same, whatever sequence it came in. Sums are fp32; merging adds in fp64.
    """

    name = "hessian"

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self.sum = torch.zeros(features, features, dtype=torch.float32, device=device)  # its upper triangle
        self._whole = True  # whether the lower triangle is up to date
        self._lock = threading.Lock()

    def update(self, x: Tensor) -> None:
        add_gram(self.sum, x.float())
        self._whole = False
        self.tokens += x.shape[0]

    def merge(self, other: Statistic) -> None:
        assert isinstance(other, Hessian)
        self.sum = (self.sum.double() + other.sum.double()).float()
        self._whole = False
        self.tokens += other.tokens

    def value(self) -> Tensor:
        return self.symmetric() * (2.0 / max(self.tokens, 1))

    def symmetric(self) -> Tensor:
        """`Σ x xᵀ`, both triangles; not to be modified."""
        with self._lock:  # matrices that share the input may be solved in several threads
            if not self._whole:
                self.sum.triu_().add_(self.sum.triu(1).T)
                self._whole = True
        return self.sum

    def towards(self, others: Sequence[Statistic]) -> Hessian:
        """`(n Hₑ + τ H̄) / (n + τ)` with the mean `H̄` over all siblings' tokens, where `n` tokens are too few.

        `n < I` tokens leave `Hₑ` without full rank; then `τ = I - n` tokens' worth of the mean join in. An expert that
        saw enough, and one that saw nothing, stay as they are.
        """
        missing = self.features - self.tokens
        everyone = sum(other.tokens for other in others)
        if self.tokens == 0 or missing <= 0 or everyone == 0:
            return self
        mean = torch.zeros_like(self.sum, dtype=torch.float64)
        for other in others:
            assert isinstance(other, Hessian)
            mean += other.symmetric()
        supported = Hessian(self.features, self.sum.device)
        supported.sum = (self.symmetric().double() + mean * (missing / everyone)).float()
        supported.tokens = self.features
        return supported

    def error(self, delta: Tensor) -> float:
        """`tr(Δ H Δᵀ) / 2`: the mean over tokens of the squared error of the output.

        In block columns, of which the part above the diagonal counts twice: half the work of a full product.
        """
        hessian, total = self.symmetric(), 0.0
        for start in range(0, self.features, 1024):
            here = delta[:, start : start + 1024]
            columns = hessian[:, start : start + 1024]
            product = here @ columns[start : start + 1024]
            product.addmm_(delta[:, :start], columns[:start], alpha=2)
            total += float(product.mul_(here).sum(dtype=torch.float64))
        return total / max(self.tokens, 1)

    def alone(self, delta: Tensor) -> Tensor:
        """`Δ - Δ (H + λ) / diag(H + λ)`: the least of `tr(Δ (H + λ) Δᵀ)` along each weight, λ a tenth of the mean."""
        hessian = self.symmetric()
        diagonal = hessian.diagonal()
        damp = 0.1 * diagonal.mean()
        return delta - (delta @ hessian + damp * delta) / (diagonal + damp).clamp(min=torch.finfo(delta.dtype).tiny)

    def state_dict(self) -> dict[str, Tensor]:
        return {"sum": self.symmetric(), "tokens": torch.tensor(self.tokens)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sum, self.tokens, self._whole = state["sum"], int(state["tokens"]), True


def add_gram(total: Tensor, x: Tensor, block: int = 256) -> None:
    """Adds `xᵀ x` to the upper triangle of `total [I, I]`, in block columns, for `x [T, I]`.

    Half the work of a full product: on 2 cores and I = 1536 measured 1.7 times as fast.
    """
    features = x.shape[1]
    for start in range(0, features, block):
        stop = min(start + block, features)
        total[:stop, start:stop].addmm_(x[:, :stop].T, x[:, start:stop])


def normalised(statistic: Statistic, event: Callable[..., None]) -> Tensor:
    """The Hessian `[I, I]`, its mean diagonal 1; where nothing is known the identity, which makes a method round."""
    hessian = statistic.value()
    mean = float(hessian.diagonal().mean())
    if not statistic.tokens:
        reason = "no tokens"
    elif mean == 0:
        reason = "all inputs are zero"
    elif not all_finite(hessian):
        reason = "the Hessian is not finite"
    else:
        return hessian.div_(mean)  # a copy of the statistic already
    event("rounding", reason=reason)
    return torch.eye(len(hessian), device=hessian.device)


def inverse_factor(hessian: Tensor, damp_percent: float, event: Callable[..., None]) -> Tensor:
    """`U` upper triangular with `Uᵀ U = (H + λ)⁻¹`, λ = damp_percent times the mean of the living diagonal.

    With `J` the reversal of order and `L` the Cholesky factor of `J (H + λ) J` it is `U = J L⁻¹ J`: one factorisation
    and one triangular inverse. What is not positive in fp32 is tried in fp64, then with more damping: an event.
    """
    diagonal = hessian.diagonal()
    mean = diagonal[diagonal > 0].mean()
    attempts = [(torch.float32, damp_percent)]
    attempts += [(torch.float64, max(damp_percent, damp)) for damp in (0.0, 0.01, 0.1, 1.0)]
    for dtype, damp in attempts:
        # In place and by column, as LAPACK wants it: of [11008, 11008] each copy that is saved is half a GiB.
        lower = hessian.flip(0, 1).to(dtype).T
        lower.diagonal().add_(damp * mean)
        failed = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if failed:
            continue
        factor = torch.eye(len(lower), dtype=dtype, device=lower.device).T
        torch.linalg.solve_triangular(lower, factor, upper=False, out=factor)
        del lower
        factor = factor.flip(0, 1).float()
        if all_finite(factor) and (factor.diagonal() > 0).all():
            if (dtype, damp) != attempts[0]:
                event("damping_retry", damp_percent=damp, dtype=str(dtype).removeprefix("torch."))
            return factor
    event("rounding", reason="the Hessian has no Cholesky factor")
    return torch.eye(len(hessian), device=hessian.device)
