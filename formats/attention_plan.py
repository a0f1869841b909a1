"""What a calibration's findings mean for each layer of a model, and attention that computes no more than that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention_index import cost
from ..kernels.attention_label import LABEL_BITS
from ..kernels.attention_sparse import BLOCK
from ..kernels.base import pick
from .calibration import Calibration
from .model import AttentionLayer
from .patterns import DENSE, budget_at, dense_cost, prefill_index
from .streaming import streams

PASSES = ("heads", "retrieval", "channels")  # whose findings a plan is made of
LEAST_TOKENS = 256  # that a decoding head reads; contexts up to twice as long are read whole
SINK, RECENT = 4, 16  # tokens that are among them whatever their labels say

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value -> [B, H, T, Dv], causal, T the last of S


@dataclass(frozen=True)
class Patterns:
    """What heads read in prefill: `h` query heads."""

    kind: Tensor  # uint8 [h], see `patterns.KINDS`; on the CPU
    length: Tensor  # int32 [N], context lengths; on the CPU
    budget: Tensor  # float32 [h, N, 2], shares of a context of that length, see `patterns.budget_at`
    adaptive: tuple[float, float] | None = None  # gamma and tau, where each prompt sets its own budget

    def of(self, heads: Sequence[int]) -> Patterns:
        """Those of some of the heads."""
        return replace(self, kind=self.kind[list(heads)], budget=self.budget[list(heads)])


@dataclass(frozen=True)
class Labels:
    """By what a cached token is ranked in decoding: `Hf` KV heads."""

    channels: Tensor  # int64 [Hf, C]
    scale: Tensor  # float32 [Hf, C], the step of a channel's codes
    bits: int


@dataclass(frozen=True)
class LayerPlan:
    """One layer's attention. `Hs` of its KV heads stream, the other `Hf` are full, each in order; `G` query heads read
    a KV head. Frozen, and its tensors are never written to."""

    heads: int
    kv_heads: int
    head_dim: int
    streams: tuple[int, ...]  # the KV heads that see and keep sink and recent tokens only
    sink: Tensor  # int32 [Hs], tokens
    recent: Tensor  # int32 [Hs], tokens, the newest among them
    patterns: Patterns | None = None  # of the full heads' query heads, Hf · G of them; None: all of them are dense
    labels: Labels | None = None  # None: the full heads read all tokens in decoding
    tokens: float = 1.0  # the share of the context that they read with labels

    @property
    def full(self) -> tuple[int, ...]:
        """The KV heads that keep everything."""
        return tuple(h for h in range(self.kv_heads) if h not in self.streams)

    @property
    def window(self) -> tuple[int, int]:
        """The most sink and the most recent tokens of a streaming head."""
        return int(self.sink.max()), int(self.recent.max())

    def query_heads(self, kv_heads: Sequence[int]) -> list[int]:
        """The query heads of these KV heads."""
        group = self.heads // self.kv_heads
        return [h * group + g for h in kv_heads for g in range(group)]


@dataclass(frozen=True)
class AttentionPlan:
    """How each decoder layer attends; None for layers that stay as they are."""

    layers: tuple[LayerPlan | None, ...]
    layout: tuple[AttentionLayer, ...]  # of the model that was calibrated
    model: str  # what it is called
    sparsity: float  # the share of its KV heads that stream

    @classmethod
    def of(
        cls,
        calibration: Calibration,
        *,
        sparsity: float | None = None,
        use: Sequence[str] | None = None,
        tokens: float = 1 / 16,
        channels: int | None = None,
        bits: int = 4,
        adaptive: bool = False,
    ) -> AttentionPlan:
        """The plan that a calibration asks for, by the passes `use` (default: those of PASSES that were run).

        `sparsity`: the share of KV heads that stream, by default the one that was calibrated for. `tokens`: the share
        of the context that other heads read in decoding. `channels`, `bits`: the labels by which these are ranked, by
        default a quarter of the head's channels at 4 bits. `adaptive`: in prefill each prompt sets its own budget, by
        the calibrated gamma and tau.
        Raises ValueError for a pass that was not run, a number out of range, and tensors that contradict each other.
        """
        run = [name for name in PASSES if name in calibration.passes]
        use = run if use is None else use
        for name in use:
            if name not in run:
                raise ValueError(f"the calibration has no pass {name!r}, only {', '.join(calibration.passes)}")
        if sparsity is not None and not (0 <= sparsity <= 1 and "retrieval" in use):
            raise ValueError(f"sparsity {sparsity}: expected 0 to 1, of a calibration with the pass retrieval")
        if not 0 < tokens <= 1 or bits not in LABEL_BITS:
            raise ValueError(f"tokens {tokens}, bits {bits}: expected a share up to 1, and 4, 8 or 16 bits")
        layout = tuple(
            AttentionLayer(i, "", x["heads"], x["kv_heads"], x["head_dim"], x["refused"])
            for i, x in enumerate(calibration.facts["layers"])
        )
        read = _Findings(calibration, layout)
        if sparsity is None:
            sparsity = read.calibrated_sparsity() if "retrieval" in use else 0.0
        streaming = read.streams(sparsity) if "retrieval" in use else [()] * len(layout)
        layers = [
            None if layer.refused is not None else read.layer(layer, streaming[layer.index], use, tokens)
            for layer in layout
        ]
        if "channels" in use:
            layers = [read.with_labels(i, one, channels, bits) for i, one in enumerate(layers)]
        if adaptive:
            gamma, tau = read.online()
            layers = [
                replace(one, patterns=replace(one.patterns, adaptive=(gamma, tau))) if one and one.patterns else one
                for one in layers
            ]
        kept = tuple(None if one is None or _is_dense(one) else one for one in layers)
        return cls(kept, layout, calibration.facts["model"]["name"], sparsity)

    @classmethod
    def load(cls, folder: Path | str, **options: Any) -> AttentionPlan:
        """The plan of a calibration's folder; options and errors as of `of`, and those of `Calibration.load`."""
        return cls.of(Calibration.load(folder), **options)

    def check(self, layers: Sequence[AttentionLayer]) -> None:
        """Raises ValueError, saying which layer, when the plan is not one for a model with these layers."""
        if len(layers) != len(self.layout):
            raise ValueError(
                f"the plan is for {self.model}, which has {len(self.layout)} layers; this model has {len(layers)}"
            )
        for ours, theirs in zip(self.layout, layers, strict=True):
            here, there = (_described(layer) for layer in (ours, theirs))
            if here != there:
                raise ValueError(
                    f"the plan is for {self.model}, whose layer {ours.index} has {here}; this model's has {there}"
                )

    @property
    def streaming_heads(self) -> int:
        """KV heads that stream."""
        return sum(len(layer.streams) for layer in self.layers if layer is not None)

    def summary(self) -> dict[str, int]:
        """How many heads and layers do what."""
        planned = [layer for layer in self.layers if layer is not None]
        return {
            "kv_heads": sum(layer.kv_heads for layer in self.layout if layer.refused is None),
            "streaming_kv_heads": self.streaming_heads,
            "query_heads": sum(layer.heads for layer in self.layout if layer.refused is None),
            "sparse_query_heads": sum(int((p.patterns.kind != DENSE).sum()) for p in planned if p.patterns),
            "layers": len(self.layers),
            "labelled_layers": sum(layer.labels is not None for layer in planned),
        }


