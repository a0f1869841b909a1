"""Scores against plain float64 loops over positions, and what a fingerprint does and does not forgive."""

from __future__ import annotations

import copy
import json
import math
import statistics

import pytest
import torch
from acc.calibrate.evaluate import (
    BF16_TOLERANCE,
    Scores,
    evaluate,
    fingerprint,
    fingerprint_ids,
    same_fingerprint,
    unscored,
    windows,
)
from transformers import AutoConfig, AutoModelForCausalLM


class Fake:
    """Streams logits that are given, in the order of the batches, only after the blocks."""

    def __init__(self, logits, blocks=3):
        self.given, self.count, self.passed = logits, blocks, 0

    def blocks(self, batches):
        self.batches = batches
        for index in range(self.count):
            self.passed += 1
            yield index

    def logits(self):
        assert self.passed == self.count
        assert all(b.shape[0] == 1 for b in self.batches)
        yield from self.given


def random_case(count=4, window=17, vocab=53, seed=0, scale=3.0):
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (count, window), generator=source)
    own = scale * torch.randn(count, 1, window, vocab, generator=source)
    base = own + 0.5 * torch.randn(own.shape, generator=source)
    return ids, own, base


def plain_scores(ids, own, base):
    """Per window: nll, nll of the base, KL, top-1; position by position in float64."""
    rows = []
    for window, p, b in zip(ids.tolist(), own[:, 0].double(), base[:, 0].double()):
        sums = [0.0] * 4
        for t in range(len(window) - 1):
            p_of, b_of = (torch.exp(x[t] - x[t].max()) / torch.exp(x[t] - x[t].max()).sum() for x in (p, b))
            sums[0] -= math.log(p_of[window[t + 1]])
            sums[1] -= math.log(b_of[window[t + 1]])
            sums[2] += sum(float(y) * math.log(float(y) / float(x)) for x, y in zip(p_of, b_of))
            sums[3] += float(p_of.argmax() == b_of.argmax())
        rows.append([s / (len(window) - 1) for s in sums])
    return [list(column) for column in zip(*rows)]


