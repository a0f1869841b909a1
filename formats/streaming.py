"""Which KV heads stream: the order of their gates, and how many of that order a sparsity takes."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(gate: Tensor, score: Tensor, open: Tensor) -> Tensor:
    """The order in which heads begin to stream: `gate, score [L, Hkv]`, `open` bool `[L]` -> int32 `[L, Hkv]`.

    0 streams first; -1 in layers that are not open. The lower gate goes first, of equal gates the lower score, of
    equal scores the earlier head: the same heads for the same numbers, always.
    """
    chosen = open[:, None].expand_as(gate)
    gates, scores = gate[chosen].tolist(), score[chosen].tolist()
    order = sorted(range(len(gates)), key=lambda head: (gates[head], scores[head], head))
    place = torch.empty(len(order), dtype=torch.int32)
    place[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order), dtype=torch.int32)
    rank = torch.full(gate.shape, -1, dtype=torch.int32)
    rank[chosen] = place
    return rank


def streams(rank: Tensor, sparsity: float) -> Tensor:
    """The heads that stream at a sparsity: `rank [L, Hkv]` -> bool `[L, Hkv]`; `round(sparsity * n)` of the n ranked
    ones, so that those of a lower sparsity are among them.

    Raises ValueError for a sparsity outside [0, 1]."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity {sparsity}: give a share of the KV heads, from 0 to 1")
    count = round(sparsity * int((rank >= 0).sum()))
    return (rank >= 0) & (rank < count)
