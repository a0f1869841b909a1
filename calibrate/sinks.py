"""Attention sinks: which heads look at the first token, and so do nothing, in which kind of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats.model import AttentionLayer
from .attention import of_layers
from .base import Attended, Learned, Learner, Pass, Subject


class Sinks(Pass):
    """The share of each head's attention that goes to the first token (Guo et al., arXiv 2410.13835, section 2)."""

    def learner(self, layer: AttentionLayer) -> Mass:
        return Mass(layer)

    def conclude(self, subject: Subject, found: Mapping[int, dict[str, Tensor]]) -> Learned:
        mass = {index: of["mass"] / of["rows"].clamp(min=1) for index, of in found.items()}
        whole = of_layers(mass, len(subject.layers), 0.0).float()
        summary: dict[str, Any] = {"sink_heads": int((whole > 0.5).sum())}
        return Learned({"mass": whole}, summary)


class Mass(Learner):
    """Sums of the attention on token 0 over rows 4 and later, in tiles of rows."""

    def __init__(self, layer: AttentionLayer):
        self.mass = torch.zeros(layer.heads, dtype=torch.float64)
        self.rows = torch.zeros((), dtype=torch.float64)

    def see(self, attended: Attended) -> None:
        key = attended.key.float().repeat_interleave(len(attended.query) // len(attended.key), 0)
        tokens = key.shape[1]
        for start in range(4, tokens, 128):
            stop = min(start + 128, tokens)
            scores = attended.scaling * attended.query[:, start:stop].float() @ key[:, :stop].transpose(1, 2)
            hidden = torch.arange(stop) > torch.arange(start, stop)[:, None]
            weights = scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(-1)
            self.mass += weights[:, :, 0].sum(1).double().cpu()
            self.rows += stop - start

    def result(self) -> dict[str, Tensor]:
        return {"mass": self.mass, "rows": self.rows}