@pytest.mark.parametrize(("count", "window", "vocab"), [(1, 2, 3), (4, 17, 53), (3, 40, 200)])
def test_scores_equal_a_plain_loop(count, window, vocab):
    ids, own, base = random_case(count, window, vocab)
    found = evaluate(Fake(own), Fake(base), ids)
    nll, nll_base, kl, top1 = plain_scores(ids, own, base)
    mean = statistics.fmean
    excess = [a - b for a, b in zip(nll, nll_base)]
    expected = {
        "nll": mean(nll),
        "perplexity": math.exp(mean(nll)),
        "nll_base": mean(nll_base),
        "perplexity_base": math.exp(mean(nll_base)),
        "kl": mean(kl),
        "top1": mean(top1),
        "ppl_ratio": math.exp(mean(excess)),
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert (found["windows"], found["window"], found["tokens"]) == (count, window, count * (window - 1))
    if count > 1:
        error = {k: statistics.stdev(v) / math.sqrt(count) for k, v in (("nll", nll), ("kl", kl), ("top1", top1))}
        assert {k: found[f"{k}_stderr"] for k in error} == pytest.approx(error, rel=1e-4)
        assert found["perplexity_stderr"] == pytest.approx(math.exp(mean(nll)) * error["nll"], rel=1e-4)
        paired = statistics.stdev(excess) / math.sqrt(count)
        assert found["ppl_ratio_stderr"] == pytest.approx(found["ppl_ratio"] * paired, rel=1e-4)
    else:
        assert all(v is None for k, v in found.items() if k.endswith("_stderr"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_without_a_base_nothing_is_said_of_one():
    ids, own, _ = random_case()
    alone, both = evaluate(Fake(own), None, ids), evaluate(Fake(own), Fake(own), ids)
    assert alone.keys() < both.keys()
    assert {k: both[k] for k in alone} == alone
    assert "kl" not in alone


def test_a_model_is_its_own_base():
    ids, own, _ = random_case(scale=30.0)
    found = evaluate(Fake(own), Fake(own.clone()), ids)
    assert (found["kl"], found["top1"], found["ppl_ratio"]) == (0.0, 1.0, 1.0)
    assert found["ppl_ratio_stderr"] == 0.0


@pytest.mark.parametrize("elements", [1, 53, 160, 10**9])
def test_the_size_of_the_pieces_changes_nothing(elements):
    ids, own, base = random_case()
    pieces, whole = Scores(elements), Scores()
    before = own.clone(), base.clone()
    for i, p, b in zip(ids, own, base):
        pieces.add(i, p[0], b[0])
        whole.add(i, p[0], b[0])
    assert pieces.result() == pytest.approx(whole.result(), rel=1e-12)
    assert torch.equal(own, before[0])
    assert torch.equal(base, before[1])


def test_uniform_predictions_cost_the_logarithm_of_the_vocabulary():
    ids = torch.arange(8).view(1, 8)
    found = evaluate(Fake([torch.full((1, 8, 1000), 7.0)]), None, ids)
    assert found["perplexity"] == pytest.approx(1000)


def test_divergence_has_the_right_direction():
    base, own = torch.tensor([0.9, 0.1]).log().expand(1, 5, 2), torch.tensor([0.5, 0.5]).log().expand(1, 5, 2)
    found = evaluate(Fake([own]), Fake([base]), torch.zeros(1, 5, dtype=torch.long))
    assert found["kl"] == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)


def test_half_precision_logits_are_scored_in_single():
    ids, own, base = random_case(vocab=2000)
    half = own.bfloat16(), base.bfloat16()
    found = evaluate(Fake(half[0]), Fake(half[1]), ids)
    assert found == pytest.approx(evaluate(Fake(half[0].float()), Fake(half[1].float()), ids), rel=1e-12)


def test_nll_is_the_loss_of_transformers(tiny):
    ids = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = [tiny(w[None], labels=w[None]).loss.item() for w in ids]
        logits = [tiny(w[None]).logits for w in ids]
    assert evaluate(Fake(logits), None, ids)["nll"] == pytest.approx(statistics.fmean(losses), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_names_its_window(value):
    ids, own, _ = random_case()
    broken = own.clone()
    broken[2, 0, 5, 7] = value
    with pytest.raises(ValueError, match="window 3: the model's logits are not finite"):
        evaluate(Fake(broken), None, ids)
    with pytest.raises(ValueError, match="window 3: the base's logits are not finite"):
        evaluate(Fake(own), Fake(broken), ids)


def test_models_of_different_vocabularies_are_not_compared():
    ids, own, base = random_case()
    with pytest.raises(ValueError, match="a vocabulary of 53, its base one of 50"):
        evaluate(Fake(own), Fake(base[..., :50]), ids)


def test_a_hopeless_model_has_infinite_perplexity():
    logits = torch.zeros(1, 4, 3)
    logits[..., 0] = 2000.0
    found = evaluate(Fake([logits]), None, torch.ones(1, 4, dtype=torch.long))
    assert found["perplexity"] == math.inf
    assert found["nll"] == 2000.0


def test_progress_counts_blocks_and_windows():
    ids, own, base = random_case(count=2)
    told = []
    evaluate(Fake(own, 2), Fake(base, 2), ids, lambda stage, done: told.append((stage, done)))
    assert told == [("model", 1), ("model", 2), ("base", 1), ("base", 2), ("windows", 1), ("windows", 2)]


@pytest.mark.parametrize(
    ("tokens", "window", "count"), [(10, 3, None), (9, 3, None), (100, 7, 4), (20, 7, 50), (5, 5, 1)]
)
def test_windows_are_the_text_from_the_start(tokens, window, count):
    ids = torch.arange(tokens)
    cut = windows(ids, window, count)
    expected = tokens // window if count is None else min(count, tokens // window)
    assert cut.shape == (expected, window)
    assert torch.equal(cut.flatten(), ids[: expected * window])
    said = unscored(ids, cut, count)
    rest = tokens - cut.numel()
    assert said.startswith(f"{expected} windows of {window} tokens")
    assert (f"the last {rest} tokens" in said) == (rest > 0)
    assert ("(50 asked for)" in said) == (count == 50)


@pytest.mark.parametrize(
    ("tokens", "window", "count", "message"),
    [
        (10, 11, None, "the text has 10 tokens, fewer than one window of 11; use --window 10 or less"),
        (1, 2, None, "evaluate on a longer text"),
        (10, 1, None, "a window needs 2 tokens"),
        (10, 5, 0, "--windows 0"),
    ],
)
def test_bad_windows(tokens, window, count, message):
    with pytest.raises(ValueError, match=message):
        windows(torch.arange(tokens), window, count)


def make_moe(vocab=512):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.1,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def tiny():
    return make_moe(64)


@pytest.fixture(scope="module")
def moe():
    return make_moe()


@torch.no_grad()
def taken(model):
    return fingerprint(model(fingerprint_ids(model.config.vocab_size)).logits)


@pytest.mark.parametrize("vocab", [1, 2, 17, 512, 49152, 262144])
def test_fingerprint_ids_are_fixed_and_spread(vocab):
    ids = fingerprint_ids(vocab)
    assert ids.shape == (1, 16)
    assert torch.equal(ids, fingerprint_ids(vocab))
    assert 0 <= ids.min()
    assert ids.max() < vocab
    if vocab >= 512:
        assert len(ids.unique()) == 16
        assert ids[0].sort().values.diff().max() < vocab / 8
    assert fingerprint_ids(49152)[0, :4].tolist() == [24576, 5801, 36179, 17404]  # recorded in manifests: never change


def test_a_fingerprint_is_small_and_survives_json(moe):
    made = taken(moe)
    text = json.dumps(made, allow_nan=False)
    assert len(text) < 600
    assert json.loads(text) == made == taken(moe)
    assert same_fingerprint(made, json.loads(text), tolerance=0.0) is None


def test_a_fingerprint_forgives_rounding(moe):
    expected = taken(moe)
    precise = copy.deepcopy(moe)
    precise.set_experts_implementation("eager")
    assert same_fingerprint(expected, taken(precise.double())) is None
    assert same_fingerprint(expected, taken(copy.deepcopy(moe).bfloat16()), BF16_TOLERANCE) is None
    logits = torch.randn(1, 4, 300)
    assert same_fingerprint(fingerprint(logits), fingerprint(logits + 5.0)) is None  # softmax does not see a shift


@torch.no_grad()
def spoil(model, how):
    experts = model.model.layers[1].mlp.experts
    if how == "two experts exchanged":
        for parameter in experts.parameters():
            parameter[[0, 1]] = parameter[[1, 0]]
    elif how == "experts reversed":
        for parameter in experts.parameters():
            parameter.copy_(parameter.flip(0))
    elif how == "a scale doubled":
        model.model.layers[1].self_attn.v_proj.weight.mul_(2)
    elif how == "a group lost":
        model.model.layers[0].self_attn.o_proj.weight[:, :16] = 0
    elif how == "random weights":
        model.lm_head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize(
    "how", ["two experts exchanged", "experts reversed", "a scale doubled", "a group lost", "random weights"]
)
def test_a_fingerprint_does_not_forgive_mistakes(moe, how):
    assert "the logits differ" in str(same_fingerprint(taken(moe), taken(spoil(copy.deepcopy(moe), how))))


def test_fingerprints_of_different_vocabularies(moe, tiny):
    assert same_fingerprint(taken(moe), taken(tiny)) == "the vocabulary has 64 entries, 512 were recorded"


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.1])
def test_neighbouring_logits_may_change_places(scale):
    """Top entries known of one side only count as far as they must have moved, so no tie can raise a false alarm."""
    source = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(400, generator=source)
        logits[:20] = 4.0 + scale * torch.rand(20, generator=source)
        other = logits + scale * torch.rand(400, generator=source)
        assert same_fingerprint(fingerprint(logits), fingerprint(other), tolerance=scale) is None
        assert same_fingerprint(fingerprint(other), fingerprint(logits), tolerance=scale) is None


def test_no_fingerprint_of_what_is_not_finite():
    logits = torch.zeros(1, 3, 10)
    logits[0, -1, 4] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        fingerprint(logits)
    good = fingerprint(torch.randn(10))
    assert same_fingerprint(good, good | {"probe": [math.nan] * 16}) is not None
