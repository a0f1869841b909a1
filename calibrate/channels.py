"""The channels of the keys that rank tokens: per KV head their order, label scales, and which layers stay dense."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..formats.model import AttentionLayer
from .attention import of_layers
from .base import Attended, Learned, Learner, Pass, Subject
from .prompts import Prompt

# rankings of the channels of a KV head, see `rankings`
STATISTICS = ("product", "magnitude", "energy", "pairs", "contrast", "variance", "queries")
FOILS = ("random", "mixed")  # measured beside them for comparison, never chosen
CLIPS = torch.linspace(1.0, 0.2, 17)  # where labels may be clipped, as shares of the largest magnitude
LABEL_ROWS = 512  # keys per prompt that label scales are fitted to


class Channels(Pass):
    """Which few channels of queries and keys tell the tokens that matter (Double Sparsity, arXiv 2408.07092).

    A query and a key agree mostly through few channels, and these are the same for all texts. When a token is decoded,
    scores over them choose the tokens that attention then reads whole. Here several statistics of queries and keys
    after the rotation each rank the channels of a KV head, and the ranking is taken by which the chosen tokens hold
    the most attention mass of queries in texts that the statistics have not seen.

    Prompts are taken in turn: those with an even number give the statistics, those with an odd one the held-out
    queries. Half of these choose the ranking, the others measure it. A lone prompt gives the statistics of its first
    half and queries of its second.
    """

    kinds: ClassVar[tuple[str, ...]] = ("text", "passkey")

    tokens: float = Field(1 / 16, gt=0, le=1, description="share of the context that a query attends to")
    counts: tuple[float, ...] = Field(
        (1 / 16, 1 / 8, 1 / 4, 1 / 2), min_length=1, description="shares of the channels whose recall is measured"
    )
    minimum_recall: float = Field(0.9, ge=0, le=1, description="a layer that keeps less of its attention stays dense")
    sink: int = Field(4, ge=0, description="first tokens that are always attended to, and count as chosen")
    recent: int = Field(16, ge=1, description="last tokens that are always attended to, and count as chosen")
    rows: int = Field(48, ge=4, description="held-out queries per prompt, from its last half")
    kept: int = Field(6, ge=1, description="prompts at most whose held-out queries are measured, drawn evenly")

    def learner(self, layer: AttentionLayer) -> Rankings:
        return Rankings(layer, self)

    def conclude(self, subject: Subject, found: Mapping[int, dict[str, Tensor]]) -> Learned:
        """Tensors, for L layers: `order` int16 `[L, Hkv, D]`, the best channel first; `importance` `[L, Hkv, D]`, by
        channel, the share of the scores' variance over tokens that it adds to the channels before it; `scale8` and
        `scale4` `[L, Hkv, D]`, by channel, the step of symmetric label codes; `dense` bool `[L]`; `count` int32 `[C]`
        and `recall` `[L, Hkv, C]`, the attention mass kept with so many channels; `recall4` the same with labels of 4
        bits; `ceiling` `[L, Hkv]` with all channels; `statistic` uint8 `[L, Hkv]`, an index of the summary's
        `statistics`; `product` `[L, H, D]`, the mean of `|q · k|` per query head and channel.

        Layers that are left alone are dense, with channels in order of their number, and zeros elsewhere."""
        layers = len(subject.layers)
        tensors = {
            name: of_layers({index: of[name] for index, of in found.items()}, layers, 0.0)
            for name in next(iter(found.values()))
        }
        order = torch.arange(tensors["order"].shape[-1], dtype=torch.int16)
        closed = [layer.index for layer in subject.layers if layer.index not in found]
        tensors["order"][closed] = order
        tensors["dense"] = tensors["recall"][..., -1].mean(1) < self.minimum_recall
        tensors["dense"][closed] = True
        tensors["count"] = torch.tensor(channel_counts(order.numel(), self.counts), dtype=torch.int32)
        summary = _summary(tensors, sorted(found))
        foils = ("random", "magnitude", "official", "mixed")
        return Learned(
            {name: tensor for name, tensor in tensors.items() if name not in foils},
            summary,
            self._events(subject, tensors),
        )

    def _events(self, subject: Subject, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
        events = []
        if dense := [layer.index for layer in subject.open if tensors["dense"][layer.index]]:
            told = (f"{i} ({tensors['recall'][i, :, -1].mean():.3f})" for i in dense)
            events.append(
                f"{int(tensors['count'][-1])} channels find too little of the attention, less than minimum_recall"
                f" {self.minimum_recall:g}; these layers stay dense: {', '.join(told)}"
            )
        if sum(prompt.kind in self.kinds for prompt in subject.prompts) == 1:
            events.append("one prompt only: channels are ranked by its first half and measured on its second")
        return tuple(events)


def _summary(tensors: Mapping[str, Tensor], open_layers: Sequence[int]) -> dict[str, Any]:
    """Means over heads and layers, and a line per layer."""

    def mean(name: str) -> list[float]:
        return [round(x, 4) for x in tensors[name][open_layers].double().mean((0, 1)).tolist()]

    names = ("recall", "random", "magnitude", "official", "mixed", "recall4")
    called = ("chosen", "random", "magnitude", "official", "official_heads_mixed", "chosen_4_bits")
    chosen = tensors["statistic"][open_layers].flatten().long()
    return {
        "channels": tensors["count"].tolist(),
        "recall": {title: mean(name) for name, title in zip(names, called)},
        "recall_of_all_channels": round(float(tensors["ceiling"][open_layers].mean()), 4),
        "statistics": list(STATISTICS),
        "heads_by_statistic": dict(zip(STATISTICS, torch.bincount(chosen, minlength=len(STATISTICS)).tolist())),
        "layers": [
            {
                "layer": index,
                "statistic": [STATISTICS[i] for i in tensors["statistic"][index].tolist()],
                "recall": [round(x, 4) for x in tensors["recall"][index].mean(0).tolist()],
                "dense": bool(tensors["dense"][index]),
            }
            for index in open_layers
        ],
    }


def channel_counts(head_dim: int, shares: Sequence[float]) -> list[int]:
    """Numbers of channels, ascending, each once."""
    return sorted({min(max(round(share * head_dim), 1), head_dim) for share in shares})


class Rankings(Learner):
    """Sums over the prompts that give statistics, and a bounded sample of queries with the keys that they see."""

    def __init__(self, layer: AttentionLayer, settings: Channels):
        self.layer, self.settings = layer, settings
        self.moments = Moments(layer.heads, layer.kv_heads, layer.head_dim)
        self.sides = (Drawn(settings.kept), Drawn(settings.kept))
        self.first: Attended | None = None
        self.seen = 0

    def see(self, attended: Attended) -> None:
        if self.seen % 2 == 0:
            self.moments.update(attended.query, attended.key)
        self.sides[self.seen % 2].offer(Queries.of(attended, self.settings.rows))
        self.first = attended if self.seen == 0 else None
        self.seen += 1

    def result(self) -> dict[str, Tensor]:
        moments, (told, held) = self.moments, (side.kept for side in self.sides)
        if self.first is not None:  # a lone prompt
            half = self.first.key.shape[1] // 2
            moments = Moments(self.layer.heads, self.layer.kv_heads, self.layer.head_dim)
            moments.update(self.first.query[:, :half], self.first.key[:, :half])
            told, held = [told[0].every(2, 0)], [told[0].every(2, 1)]
        orders = {name: order.to(held[0].key.device) for name, order in rankings(moments, told).items()}
        keys = torch.cat([q.key[:, :: max(q.key.shape[1] // LABEL_ROWS, 1)] for q in told], 1)
        steps = {bits: label_step(keys, bits) for bits in (8, 4)}
        return self._measured(moments, orders, held, steps)

    def _measured(
        self, moments: Moments, orders: dict[str, Tensor], held: list[Queries], steps: dict[int, Tensor]
    ) -> dict[str, Tensor]:
        settings = self.settings
        counts = channel_counts(self.layer.head_dim, settings.counts)
        problems = [Problem.of(q, settings.tokens, settings.sink, settings.recent) for q in held]
        tables = {
            name: torch.cat([p.recalls([order[:, :c] for c in counts]) for p in problems], -1)  # [Hkv, C, rows]
            for name, order in orders.items()
        }
        choosing = torch.stack([tables[name][..., ::2].mean((1, 2)) for name in STATISTICS])
        best = choosing.argmax(0)  # [Hkv]
        heads = torch.arange(len(best), device=best.device)
        order = torch.stack([orders[name] for name in STATISTICS])[best, heads]
        table = torch.stack([tables[name] for name in STATISTICS])[best, heads]
        coded = torch.cat([p.recalls([order[:, :c] for c in counts], steps[4]) for p in problems], -1)
        ceiling = torch.cat([p.recalls([order]) for p in problems], -1)
        foils = {"random": "random", "magnitude": "magnitude", "official": "product", "mixed": "mixed"}
        return {
            "order": order.short(),
            "importance": added_variance(moments.variance, order).float(),
            "scale8": steps[8],
            "scale4": steps[4],
            "recall": table[..., 1::2].mean(-1),
            "recall4": coded[..., 1::2].mean(-1),
            "ceiling": ceiling[:, 0, 1::2].mean(-1),
            "statistic": best.to(torch.uint8),
            "product": (moments.product / moments.tokens).float(),
            **{name: tables[of][..., 1::2].mean(-1) for name, of in foils.items()},
        }


class Moments:
    """Sums in fp64 over the tokens of prompts, per KV head; queries are summed over those that share it."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int):
        square = (kv_heads, head_dim, head_dim)
        self.tokens = 0
        self.product = torch.zeros(heads, head_dim, dtype=torch.float64)  # sum |q_d k_d| of a token with itself
        self.query = torch.zeros(square, dtype=torch.float64)  # sum q qᵀ
        self.key = torch.zeros(square, dtype=torch.float64)  # sum k kᵀ
        # the same about the mean of the prompt's keys: what all keys have in common ranks nothing
        self.spread = torch.zeros(square, dtype=torch.float64)

    def update(self, query: Tensor, key: Tensor) -> None:
        """Takes `query [H, T, D]` and `key [Hkv, T, D]` of a whole prompt, after the rotation."""
        query, key = query.double(), key.double()
        kv_heads, tokens, head_dim = key.shape
        grouped = query.reshape(kv_heads, -1, head_dim)
        centred = key - key.mean(1, keepdim=True)
        repeated = key.repeat_interleave(len(query) // kv_heads, 0)
        self.tokens += tokens
        self.product += (query * repeated).abs().sum(1).cpu()
        self.query += (grouped.mT @ grouped).cpu()
        self.key += (key.mT @ key).cpu()
        self.spread += (centred.mT @ centred).cpu()

    @property
    def variance(self) -> Tensor:
        """`[Hkv, D, D]`, up to a factor: `1_Sᵀ V 1_S` is the variance over tokens of scores over the channels S, for
        queries and keys that know nothing of each other."""
        return self.query * self.spread


@dataclass(frozen=True)
class Queries:
    """Some queries of a prompt's last half, and the keys of the prompt."""

    query: Tensor  # [Hkv, group, R, D]
    key: Tensor  # [Hkv, T, D]
    position: Tensor  # [R] int64, ascending
    scaling: float

    @classmethod
    def of(cls, attended: Attended, rows: int) -> Queries:
        key = attended.key
        position = held_rows(attended.prompt, key.shape[1], rows).to(key.device)
        query = attended.query[:, position]
        return cls(query.reshape(len(key), -1, *query.shape[1:]), key, position, attended.scaling)

    def every(self, step: int, start: int) -> Queries:
        return Queries(self.query[:, :, start::step], self.key, self.position[start::step], self.scaling)


def held_rows(prompt: Prompt, tokens: int, rows: int) -> Tensor:
    """Up to `rows` positions spread over the last half of the prompt; half of them before digits of passkeys, where
    there are any: there it shows whether what was stated long ago is found."""
    spread = torch.linspace(tokens // 2, tokens - 1, rows).round().long()
    asked = [p - 1 for start, stop in prompt.asked for p in range(start, stop) if tokens // 2 < p < tokens]
    if asked:
        among = torch.linspace(0, len(asked) - 1, min(rows // 2, len(asked))).round().long()
        spread = torch.cat([spread[::2], torch.tensor(asked)[among]])
    return spread.unique()


class Drawn:
    """At most `count` of what is offered, each with the same chance, the same at every run."""

    def __init__(self, count: int):
        self.kept: list[Queries] = []
        self._count, self._offered, self._draw = count, 0, random.Random(0)

    def offer(self, one: Queries) -> None:
        self._offered += 1
        if len(self.kept) < self._count:
            self.kept.append(one)
        elif (place := self._draw.randrange(self._offered)) < self._count:
            self.kept[place] = one


def rankings(moments: Moments, told: Sequence[Queries]) -> dict[str, Tensor]:
    """Orders of the channels int64 `[Hkv, D]`, the best first, by each of `STATISTICS` and `FOILS`:

    - product: mean `|q_d k_d|` of a token with itself, as the official code intends ("qk")
    - magnitude: mean `k_d²`
    - energy: mean `q_d²` times mean `k_d²`
    - pairs: mean `q_d²` times the variance of `k_d`, for the two channels of a rotation together
    - contrast: what `q_d k_d` adds to the score of the tokens attended to, over that of all tokens
    - variance: greedy, the channels that leave least of the scores' variance over tokens unexplained
    - queries: the same for the sampled far queries, each with the keys that it sees and its variance taken as 1
    - random, and mixed: mean `|q_d k_d|` over all heads of the layer, which is what the official code computes
    """
    kv_heads, head_dim = moments.query.shape[:2]
    query, key, spread = (x.diagonal(dim1=1, dim2=2) for x in (moments.query, moments.key, moments.spread))
    product = moments.product.view(kv_heads, -1, head_dim).sum(1)
    pairs = (query * spread).unflatten(1, (2, -1)).sum(1).repeat(1, 2) if head_dim % 2 == 0 else query * spread
    draw = torch.Generator().manual_seed(0)
    values = {
        "product": product,
        "magnitude": key,
        "energy": query * key,
        "pairs": pairs,
        "contrast": sum((contrast(q).cpu() for q in told), torch.zeros_like(product)),
        "random": torch.rand(product.shape, generator=draw),
        "mixed": product.sum(0).expand_as(product),
    }
    orders = {name: value.argsort(dim=-1, descending=True, stable=True) for name, value in values.items()}
    orders["variance"] = greedy_order(moments.variance)
    orders["queries"] = greedy_order(sum((query_variance(q).cpu() for q in told), torch.zeros_like(moments.query)))
    return orders


def attention(queries: Queries) -> Tensor:
    """Attention of the sampled queries over the keys before them `[Hkv, group, R, T]`, fp32."""
    return scores(queries, queries.query.float(), queries.key.float()).softmax(-1)


def scores(queries: Queries, query: Tensor, key: Tensor) -> Tensor:
    """Scores `[Hkv, group, R, T]` of `query [Hkv, group, R, C]` with `key [Hkv, T, C]`, -inf for what is to come."""
    raw = (query.flatten(1, 2) @ key.mT).view(*query.shape[:3], -1) * queries.scaling
    to_come = torch.arange(key.shape[1], device=key.device) > queries.position[:, None]
    return raw.masked_fill_(to_come, -torch.inf)


def contrast(queries: Queries) -> Tensor:
    """`[Hkv, D]`: mean over queries of `q_d (a_d - m_d)`, a the mean of keys by attention and m their plain mean."""
    attended = attention(queries) @ queries.key.float()[:, None]
    before = (queries.position + 1)[:, None].double()
    mean = queries.key.double().cumsum(1)[:, queries.position] / before
    return (queries.query.double() * (attended.double() - mean[:, None])).mean((1, 2))


def query_variance(queries: Queries) -> Tensor:
    """`[Hkv, D, D]`: sum over queries of `(q qᵀ) ∘ C / qᵀ C q`, with the covariance C of the keys before the query."""
    key = queries.key.double()
    gram = torch.zeros_like(key[:, :1].mT @ key[:, :1])
    total = torch.zeros_like(key[:, 0])
    form = torch.zeros_like(gram)
    start = 0
    for row, position in enumerate(queries.position.tolist()):
        part = key[:, start : position + 1]
        start = position + 1
        gram += part.mT @ part
        total += part.sum(1)
        mean = total / start
        covariance = gram / start - mean[:, :, None] * mean[:, None]
        query = queries.query[:, :, row].double()
        each = covariance[:, None] * query[..., :, None] * query[..., None, :]  # [Hkv, group, D, D]
        variance = each.sum((2, 3), keepdim=True)
        form += (each / variance.clamp(min=torch.finfo(torch.float64).tiny)).sum(1)
    return form


def greedy_order(form: Tensor) -> Tensor:
    """Orders int64 `[N, D]` in which channels are taken so that each leaves least of `rᵀ F r`, where F is `form
    [N, D, D]` and r is 1 at the channels not yet taken."""
    left = torch.ones(form.shape[:2], dtype=form.dtype)
    order = []
    for _ in range(form.shape[1]):
        gain = 2 * (form @ left[..., None])[..., 0] - form.diagonal(dim1=1, dim2=2)
        best = gain.masked_fill(left == 0, -torch.inf).argmax(1, keepdim=True)
        left.scatter_(1, best, 0)
        order.append(best)
    return torch.cat(order, 1)


def added_variance(form: Tensor, order: Tensor) -> Tensor:
    """By channel `[N, D]`: how much less of `rᵀ F r` is left when it is taken, in this order, as a share of all. They
    add up to 1."""
    order = order.to(form.device)
    ordered = form.gather(1, order[..., None].expand_as(form)).gather(2, order[:, None].expand_as(form))
    later = ordered.triu(1).sum(2)  # what a channel shares with those not yet taken
    gain = 2 * later + ordered.diagonal(dim1=1, dim2=2)
    share = gain / gain.sum(1, keepdim=True).clamp(min=torch.finfo(form.dtype).tiny)
    return torch.zeros_like(share).scatter_(1, order, share)


def label_step(key: Tensor, bits: int) -> Tensor:
    """Steps `[Hkv, D]` of symmetric codes of so many bits for `key [Hkv, N, D]`: of clips at shares of the largest
    magnitude the one with the least squared error. As a query weighs a channel as a whole, that is also the least
    squared error of scores. 0 for a channel that is always 0."""
    key = key.float()
    largest = 2 ** (bits - 1) - 1
    peak = key.abs().amax(1)
    least, best = torch.full_like(peak, torch.inf), peak / largest
    for clip in CLIPS.tolist():
        step = clip * peak / largest
        error = (labelled(key, step, bits) - key).square().mean(1)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best


def labelled(key: Tensor, step: Tensor, bits: int) -> Tensor:
    """What labels of so many bits say of `key [Hkv, N, C]`, with `step [Hkv, C]`."""
    largest = 2 ** (bits - 1) - 1
    unit = step.masked_fill(step == 0, torch.inf)[:, None]
    return (key.float() / unit).clamp(-largest, largest).round() * step[:, None]


@dataclass(frozen=True)
class Problem:
    """The sampled queries of a prompt, and what of their attention is worth finding."""

    queries: Queries
    mass: Tensor  # [Hkv, R, T], attention, the mean over the heads of a group: they share the tokens that are read
    to_come: Tensor  # [R, T] bool
    always: Tensor  # [R, T] bool
    budget: Tensor  # [R] tokens that are read

    @classmethod
    def of(cls, queries: Queries, tokens: float, sink: int, recent: int) -> Problem:
        position = torch.arange(queries.key.shape[1], device=queries.key.device)
        own = queries.position[:, None]
        to_come = position > own
        always = ((position < sink) | (position > own - recent)) & ~to_come
        budget = ((queries.position + 1) * tokens).ceil().long().clamp(min=sink + recent)
        budget = budget.minimum(queries.position + 1)
        return cls(queries, attention(queries).mean(1), to_come, always, budget)

    def recalls(self, channels: Sequence[Tensor], step: Tensor | None = None) -> Tensor:
        """Attention mass `[Hkv, len(channels), R]` of the tokens chosen by each of `channels`, int64 `[Hkv, C]`;
        with `step [Hkv, D]` by labels of 4 bits. Chosen as the runtime does: by the attention mass that a group's
        heads would give by the channels alone, the first and the last tokens always among them."""
        return torch.stack([self._recall(c, step) for c in channels], 1)

    def _recall(self, channels: Tensor, step: Tensor | None) -> Tensor:
        query, key = self.queries.query, self.queries.key
        query = query.gather(3, channels[:, None, None].expand(*query.shape[:3], -1)).float()
        key = key.gather(2, channels[:, None].expand(*key.shape[:2], -1)).float()
        if step is not None:
            key = labelled(key, step.gather(1, channels), 4)
        worth = scores(self.queries, query, key).softmax(-1).sum(1)  # [Hkv, R, T]
        worth = worth.masked_fill_(self.to_come, -1).masked_fill_(self.always, torch.inf)
        top = worth.topk(int(self.budget.max()), -1).indices
        found = self.mass.gather(-1, top).cumsum(-1)
        return found.gather(-1, (self.budget - 1)[:, None].expand(len(found), -1, 1))[..., 0]
