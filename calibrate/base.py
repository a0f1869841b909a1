"""What a statistic is: a small sum over tokens that can be cut in pieces, added up, saved and continued."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


def squares(delta: Tensor) -> float:
    """The sum of squares of an error `[O, I]`: what it counts where nothing is known of the input."""
    return float(delta.double().square().sum())


class Statistic(ABC):
    """Summary of the rows that reached one input. Weighted by tokens; padding never arrives here."""

    name: ClassVar[str]  # the file's name

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.features = features
        self.tokens = 0

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Takes `x [T, I]`: valid tokens only, any float type."""

    @abstractmethod
    def merge(self, other: Statistic) -> None:
        """Adds what another instance has seen; the order of merging does not matter beyond rounding."""

    @abstractmethod
    def value(self) -> Any:
        """The statistic itself."""

    def towards(self, others: Sequence[Statistic]) -> Statistic:
        """This statistic, supported by its siblings' when it has seen too few tokens; itself when it has seen
        enough."""
        return self

    def error(self, delta: Tensor) -> float:
        """What an error `delta [O, I]` of the weight costs at the output, per token, where the statistic can tell."""
        return squares(delta)

    def alone(self, delta: Tensor) -> Tensor:
        """The error that each weight would best have if those of all others stay `delta [O, I]`: none, where the
        statistic cannot tell."""
        return torch.zeros_like(delta)

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on later."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
