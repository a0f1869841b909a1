"""Models with a plan against plain attention under an explicit mask: prefill, chunks, decoding, caches, undoing."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from acc.formats.attention import AHEAD, SLACK, PlanCache, attach, detach, planned
from acc.formats.attention_plan import LEAST_TOKENS, RECENT, SINK, AttentionPlan
from acc.formats.calibration import Calibration
from acc.formats.model import attention_layer, decoder_layers
from acc.formats.patterns import budget_at, prefill_index
from acc.kernels.attention_sparse import BLOCK
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


def covered(index, rows, keys):
    """bool `[H, T, S]`: what an index of ranges and columns lets each row see."""
    count, offset, columns, column = (field[0] for field in index)
    allowed = torch.zeros(len(count), rows, keys, dtype=torch.bool)
    for head in range(len(count)):
        for block in range(count.shape[1]):
            part = allowed[head, block * BLOCK : (block + 1) * BLOCK]
            for start in offset[head, block, : count[head, block]].tolist():
                part[:, max(start, 0) : max(start + BLOCK, 0)] = True
            part[:, column[head, block, : columns[head, block]].long()] = True
    return allowed & torch.ones(rows, keys).tril(keys - rows).bool()


def patterned(one):
    """The pattern of a layer whose full heads follow `one.patterns`."""

    def pattern(query, key, scaling):
        rows, keys, group = query.shape[2], key.shape[2], one.heads // one.kv_heads
        allowed = torch.ones(one.heads, rows, keys).tril(keys - rows).bool()
        kind = one.patterns.kind.view(-1, group)
        for place, head in enumerate(one.full):
            if (kind[place] == 0).all():
                continue
            mine = slice(place * group, (place + 1) * group)
            tokens = budget_at(one.patterns.length, one.patterns.budget[mine], keys)
            q, k = query[:, head * group : (head + 1) * group], key[:, head : head + 1]
            settings = {"scaling": scaling, "adaptive": one.patterns.adaptive}
            index = prefill_index(one.patterns.kind[mine], tokens, q, k, **settings)
            allowed[head * group : (head + 1) * group] = covered(index, rows, keys)
        return allowed

    return pattern


@pytest.mark.parametrize(("kinds", "adaptive"), [([0, 0, 1, 2], False), ([2, 1, 3, 3], False), ([0, 2, 0, 3], True)])
def test_kinds_differ_within_a_layer(load, kinds, adaptive):
    model, ids = load("llama"), ids_of(700)
    wanted = Wanted(model).heads_(kinds, 0.1, 0.1)
    wanted.tensors |= {"heads.gamma": torch.tensor([0.3]), "heads.tau": torch.tensor([0.1])}
    plan = wanted.plan(adaptive=adaptive)
    reference = expected(model, ids, {i: patterned(one) for i, one in enumerate(plan.layers)})
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        attach(model, plan)
        got = model(ids, use_cache=False).logits
    close(got, reference, 2e-5)
    assert (got - plain).abs().max() > 1e-3  # the plan leaves something out


def test_patterns_are_estimated_for_each_chunk(load):
    model, ids = load("llama"), ids_of(900)
    plan = Wanted(model).heads_([2, 1, 3, 3], 0.05, 0.05).plan()
    PATTERNS.clear()
    PATTERNS.update({i: patterned(one) for i, one in enumerate(plan.layers)})
    model.set_attn_implementation("explicit_test")
    reference = in_chunks(model, ids, [600, 300], Whole(config=model.config))
    model.set_attn_implementation("sdpa")
    close(in_chunks(attach(model, plan), ids, [600, 300], PlanCache(model)), reference, 2e-5)


def test_streaming_and_patterned_heads_in_one_layer(load):
    model, ids = load("llama"), ids_of(700)
    plan = Wanted(model).retrieval(sink=4, recent=40).heads_([2, 1, 2, 3], 0.1, 0.1).plan(sparsity=0.5)
    assert [one.streams for one in plan.layers] == [(0, 1), (0,), ()]

    def both(one):
        def pattern(query, key, scaling):
            first = streaming(one.streams, 4, 40)(query, key, scaling)
            return first & patterned(one)(query, key, scaling) if one.patterns else first

        return pattern

    reference = expected(model, ids, {i: both(one) for i, one in enumerate(plan.layers)})
    attach(model, plan)
    with torch.no_grad():
        close(model(ids, use_cache=False).logits, reference, 2e-5)


def most_attended(one, count):
    """The pattern of decoding by all channels, unquantised: of each KV head the tokens of most attention over its
    group, and the first and last ones."""

    def pattern(query, key, scaling):
        group, keys = one.heads // one.kv_heads, key.shape[2]
        allowed = torch.ones(one.heads, query.shape[2], keys).tril(keys - query.shape[2]).bool()
        for t in range(query.shape[2]):
            if keys - query.shape[2] + t + 1 != keys:
                continue  # prefill: dense
            for head in range(one.kv_heads):
                scores = scaling * query[0, head * group : (head + 1) * group, t].double() @ key[0, head].double().T
                mass = scores.softmax(-1).sum(0)
                mass[:SINK] = mass[-RECENT:] = torch.inf
                kept = torch.zeros(keys, dtype=torch.bool)
                kept[mass.topk(count).indices] = True
                allowed[head * group : (head + 1) * group, t] = kept
        return allowed

    return pattern


def test_decoding_reads_the_tokens_of_most_attention(load):
    model, ids = load("qwen3"), ids_of(2 * LEAST_TOKENS + 41)
    plan = Wanted(model).channels().plan(channels=16, bits=16, tokens=0.6)
    count = -(-ids.shape[1] * 6 // 10)
    reference = expected(model, ids, {i: most_attended(one, count) for i, one in enumerate(plan.layers)})
    attach(model, plan)
    for cache in (PlanCache(model), Whole(config=model.config)):
        got = in_chunks(model, ids, [300, ids.shape[1] - 301, 1], cache)
        close(got[:, -1], reference[:, -1], 2e-5)
    with torch.no_grad():
        plain = detach(model)(ids).logits
    assert (plain[:, -1] - reference[:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_labels_are_kept_beside_the_keys(load, bits):
    """Decoding from the cache's labels is decoding from labels made anew of all keys."""
    model, ids = load("llama"), ids_of(2 * LEAST_TOKENS + 30)
    attach(model, Wanted(model).retrieval(recent=20).channels().plan(sparsity=0.3, bits=bits, channels=4))
    sizes = [500, 39, 1, 1, 1]
    close(in_chunks(model, ids, sizes, PlanCache(model)), in_chunks(model, ids, sizes, Whole(config=model.config)))