def _described(layer: AttentionLayer) -> str:
    if layer.refused is not None:
        return layer.refused
    return f"{layer.heads} query heads on {layer.kv_heads} of {layer.head_dim}"


def _is_dense(plan: LayerPlan) -> bool:
    return not plan.streams and plan.patterns is None and plan.labels is None


class _Findings:
    """A calibration's tensors, checked against its own description of the model."""

    def __init__(self, calibration: Calibration, layout: Sequence[AttentionLayer]):
        self.facts, self.layout = calibration.facts, layout
        self.found = {name: calibration.of(name) for name in PASSES}

    def tensor(self, name: str, one: str, *shape: int | None) -> Tensor:
        """`pass.tensor` of this shape, `None` for any size."""
        tensor = self.found[name].get(one)
        if tensor is None:
            raise ValueError(f"the calibration lacks the tensor {name}.{one}; make it anew")
        fits = tensor.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape))
        if not fits:
            raise ValueError(f"the calibration's {name}.{one} is {tuple(tensor.shape)}, its model needs {shape}")
        return tensor

    def calibrated_sparsity(self) -> float:
        return float(self.facts["passes"]["retrieval"]["settings"].get("sparsity", 0.5))

    def streams(self, sparsity: float) -> list[tuple[int, ...]]:
        """The KV heads of each layer that stream: of all heads those of the lowest rank."""
        kv_heads = max(layer.kv_heads for layer in self.layout)
        rank = self.tensor("retrieval", "rank", len(self.layout), kv_heads)
        order = rank[rank >= 0].sort().values
        if not torch.equal(order, torch.arange(len(order), dtype=order.dtype)):
            raise ValueError("the calibration's retrieval.rank is no order of its heads; make it anew")
        return [tuple(row.nonzero()[:, 0].tolist()) for row in streams(rank, sparsity)]

    def layer(self, layer: AttentionLayer, streams: tuple[int, ...], use: Sequence[str], tokens: float) -> LayerPlan:
        """The plan without labels."""
        sink = recent = torch.zeros(0, dtype=torch.int32)
        if streams:
            sink, recent = (
                self.tensor("retrieval", one, len(self.layout), layer.kv_heads)[layer.index, list(streams)].int()
                for one in ("sink", "recent")
            )
            if int(recent.min()) < 1 or int(sink.min()) < 0:
                raise ValueError(f"the calibration's retrieval.recent is below 1 in layer {layer.index}; make it anew")
        plan = LayerPlan(layer.heads, layer.kv_heads, layer.head_dim, streams, sink, recent, tokens=tokens)
        heads = plan.query_heads(plan.full)
        if "heads" not in use or not heads:
            return plan
        kind = self.tensor("heads", "kind", len(self.layout), layer.heads)[layer.index, heads]
        length = self.tensor("heads", "length", None)
        budget = self.tensor("heads", "budget", len(self.layout), layer.heads, len(length), 2)[layer.index, heads]
        sparse = bool((kind != DENSE).any())
        return replace(plan, patterns=Patterns(kind, length, budget.float())) if sparse else plan

    def with_labels(self, index: int, plan: LayerPlan | None, count: int | None, bits: int) -> LayerPlan | None:
        """The same with labels, unless the layer is to stay dense in decoding."""
        if plan is None or not plan.full or bool(self.tensor("channels", "dense", len(self.layout))[index]):
            return plan
        count = max(2, plan.head_dim // 8 * 2) if count is None else count
        if not 1 <= count <= plan.head_dim or (bits == 4 and count % 2):
            raise ValueError(
                f"{count} channels: expected 1 to {plan.head_dim}, the width of a head, and an even number at 4 bits"
            )
        size, full = (len(self.layout), plan.kv_heads, plan.head_dim), list(plan.full)
        order = self.tensor("channels", "order", *size)[index, full].long()
        if not torch.equal(order.sort(-1).values, torch.arange(plan.head_dim).expand_as(order)):
            raise ValueError(f"the calibration's channels.order is no permutation in layer {index}; make it anew")
        channels = order[:, :count].contiguous()
        scale = torch.ones(channels.shape)
        if bits != 16:
            scale = self.tensor("channels", f"scale{bits}", *size)[index, full].float().gather(1, channels)
        return replace(plan, labels=Labels(channels, scale, bits))

    def online(self) -> tuple[float, float]:
        return tuple(float(self.tensor("heads", one, 1)) for one in ("gamma", "tau"))  # pyright: ignore[reportReturnType]


class PlannedAttention:
    """Runs a layer's plan on tensors of one device. Kernels are chosen here, once."""

    def __init__(self, plan: LayerPlan, device: torch.device, dtype: torch.dtype, value_dim: int):
        self.plan, self.device = plan, device
        wanted = ["streaming"] if plan.streams else []
        problem: dict[str, Any] = {"head_dim": plan.head_dim, "value_dim": value_dim, "dtype": dtype}
        if plan.patterns is not None:
            wanted.append("sparse")
        if plan.labels is not None:
            wanted += ["label", "select", "gather"]
            self._channels, self._scale = plan.labels.channels.to(device), plan.labels.scale.to(device)
            self._chosen = pick("chosen", device.type)
            problem |= {"bits": plan.labels.bits, "channels": plan.labels.channels.shape[-1]}
        self._kernels = {op: pick(f"attention_{op}", device.type, **problem) for op in wanted}
        self._sink, self._recent = plan.sink.to(device), plan.recent.to(device)
        self.streams, self.full = self._places(plan.streams), self._places(plan.full)
        self.stream_queries = self._places(plan.query_heads(plan.streams))
        self.full_queries = self._places(plan.query_heads(plan.full))
        self._groups = [] if plan.patterns is None else list(self._grouped(plan.patterns))

    def streaming(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """The streaming heads: query `[B, Hs · G, T, D]`, key `[B, Hs, S, D]` of which tokens between the sinks and
        the recent ones may be missing -> `[B, Hs · G, T, Dv]`."""
        return self._kernels["streaming"](query, key, value, self._sink, self._recent, scaling=scaling)

    def label(self, key: Tensor) -> Tensor | None:
        """The labels of the full heads' keys `[B, Hf, T, D]`; None where the plan has none."""
        if self.plan.labels is None:
            return None
        return self._kernels["label"](key, self._channels, self._scale, bits=self.plan.labels.bits)

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dense: Dense) -> Tensor:
        """The full heads, for several new tokens: query `[B, Hf · G, T, D]`, key `[B, Hf, S, D]` -> `[B, Hf · G, T,
        Dv]`.

        Sparse heads are estimated from these queries: of a prompt that comes in chunks each has its own pattern. KV
        heads all of whose query heads are dense, fewer than 64 queries, and patterns that would be no less work, run
        `dense`.
        """
        if query.shape[2] < BLOCK or not any(patterns for _, _, patterns in self._groups):
            return dense(query, key, value)
        if len(self._groups) == 1:
            return self._sparse(self._groups[0][2], query, key, value, scaling, dense)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for places, queries, patterns in self._groups:
            part = query[:, queries], key[:, places], value[:, places]
            out[:, queries] = self._sparse(patterns, *part, scaling, dense)
        return out

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, label: Tensor | None, scaling: float, dense: Dense
    ) -> Tensor:
        """The full heads, for one new token: query `[B, Hf · G, 1, D]`, key `[B, Hf, S, D]`, label as `label` gives it
        -> `[B, Hf · G, 1, Dv]`.

        The tokens are shared by the query heads of a KV head. Contexts of few tokens are read whole."""
        keys = key.shape[2]
        count = max(LEAST_TOKENS, math.ceil(keys * self.plan.tokens))
        if self.plan.labels is None or label is None or keys <= max(2 * LEAST_TOKENS, count):
            return dense(query, key, value)
        bits = self.plan.labels.bits
        score = self._kernels["select"](query[:, :, 0], label, self._channels, self._scale, bits=bits, scaling=scaling)
        index = self._chosen(score, tokens=count, sink=SINK, recent=RECENT)
        return self._kernels["gather"](query, key, value, index, scaling=scaling)

    def _sparse(
        self, patterns: Patterns | None, query: Tensor, key: Tensor, value: Tensor, scaling: float, dense: Dense
    ) -> Tensor:
        rows, keys = query.shape[2], key.shape[2]
        if patterns is None:
            return dense(query, key, value)
        tokens = budget_at(patterns.length, patterns.budget, keys)
        index = prefill_index(patterns.kind, tokens, query, key, scaling=scaling, adaptive=patterns.adaptive)
        if int(cost(index, rows).sum()) >= dense_cost(rows, keys) * query.shape[0] * query.shape[1]:
            return dense(query, key, value)
        return self._kernels["sparse"](query, key, value, *index, scaling=scaling)

    def _grouped(self, patterns: Patterns) -> Iterator[tuple[Tensor, Tensor, Patterns | None]]:
        """KV heads of which a query head is sparse, and the others: their places among the full ones, the places of
        their query heads, and what these read."""
        group = self.plan.heads // self.plan.kv_heads
        sparse = (patterns.kind != DENSE).view(-1, group).any(1)
        for which, any_sparse in ((sparse, True), (~sparse, False)):
            places = which.nonzero()[:, 0].tolist()
            if places:
                queries = [place * group + g for place in places for g in range(group)]
                yield self._places(places), self._places(queries), patterns.of(queries) if any_sparse else None

    def _places(self, which: Sequence[int]) -> Tensor:
        return torch.tensor(which, dtype=torch.long, device=self.device)
