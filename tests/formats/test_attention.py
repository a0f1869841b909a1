"""Models with a plan against plain attention under an explicit mask: prefill, chunks, decoding, caches, undoing."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from acc.formats.attention import SLACK, PlanCache, attach
from acc.formats.attention_plan import AttentionPlan
from acc.formats.calibration import Calibration
from acc.formats.model import attention_layer, decoder_layers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import sdpa_mask

FAMILIES = ["llama", "qwen2", "qwen3", "mixtral", "phi3"]


@dataclass
class Wanted:
    """A made-up calibration: neutral but for what a test sets."""

    model: object
    tensors: dict = field(default_factory=dict)
    passes: dict = field(default_factory=dict)

    def __post_init__(self):
        prefix, layers = decoder_layers(self.model)
        self.layers = [attention_layer(self.model.config, layers, prefix, i) for i in range(len(layers))]
        one = next(x for x in self.layers if x.refused is None)
        self.count, self.heads, self.kv_heads, self.head_dim = len(layers), one.heads, one.kv_heads, one.head_dim
        self.open = torch.tensor([x.refused is None for x in self.layers])

    def retrieval(self, sink=2, recent=7):
        rank = torch.full((self.count, self.kv_heads), -1, dtype=torch.int32)
        rank[self.open] = torch.arange(int(self.open.sum()) * self.kv_heads, dtype=torch.int32).view(-1, self.kv_heads)
        full = torch.ones_like(rank)
        self.tensors |= {"retrieval.rank": rank, "retrieval.sink": sink * full, "retrieval.recent": recent * full}
        self.tensors["retrieval.gate"] = 1 - full.float()
        self.passes["retrieval"] = {"settings": {"sparsity": 0.5}}
        return self

    def heads_(self, kind, first=0.05, second=0.1):
        self.tensors["heads.kind"] = torch.tensor(kind, dtype=torch.uint8).expand(self.count, self.heads).clone()
        self.tensors["heads.length"] = torch.tensor([256, 1024], dtype=torch.int32)
        budget = torch.tensor([first, second]).expand(self.count, self.heads, 2, 2).clone()
        self.tensors["heads.budget"] = budget
        self.passes["heads"] = {"settings": {}}
        return self

    def channels(self, scale=0.1):
        generator = torch.Generator().manual_seed(5)
        order = torch.rand(self.count, self.kv_heads, self.head_dim, generator=generator).argsort(-1)
        self.tensors["channels.order"] = order.short()
        for bits in (4, 8):
            self.tensors[f"channels.scale{bits}"] = torch.full(order.shape, scale / 2 ** (bits - 4))
        self.tensors["channels.dense"] = torch.zeros(self.count, dtype=torch.bool)
        self.passes["channels"] = {"settings": {}}
        return self

    def calibration(self):
        layers = [
            {"heads": x.heads, "kv_heads": x.kv_heads, "head_dim": x.head_dim, "refused": x.refused}
            for x in self.layers
        ]
        return Calibration(self.tensors, {"model": {"name": "tiny"}, "layers": layers, "passes": self.passes})

    def plan(self, **options):
        return AttentionPlan.of(self.calibration(), **options)


@pytest.fixture
def load(checkpoint):
    def make(family, **options):
        return AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32, **options).eval()

    return make


def ids_of(length, batch=1, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


class Whole(DynamicCache):
    """A cache that acc knows nothing of, and which keeps everything."""


PATTERNS = {}  # layer -> function(query, key, scaling) -> bool [H, T, S]


def explicit(module, query, key, value, mask, scaling=None, **kwargs):
    """Softmax in float64 under the layer's pattern."""
    heads, rows, keys = query.shape[1], query.shape[2], key.shape[2]
    group = heads // key.shape[1]
    allowed = PATTERNS[module.layer_idx](query, key, scaling) if module.layer_idx in PATTERNS else None
    if allowed is None:
        allowed = torch.ones(rows, keys).tril(keys - rows).bool().expand(heads, -1, -1)
    scores = scaling * query.double() @ key.double().repeat_interleave(group, 1).mT
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value.double().repeat_interleave(group, 1)).transpose(1, 2).to(query.dtype), None


AttentionInterface.register("explicit_test", explicit)
AttentionMaskInterface.register("explicit_test", sdpa_mask)


@torch.no_grad()
def expected(model, ids, patterns):
    """Logits of the model under explicit patterns, all at once and without a cache."""
    base = model.config._attn_implementation
    PATTERNS.clear()
    PATTERNS.update(patterns)
    model.set_attn_implementation("explicit_test")
    try:
        return model(ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(base)


def streaming(streams, sink, recent, group=2):
    """The pattern of a layer some of whose KV heads stream."""

    def pattern(query, key, scaling):
        rows, keys = query.shape[2], key.shape[2]
        allowed = torch.ones(query.shape[1], rows, keys).tril(keys - rows).bool()
        position = torch.arange(keys - rows, keys)[:, None]
        for head in range(query.shape[1]):
            if head // group in streams:
                allowed[head] &= (torch.arange(keys) < sink) | (position - torch.arange(keys) < recent)
        return allowed

    return pattern


def streaming_patterns(plan, sink, recent):
    return {
        i: streaming(one.streams, sink, recent, one.heads // one.kv_heads)
        for i, one in enumerate(plan.layers)
        if one is not None and one.streams
    }


@torch.no_grad()
def in_chunks(model, ids, sizes, cache):
    parts = [
        model(chunk, past_key_values=cache, use_cache=True).logits for chunk in ids.split(sizes, dim=1) if chunk.numel()
    ]
    return torch.cat(parts, 1)


def close(got, wanted, tolerance=1e-5):
    scale = wanted.abs().max()
    torch.testing.assert_close(got / scale, wanted / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_a_plan_that_keeps_everything_changes_nothing(load, family):
    """Every kernel of the plan runs, over all there is: windows as long as the text, all tokens, all blocks."""
    model, ids = load(family), ids_of(100)
    with torch.no_grad():
        plain = model(ids).logits
    wanted = Wanted(model).retrieval(recent=200).heads_([0, 1, 2, 3], 1.0, 1.0).channels()
    attach(model, wanted.plan(sparsity=0.5, tokens=1.0))
    with torch.no_grad():
        close(model(ids, use_cache=False).logits, plain)
    close(in_chunks(model, ids, [70, 28, 1, 1], PlanCache(model)), plain)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [*(("llama", sizes) for sizes in ([40], [5] + [1] * 35, [1] * 40)), *((f, [20, 1, 12, 7]) for f in FAMILIES)],
)
def test_streaming_heads_see_their_window_however_a_prompt_comes(load, family, sizes):
    model, ids = load(family), ids_of(40)
    plan = Wanted(model).retrieval(sink=2, recent=7).plan(sparsity=0.5)
    assert plan.streaming_heads == 3
    reference = expected(model, ids, streaming_patterns(plan, 2, 7))
    attach(model, plan)
    close(in_chunks(model, ids, sizes, PlanCache(model)), reference)
    close(in_chunks(model, ids, sizes, Whole(config=model.config)), reference)


def test_streaming_heads_beyond_the_slack(load):
    model, ids = load("llama"), ids_of(3 * SLACK + 20)
    plan = Wanted(model).retrieval(sink=3, recent=5).plan(sparsity=1.0)
    reference = expected(model, ids, streaming_patterns(plan, 3, 5))
    attach(model, plan)
    for sizes in ([2 * SLACK] + [1] * (SLACK + 20), [SLACK, 50, 1, 1, SLACK + 2, 30]):
        close(in_chunks(model, ids, sizes, PlanCache(model)), reference)