def test_triton_kernels_compute_the_same(load, monkeypatch):
    """Every kernel of a plan, as the interpreter runs it: patterns, windows, and decoding by labels."""
    monkeypatch.setattr("acc.formats.attention_plan.LEAST_TOKENS", 40)
    one = {"num_hidden_layers": 1}
    wanted = Wanted(load("llama", **one)).retrieval(sink=2, recent=20).heads_([0, 0, 2, 3], 0.1, 0.1).channels()
    ids, logits = ids_of(321), {}
    for way in ("reference", "triton"):
        monkeypatch.setenv("ACC_KERNELS", way)
        model = attach(load("llama", **one), wanted.plan(sparsity=0.5))
        logits[way] = in_chunks(model, ids, [320, 1], PlanCache(model))
    close(logits["triton"], logits["reference"])


def test_a_batch_without_padding(load):
    model, ids = load("llama"), ids_of(600, batch=3)
    attach(model, Wanted(model).retrieval(recent=20).heads_([2, 1, 3, 0], 0.1, 0.1).channels().plan(sparsity=0.3))
    together = in_chunks(model, ids, [598, 1, 1], PlanCache(model))
    for one, row in zip(together, ids):
        close(one[None], in_chunks(model, row[None], [598, 1, 1], PlanCache(model)))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_padding_is_refused(load, family):
    model, ids = load(family), ids_of(20, batch=2)
    attach(model, Wanted(model).retrieval().plan())
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with pytest.raises(ValueError, match=r"layer \d follows a plan, which knows no padding"):
        model(ids, attention_mask=mask)
    model(ids, attention_mask=torch.ones_like(ids))


