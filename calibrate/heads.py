"""Sparse patterns of query heads in prefill: for each the kind, and the budget, that loses least at a given cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..formats.model import AttentionLayer
from ..formats.patterns import ADAPTIVE_FLOOR, KINDS, Estimate, budget_at, dense_cost
from ..kernels.attention_index import adaptive_index, cost
from .attention import of_layers
from .base import Attended, Learned, Learner, Pass, Subject
from .head_search import candidates, choose, margins, score, scored_blocks

SHORTEST = 512  # tokens: shorter prompts say little of long ones, and count only where there are no others
LEAST = 128  # tokens: 64 rows to estimate from, and 64 to score
GAMMAS = (0.8, 0.9, 0.95, 0.98, 0.99)  # tried for FlexPrefill's gamma
TAU = 0.1  # of FlexPrefill, as its authors have it


class Heads(Pass):
    """Gives each query head one of three sparse patterns, or leaves it dense (MInference's search, corrected).

    A head that attends to first and recent tokens, to few columns and diagonals, or to few blocks needs few of the
    keys of a long prompt. Candidates of every kind are built by the runtime's own estimator and builder, from the last
    64 rows of a prompt, and scored on other rows, at several lengths: by the attention kept and by the error of the
    layer's output. An integer program gives all heads of the model the candidates that lose least together, at `cost`
    of dense attention: kinds at the greatest length, budgets at each, stored as shares of the context. For online
    budgets (FlexPrefill) the least gamma that keeps `gamma_recall` of the attention is found as well.

    Jiang et al., MInference 1.0 (arXiv 2407.02490), section 3.2; Lai et al., FlexPrefill (arXiv 2502.20766).
    Limits: losses of heads are added as if they were independent; in short prompts even the least budgets cost much.
    """

    kinds: ClassVar[tuple[str, ...]] = ("text", "passkey")

    cost: float = Field(0.25, gt=0, le=1, description="query-key products, of those of dense causal attention")
    objective: Literal["error", "squares", "recall"] = Field(
        "error", description="what is lost: output error, its square, or attention"
    )
    minimum_recall: float = Field(0.8, ge=0, le=1, description="attention that every pattern keeps, else dense")
    levels: int = Field(5, ge=1, le=8, description="budgets that are tried: 1/2, 1/4, ... of the context")
    gamma_recall: float = Field(0.9, gt=0, lt=1, description="attention that online budgets keep on average")

    def learner(self, layer: AttentionLayer) -> Search:
        return Search(layer, self.levels)

    def conclude(self, subject: Subject, found: Mapping[int, dict[str, Tensor]]) -> Learned:
        length = next(iter(found.values()))["length"]
        if not len(length):
            return _dense(subject)
        long = length >= min(SHORTEST, int(length[-1]))
        length, means = length[long], {i: _means(of, long) for i, of in found.items()}
        kind, share = candidates(self.levels)
        layers = sorted(found)
        recall, error, costs = (torch.cat([means[i][n] for i in layers]) for n in ("recall", "error", "cost"))
        allowed = (recall >= self.minimum_recall) | (kind == 0)[:, None]
        loss = {"error": error.sqrt(), "squares": error, "recall": (1 - recall).clamp(min=0)}[self.objective]
        choice, least = choose(kind, loss, costs, allowed, self.cost)
        events = [
            f"{n} tokens: the least budgets cost {low:.2f} of dense attention, more than {self.cost:g}"
            for n, low in zip(length.tolist(), least.tolist(), strict=True)
            if low > self.cost
        ]
        at = (torch.arange(len(choice))[:, None], choice, torch.arange(len(length)))
        tokens = torch.stack([budget_at(length[:1], share[:, None], n) for n in length.tolist()], 1)  # [K, N, 2]
        chosen = {
            "kind": kind[choice[:, 0]],
            "budget": (tokens / length[:, None])[choice, at[2]].float(),
            "margin": margins(kind, loss, costs, allowed, choice).float(),
            **{name: of[at].float() for name, of in (("recall", recall), ("error", error), ("cost", costs))},
        }
        chosen["deviation"] = torch.cat([means[i]["deviation"] for i in layers])[at].float()
        curves = {f"curve_{name}": of.float() for name, of in (("recall", recall), ("error", error), ("cost", costs))}
        whole = _by_layer(chosen | curves, layers, len(subject.layers))
        gamma, kept, online = self._gamma(torch.cat([means[i]["adaptive"] for i in layers], 1))
        whole |= {"length": length.int(), "curve_kind": kind, "curve_budget": share}
        whole |= {"gamma": torch.tensor([gamma]), "tau": torch.tensor([TAU])}
        if kept < self.gamma_recall:
            events.append(f"gamma {gamma}: keeps {kept:.3f} of the attention, less than {self.gamma_recall:g}")
        summary = _summary(chosen, length) | {"gamma": gamma, "gamma_recall": round(kept, 4), "gamma_cost": online}
        dense = int((~allowed[:, 1:].any(1)).any(-1).sum())
        if self.minimum_recall > 0:
            summary["dense_for_recall"] = dense
        return Learned(whole, summary, tuple(events))

    def _gamma(self, adaptive: Tensor) -> tuple[float, float, float]:
        """adaptive `[2, n, G, N]`, recall and cost -> the least gamma that keeps enough, else the greatest; both of
        it."""
        recall, costs = adaptive.mean((1, 3))
        good = (recall >= self.gamma_recall).nonzero()[:, 0].tolist()
        at = good[0] if good else len(GAMMAS) - 1
        return GAMMAS[at], float(recall[at]), round(float(costs[at]), 4)


class Search(Learner):
    """Sums over prompts of what each candidate keeps and costs, for prompts of each length, in steps of 64 tokens."""

    def __init__(self, layer: AttentionLayer, levels: int):
        self.layer = layer
        self.kind, self.share = candidates(levels)
        self.sums: dict[int, dict[str, Tensor]] = {}

    def see(self, attended: Attended) -> None:
        tokens = len(attended.prompt)
        if tokens < LEAST:
            return
        query, key, value = attended.query, attended.key, attended.value
        length = -(-tokens // 64) * 64
        budgets = budget_at(torch.tensor([length]), self.share[:, None], tokens)  # [K, 2]
        estimate = Estimate.of(query[None], key[None], scaling=attended.scaling)
        every = torch.arange(len(query), device=query.device)
        indices = [
            estimate.index(kind, budget.expand(len(query), -1).to(query.device), every)
            for kind, budget in zip(self.kind.tolist(), budgets, strict=True)
        ]
        indices += [
            adaptive_index(
                query[None], key[None], scaling=attended.scaling, gamma=gamma, tau=TAU, min_budget=ADAPTIVE_FLOOR
            )
            for gamma in GAMMAS
        ]
        recall, error = score(
            query,
            key,
            value,
            indices,
            scaling=attended.scaling,
            projection=attended.projection,
            blocks=scored_blocks(tokens, attended.prompt.asked),
        )
        share = torch.stack([cost(index, tokens)[0] for index in indices], 1) / dense_cost(tokens, tokens)
        here = {"recall": recall, "squares": recall**2, "error": error, "cost": share, "prompts": recall.new_ones(())}
        before = self.sums.setdefault(length, {})
        for name, x in here.items():
            before[name] = before[name] + x.cpu().double() if name in before else x.cpu().double()

    def result(self) -> dict[str, Tensor]:
        if not self.sums:
            return {"length": torch.zeros(0, dtype=torch.long)}
        lengths = sorted(self.sums)
        stacked = {name: torch.stack([self.sums[n][name] for n in lengths], -1) for name in self.sums[lengths[0]]}
        return stacked | {"length": torch.tensor(lengths)}


def _means(sums: Mapping[str, Tensor], long: Tensor) -> dict[str, Tensor]:
    """Sums of a layer, at the lengths that count -> means `[H, K, N]`, and the standard error of the mean recall; of
    the online budgets, recall and cost `[2, H, G, N]`."""
    prompts = sums["prompts"][long]
    recall, squares, error, costs = (sums[n][..., long] / prompts for n in ("recall", "squares", "error", "cost"))
    spread = (squares - recall**2).clamp(min=0) / (prompts - 1).clamp(min=1)
    fixed = slice(None, -len(GAMMAS))
    of = {"recall": recall, "error": error, "cost": costs, "deviation": spread.sqrt()}
    online = torch.stack([recall[:, -len(GAMMAS) :], costs[:, -len(GAMMAS) :]])
    return {name: x[:, fixed] for name, x in of.items()} | {"adaptive": online}


def _by_layer(of: Mapping[str, Tensor], layers: list[int], count: int) -> dict[str, Tensor]:
    """Tensors over the heads of all open layers -> `[L, H, ...]`; dense, and nothing lost, where layers are left
    alone."""
    neutral = {"kind": 0, "margin": 0, "error": 0, "deviation": 0, "curve_error": 0}
    return {
        name: of_layers(dict(zip(layers, x.chunk(len(layers)), strict=True)), count, neutral.get(name, 1.0))
        for name, x in of.items()
    }


def _dense(subject: Subject) -> Learned:
    """What is learned of prompts that are all too short: every head stays dense."""
    heads = max(layer.heads for layer in subject.open)
    ones = torch.ones(len(subject.layers), heads, 1)
    tensors = {
        "kind": torch.zeros(len(subject.layers), heads, dtype=torch.uint8),
        "length": torch.tensor([LEAST], dtype=torch.int32),
        "budget": ones[..., None].expand(-1, -1, -1, 2).clone(),
        **{"recall": ones, "cost": ones, "error": 0 * ones, "deviation": 0 * ones, "margin": 0 * ones[..., 0]},
    }
    event = f"every prompt is shorter than {LEAST} tokens, so that all heads stay dense; take a larger --seqlen"
    return Learned(tensors, {"kinds": {"dense": heads * len(subject.open)}}, (event,))


def _summary(chosen: Mapping[str, Tensor], length: Tensor) -> dict[str, Any]:
    counted = torch.bincount(chosen["kind"].long(), minlength=len(KINDS)).tolist()
    told: dict[str, Any] = {"kinds": dict(zip(KINDS, counted, strict=True))}
    for at, tokens in enumerate(length.tolist()):
        recall = chosen["recall"][:, at]
        told[f"at_{tokens}_tokens"] = {
            "recall": round(float(recall.mean()), 4),
            "recall_5th_percentile": round(float(recall.quantile(0.05)), 4),
            "cost": round(float(chosen["cost"][:, at].mean()), 4),
        }
    return told
