"""What a statistic is: a small sum over tokens that can be cut in pieces, added up, saved and continued; and what a
pass is, which learns of the attention of a model while it streams past."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..formats.model import AttentionLayer
from ..formats.source import Source
from .prompts import Prompt


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


@dataclass(frozen=True)
class Attended:
    """What the attention of one layer was given for one prompt; all on the device that the model runs on.

    Query head `h` of `H` reads the keys of head `h // (H / Hkv)`. Scores are `scaling · q kᵀ`, causal, softmax in fp32.
    """

    layer: AttentionLayer
    prompt: Prompt
    query: Tensor  # [H, T, D], after norms and position embedding
    key: Tensor  # [Hkv, T, D], the same
    value: Tensor  # [Hkv, T, Dv]
    scaling: float
    projection: Tensor | None  # [hidden, H * Dv], of the heads' outputs; None where no linear layer projects them
    residual: Tensor  # [T, hidden], what the block was given


def causal_scores(query: Tensor, key: Tensor, rows: Tensor, scaling: float) -> Tensor:
    """Attention scores `[H, R, T]` in fp32 of query `[H, R, D]`, which stand at the positions `rows [R]`, with key
    `[Hkv, T, D]`; minus infinity for tokens yet to come."""
    heads, count, width = query.shape
    grouped = (query.float() * scaling).reshape(len(key), -1, width)  # heads of a group under one another
    scores = (grouped @ key.float().transpose(1, 2)).view(heads, count, -1)
    later = torch.arange(key.shape[1], device=rows.device) > rows[:, None]
    return scores.masked_fill_(later, -torch.inf)


class Learner(ABC):
    """What a pass gathers of one layer. A few tensors whose size does not depend on how much text went by."""

    @abstractmethod
    def see(self, attended: Attended) -> None:
        """Takes one prompt; each prompt of the pass' kinds comes once."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """What was learned of the layer, for `Pass.conclude`; written to disk, so that a killed run goes on from it."""


@dataclass(frozen=True)
class Subject:
    """The model that is calibrated, for what a pass concludes after the last layer."""

    source: Source
    layers: list[AttentionLayer]  # every decoder layer
    prompts: list[Prompt]
    dtype: torch.dtype | None  # that blocks are run in; None: the model's own
    device: str
    tick: Callable[[float], None]  # told which share of the conclusion is done

    @property
    def open(self) -> list[AttentionLayer]:
        """The layers that are calibrated."""
        return [layer for layer in self.layers if layer.refused is None]


@dataclass(frozen=True)
class Learned:
    """What a pass has to say: tensors over all layers (rows of layers that are left alone hold what the pass documents
    as neutral), a JSON-simple summary, and events, which are departures from what was asked."""

    tensors: dict[str, Tensor]
    summary: dict[str, Any]
    events: tuple[str, ...] = ()


class Pass(BaseModel, ABC):
    """Something to learn of a model's attention; frozen, and its own configuration. All passes of a run share one
    stream."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: ClassVar[tuple[str, ...]] = ("text",)  # of prompts that it looks at, see `Prompt.kind`

    @abstractmethod
    def learner(self, layer: AttentionLayer) -> Learner:
        """What gathers while the layer runs. Called once for each layer that is calibrated."""

    @abstractmethod
    def conclude(self, subject: Subject, found: Mapping[int, dict[str, Tensor]]) -> Learned:
        """From the results of all learners, by layer index, to what is stored."""