def test_a_static_cache_is_refused(load):
    """It hands over keys that are not there yet."""
    model, ids = load("llama"), ids_of(20)
    attach(model, Wanted(model).retrieval().plan())
    with pytest.raises(ValueError, match="no static cache"):
        model.generate(ids, max_new_tokens=4, cache_implementation="static", pad_token_id=0)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_layers_without_a_plan_run_what_they_ran(load, base):
    """Layer 2 streams, the others have no plan and get their masks, in whole prompts, chunks and tokens."""
    for family in ("llama", "gemma3_text"):
        model, ids = load(family, attn_implementation=base), ids_of(40)
        wanted = Wanted(model).retrieval()
        wanted.tensors["retrieval.rank"][: model.config.num_hidden_layers - 1] = -1
        wanted.tensors["retrieval.rank"][-1] = torch.tensor([0, 1])
        if family == "gemma3_text":
            wanted.tensors["retrieval.rank"][:] = torch.tensor([[-1, -1], [1, 0], [-1, -1]])
        plan = wanted.plan(sparsity=1.0)
        assert sum(one is not None for one in plan.layers) == 1
        inputs = {}

        def remember(module, args, out, inputs=inputs):
            inputs.setdefault(module.layer_idx, []).append(out[0])

        plain_parts = {}
        handles = [
            m.register_forward_hook(remember)
            for m in model.modules()
            if hasattr(m, "layer_idx") and hasattr(m, "q_proj")
        ]
        sizes = [20, 1, 12, 7]
        in_chunks(model, ids, sizes, DynamicCache(config=model.config))
        plain_parts, inputs = {k: list(v) for k, v in inputs.items()}, inputs
        for parts in inputs.values():
            parts.clear()
        attach(model, plan)
        in_chunks(model, ids, sizes, PlanCache(model))
        for handle in handles:
            handle.remove()
        first = next(i for i, one in enumerate(plan.layers) if one is not None)
        for layer in range(first):  # what comes before the plan is the same to the bit
            assert all(map(torch.equal, inputs[layer], plain_parts[layer]))
        assert not torch.equal(inputs[first][-1], plain_parts[first][-1])


def test_a_cache_holds_what_streaming_heads_see_and_no_more(load):
    model, ids = load("llama"), ids_of(400)
    attach(model, Wanted(model).retrieval(sink=2, recent=7).plan(sparsity=1.0))
    cache, sizes = PlanCache(model), []
    for chunk in ids.split([100, 150, *[1] * 150], dim=1):
        with torch.no_grad():
            model(chunk, past_key_values=cache)
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1
    layers, kv_heads, head_dim, room = 3, 2, 16, 2 + 6 + SLACK
    assert sizes[0] == layers * kv_heads * 2 * room * head_dim * 4
    assert cache.dense_nbytes == layers * kv_heads * 2 * 400 * head_dim * 4
    assert cache.get_seq_length() == 400


def test_full_heads_grow_rarely(load):
    model, ids = load("llama"), ids_of(300)
    attach(model, Wanted(model).retrieval(sink=2, recent=7).channels().plan(sparsity=0.5, channels=4))
    cache, sizes = PlanCache(model), []
    for chunk in ids.split([100, *[1] * 200], dim=1):
        with torch.no_grad():
            model(chunk, past_key_values=cache)
        sizes.append(cache.nbytes)
    assert len(set(sizes)) <= 1 + 200 // AHEAD
    token = 2 * 16 * 4 + 4 * 4 // 8  # bytes of key and value, and of a label
    streaming = 3 * 2 * (2 + 6 + SLACK) * 16 * 4
    assert sizes[-1] <= 3 * token * (300 + 2 * AHEAD) + streaming < cache.dense_nbytes


