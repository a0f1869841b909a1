"""Attention between full and streaming: the ends of the mixture, its gradient, and the constraint on gates."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
from acc.calibrate.base import Subject
from acc.calibrate.gates import Gated, Schedule, by_place, distance, hard, optimise, projected, streaming
from acc.calibrate.prompts import Prompt
from acc.calibrate.stream import Stream
from acc.formats.source import open_source
from transformers import AttentionInterface, AutoModelForCausalLM

SINK, RECENT = 3, 6


def prompts_of(lengths=(40, 31), vocabulary=128):
    generator = torch.Generator().manual_seed(7)
    found = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        asked = ((length - 12, length - 8), (length - 5, length - 1))
        found.append(Prompt(ids, "passkey", "random", ((5, 9), (12, 16)), asked))
    return found


def subject_of(folder, dtype=torch.float64):
    source = open_source(folder)
    layers = Stream(source).skeleton.attention_layers()
    return Subject(source, layers, prompts_of(), dtype, "cpu", lambda share: None)


@contextmanager
def gated(folder, *, sink=SINK, recent=RECENT, keep=True, dtype=torch.float64):
    subject = subject_of(folder, dtype)
    n = sum(layer.kv_heads for layer in subject.open)
    sinks, recents = (torch.as_tensor(x).expand(n).int() for x in (sink, recent))
    model = Gated(subject, subject.prompts, sinks, recents, keep)
    with model.loaded():
        yield model, n


def draw(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def seen_by(tokens, sink, recent):
    """What a streaming head sees, pair by pair."""
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(i + 1):
            allowed[i, j] = j < sink or i - j < recent
    return allowed


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("tokens", [1, 9, 150])
def test_streaming_attention_is_that_of_the_mask(heads, kv_heads, tokens):
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, kv_heads, tokens, 8, generator=generator, dtype=torch.float64)
    sink = torch.randint(1, 20, (kv_heads,), generator=generator)
    recent = torch.randint(1, 60, (kv_heads,), generator=generator)
    found = streaming(query, key, value, sink, recent, 0.3)
    for head in range(heads):
        kv = head // (heads // kv_heads)
        scores = 0.3 * query[:, head] @ key[:, kv].transpose(1, 2)
        scores = scores.masked_fill(~seen_by(tokens, int(sink[kv]), int(recent[kv])), -torch.inf)
        torch.testing.assert_close(found[:, head], scores.softmax(-1) @ value[:, kv])


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text"])
def test_open_gates_are_the_dense_model_exactly(checkpoint, family):
    with gated(checkpoint(family), dtype=torch.float32) as (model, n):
        dense = model.tell(0)
        assert torch.equal(model.tell(0, torch.ones(n)).hidden, dense.hidden)
        loss, _ = model.gradient(0, torch.ones(n), dense)
        assert loss == 0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_closed_gates_are_the_model_with_an_explicit_mask(checkpoint, family):
    folder = checkpoint(family)
    with gated(folder) as (model, n):
        told = model.tell(0, torch.zeros(n))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    prompt = prompts_of()[0]
    mask = torch.zeros(len(prompt), len(prompt), dtype=torch.float64)
    mask = mask.masked_fill(~seen_by(len(prompt), SINK, RECENT), torch.finfo(torch.float64).min)
    rows = [row - 1 for first, end in prompt.asked for row in range(first, end)]
    with torch.no_grad():
        out = reference.model(prompt.ids[None], attention_mask=mask[None, None]).last_hidden_state[0, rows]
        right = reference.lm_head(out).argmax(-1) == prompt.ids[[row + 1 for row in rows]]
    torch.testing.assert_close(told.hidden, out, rtol=1e-4, atol=1e-5)  # softmax and norms run in fp32 there
    assert torch.equal(told.right, right)


def test_a_choice_of_heads_is_the_mixture_with_zeros_and_ones(checkpoint):
    """The short cut that computes each head in its own way alone."""
    with gated(checkpoint("llama")) as (model, n):
        gates = hard(draw(n), 0.5)
        quick = model.tell(0, gates).hidden
        nearly = model.tell(0, gates * (1 - 2e-12) + 1e-12).hidden
    torch.testing.assert_close(quick, nearly, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text"])
def test_the_gradient_is_that_of_finite_differences(checkpoint, family):
    with gated(checkpoint(family)) as (model, n):
        gates, teacher = 0.1 + 0.8 * draw(n), model.tell(0)
        _, gradient = model.gradient(0, gates, teacher)
        step = 1e-3  # norms run in fp32 whatever the model does
        for head in range(n):
            shift = torch.zeros(n, dtype=torch.float64)
            shift[head] = step
            above, below = (
                float(distance(model.tell(0, g).hidden, teacher.hidden)) for g in (gates + shift, gates - shift)
            )
            assert gradient[head] == pytest.approx((above - below) / (2 * step), rel=2e-3, abs=1e-6)
        assert gradient.abs().min() > 0


def test_one_block_at_a_time_is_autograd_through_the_whole_model(checkpoint):
    folder = checkpoint("qwen3")
    prompt = prompts_of()[1]
    with gated(folder) as (model, n), torch.no_grad():  # as the stream over prompts runs it
        gates, teacher = draw(n), model.tell(1)
        loss, gradient = model.gradient(1, gates, teacher)
    with gated(folder, keep=False) as (model, _):
        assert not model.kept
        apart = model.gradient(1, gates, teacher)
    assert apart[0] == loss
    assert torch.equal(apart[1], gradient)

    whole = gates.clone().requires_grad_()
    kv_heads = n // 3

    def mixed(module, query, key, value, mask, scaling=None, **kwargs):
        group = query.shape[1] // kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = scaling * query @ key.transpose(2, 3)
        full = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf).softmax(-1) @ value
        cut = scores.masked_fill(~seen_by(len(prompt), SINK, RECENT), -torch.inf).softmax(-1) @ value
        gate = whole.reshape(3, kv_heads)[module.layer_idx].repeat_interleave(group)[:, None, None]
        return (gate * full + (1 - gate) * cut).transpose(1, 2), None

    AttentionInterface.register("test_mixed", mixed)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="test_mixed")
    rows = [row - 1 for first, end in prompt.asked for row in range(first, end)]
    out = reference.model(prompt.ids[None]).last_hidden_state[0, rows]
    expected = (out - teacher.hidden).square().sum() / teacher.hidden.square().sum()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-7, atol=1e-12)


def test_nothing_is_left_in_memory_afterwards(checkpoint):
    with gated(checkpoint("llama")) as (model, n):
        model.gradient(0, draw(n), model.tell(0))
        skeleton = model._skeleton
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert skeleton.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9])
def test_projected_gates_have_the_mean_and_the_gradient(temperature, sparsity):
    place = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gates = projected(place, sparsity, temperature)
    assert float(gates.mean()) == pytest.approx(1 - sparsity, abs=1e-9)
    assert torch.equal(gates.argsort(), place.argsort())
    weights = draw(20, seed=4)
    found = by_place(gates, weights, temperature)
    for i in range(20):
        shift = torch.zeros(20, dtype=torch.float64)
        shift[i] = 1e-5
        above, below = (weights @ projected(p, sparsity, temperature) for p in (place + shift, place - shift))
        assert float(found[i]) == pytest.approx(float(above - below) / 2e-5, rel=1e-4, abs=1e-7)


def test_hard_gates_are_as_many_as_asked_for():
    place = torch.tensor([0.5, 0.1, 0.1, 0.9, 0.1])
    assert hard(place, 0.4).tolist() == [1, 0, 0, 1, 1]
    for share in (0.0, 0.3, 0.5, 0.7, 1.0):
        assert int((hard(place, share) == 0).sum()) == round(share * 5)


class Planted:
    """A model whose loss is known: heads 2 and 5 must be open, the others cost next to nothing."""

    def gradient(self, number, gates, teacher):
        needs = torch.full((8,), 1e-3).index_fill(0, torch.tensor([2, 5]), 1.0)
        return float((needs * (1 - gates).square()).sum()), -2 * needs * (1 - gates)


@pytest.mark.parametrize("sparsities", [(0.75,), (0.25, 0.5, 0.75)])
def test_the_optimizer_opens_the_heads_that_are_needed(sparsities):
    begin = torch.linspace(1, -1, 8)  # head 5 stands among the last
    ticks = []
    place, losses = optimise(Planted(), begin, [None] * 3, Schedule(sparsities, 60, 0.1, 0.25), ticks.append)
    assert set(place.argsort()[-2:].tolist()) == {2, 5}
    assert len(losses) == 60
    assert ticks == [0, 1, 2] * 20  # a prompt each
    assert begin.equal(torch.linspace(1, -1, 8))