def test_generate_keeps_what_the_plan_wants(load):
    model, ids = load("llama"), ids_of(150)
    plan = Wanted(model).retrieval(sink=2, recent=20).plan(sparsity=0.5)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    attach(model, plan)
    cache = PlanCache(model)
    got = model.generate(ids, past_key_values=cache, **settings)
    made = model.generate(ids, return_dict_in_generate=True, **settings)
    assert torch.equal(made.sequences, got)
    assert sum(type(layer).__name__ == "PlanLayer" for layer in made.past_key_values.layers) == 2
    assert cache.nbytes < cache.dense_nbytes
    tokens = ids
    for _ in range(12):  # the same, by whole forwards
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, tokens)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_plan_that_keeps_all_generates_the_same(load, settings):
    model, ids = load("llama"), ids_of(60)
    settings = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": False} | settings
    torch.manual_seed(3)
    plain = model.generate(ids, **settings)
    attach(model, Wanted(model).retrieval(recent=500).plan(sparsity=0.5))
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, **settings), plain)


def test_chunked_prefill_of_generate(load):
    model, ids = load("llama"), ids_of(90)
    attach(model, Wanted(model).retrieval(sink=2, recent=20).plan(sparsity=0.5))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prefill_chunk_size=32, **settings), whole)


def test_detaching_restores_the_model(load):
    model, ids = load("qwen3"), ids_of(30)
    with torch.no_grad():
        plain = model(ids).logits
        attach(model, Wanted(model).retrieval().plan(sparsity=1.0))
        assert model.config._attn_implementation == "acc"
        assert not torch.equal(model(ids).logits, plain)
        attach(model, Wanted(model).retrieval(recent=3).plan(sparsity=1.0))  # another plan takes its place
        assert detach(model) is model
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(detach(model)(ids).logits, plain)
    assert not model._forward_pre_hooks


def test_a_model_loaded_with_the_implementation_acc(load):
    model, ids = load("llama", attn_implementation="acc"), ids_of(30)
    plain = load("llama")(ids).logits
    close(model(ids).logits, plain)  # without a plan it is dense
    attach(model, Wanted(model).retrieval().plan(sparsity=1.0))
    assert not torch.equal(model(ids).logits, plain)


def test_a_cache_can_go_back_where_nothing_was_let_go(load):
    model, ids = load("llama"), ids_of(50)
    attach(model, Wanted(model).channels().plan())
    cache = PlanCache(model)
    whole = in_chunks(model, ids, [40, 10], cache)
    cache.crop(-20)
    assert cache.get_seq_length() == 30
    close(in_chunks(model, ids[:, 30:], [15, 5], cache), whole[:, 30:])
    other = copy.deepcopy(cache)
    other.batch_repeat_interleave(2)
    assert in_chunks(model, ids_of(1, batch=2), [1], other).shape[0] == 2
    cache.reset()
    close(in_chunks(model, ids, [50], cache), whole)


def test_streaming_heads_cannot_go_back(load):
    model, ids = load("llama"), ids_of(50)
    attach(model, Wanted(model).retrieval().plan())
    cache = PlanCache(model)
    in_chunks(model, ids, [50], cache)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="streaming heads, which cannot go back"):
        cache.crop(-1)


def test_a_cache_of_a_plan_needs_the_plan(load):
    model, ids = load("llama"), ids_of(20)
    with pytest.raises(ValueError, match="no plan; give it one first"):
        PlanCache(model)
    attach(model, Wanted(model).retrieval().plan())
    cache = PlanCache(model)
    detach(model)
    with pytest.raises(ValueError, match="acc's attention did not run"):
        in_chunks(model, ids, [10, 10], cache)
    other = attach(load("llama"), Wanted(model).retrieval().plan())
    with pytest.raises(ValueError, match="reads the keys of layer 0"):
        in_chunks(other, ids, [10, 10], PlanCache(attach(model, Wanted(model).retrieval().plan())))


def test_a_plan_for_another_model_is_refused(load):
    plan = Wanted(load("llama")).retrieval().plan()
    model = load("gemma3_text")
    with pytest.raises(
        ValueError, match="plan is for tiny, whose layer 0 has 4 query heads on 2 of 16; this model's has sliding"
    ):
        attach(model, plan)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="which has 2 layers; this model has 3"):
        attach(load("llama"), AttentionPlan(plan.layers[:2], plan.layout[:2], "small", 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use": ["heads"]}, "no pass 'heads', only retrieval, channels"),
        ({"sparsity": 1.5}, "sparsity 1.5: expected 0 to 1"),
        ({"tokens": 0.0}, "tokens 0.0, bits 4: expected a share"),
        ({"bits": 5}, "bits 5"),
        ({"channels": 17}, "17 channels: expected 1 to 16"),
        ({"channels": 3}, "3 channels: .* even number at 4 bits"),
        ({"adaptive": True}, "lacks the tensor heads.gamma"),
    ],
)
def test_a_plan_out_of_range_is_refused(load, options, message):
    wanted = Wanted(load("llama")).retrieval().channels()
    with pytest.raises(ValueError, match=message):
        wanted.plan(**options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("retrieval.rank", lambda t: t * 0, "rank is no order"),
        ("retrieval.rank", lambda t: t[:2], r"retrieval.rank is \(2, 2\), its model needs \(3, 2\)"),
        ("retrieval.recent", lambda t: t * 0, "recent is below 1"),
        ("channels.order", lambda t: t * 0, "no permutation in layer 1"),
    ],
)
def test_a_damaged_calibration_is_refused(load, name, change, message):
    wanted = Wanted(load("llama")).retrieval().channels()
    wanted.tensors[name] = change(wanted.tensors[name])
    with pytest.raises(ValueError, match=message):
        wanted.plan()


def test_as_many_heads_stream_as_the_sparsity_says(load):
    wanted = Wanted(load("llama")).retrieval()
    for sparsity in (0, 0.2, 0.5, 0.75, 1):
        assert wanted.plan(sparsity=sparsity).streaming_heads == round(6 * sparsity)
    assert wanted.plan().sparsity == 0.5  # what was calibrated for
    assert all(one is None for one in wanted.plan(sparsity=0.0).layers)


def test_a_packed_model_follows_a_plan(packed):
    model, ids = AutoModelForCausalLM.from_pretrained(packed("llama", "rtn")).eval(), ids_of(40)
    plan = Wanted(model).retrieval(sink=2, recent=7).plan(sparsity=0.5)
    reference = expected(model, ids, streaming_patterns(plan, 2, 7))
    attach(model, plan)
    close(in_chunks(model, ids, [30, 9, 1], PlanCache(model)), reference)


def test_a_streamed_model_follows_a_plan(checkpoint, load):
    from acc.calibrate.stream import Stream
    from acc.formats.source import open_source

    model, ids = load("gemma3_text"), ids_of(40)
    plan = Wanted(model).retrieval(sink=2, recent=7).plan(sparsity=0.5)
    attach(model, plan)
    stream = Stream(open_source(checkpoint("gemma3_text")), dtype=torch.float32)
    with torch.no_grad(), stream.skeleton.replace_attention(planned(plan, stream.skeleton)):
        for block in stream.blocks([ids]):
            block.run()
        close(next(iter(stream.logits())), model(ids, use_cache=False).logits)
