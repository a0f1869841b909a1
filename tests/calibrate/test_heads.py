"""The search for sparse patterns: planted heads, brute force over the whole matrix, and the program's optimum."""

import itertools

import pytest
import torch
from acc.calibrate.attention import learn
from acc.calibrate.base import Attended, Subject
from acc.calibrate.head_search import (
    assign,
    candidates,
    choose,
    coverage,
    least_cost,
    margins,
    score,
    scored_blocks,
)
from acc.calibrate.heads import GAMMAS, Heads
from acc.calibrate.prompts import Prompt
from acc.formats.calibration import Journal
from acc.formats.model import AttentionLayer
from acc.formats.patterns import BLOCKS, DENSE, STREAMING, VERTICAL_SLASH, budget_at, dense_cost, prefill_index
from acc.formats.source import open_source
from acc.kernels.attention_index import cost


def attended(tokens, heads=4, key_heads=2, width=16, seed=0, query=None, key=None):
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(heads, tokens, width, generator=generator) if query is None else query
    key = torch.randn(key_heads, tokens, width, generator=generator) if key is None else key
    value = torch.randn(len(key), tokens, 8, generator=generator)
    projection = torch.randn(24, len(query) * 8, generator=generator)
    layer = AttentionLayer(0, "layers.0", len(query), len(key), query.shape[-1], None)
    prompt = Prompt(torch.zeros(tokens, dtype=torch.long), "text", "made up")
    return Attended(layer, prompt, query, key, value, 0.5, projection, torch.zeros(tokens, 24))


def concluded(seen, **settings):
    """What the pass says of a model of one layer that was given these prompts."""
    one = Heads(**settings)
    learner = one.learner(seen[0].layer)
    for prompt in seen:
        learner.see(prompt)
    subject = Subject(None, [seen[0].layer], [x.prompt for x in seen], None, "cpu", lambda share: None)
    return one.conclude(subject, {0: learner.result()})


def lost(x, index, rows):
    """Recall and output error `[H]` over rows, from the whole matrix in fp64 and the index read by plain loops."""
    heads, tokens = x.query.shape[:2]
    group = heads // len(x.key)
    seen = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for h in range(heads):
        for t in range(tokens):
            r = t // 64
            for n in range(index.block_count[0, h, r]):
                first = int(index.block_offset[0, h, r, n])
                seen[h, t, max(first, 0) : max(first + 64, 0)] = True
            for n in range(index.column_count[0, h, r]):
                seen[h, t, index.column_index[0, h, r, n]] = True
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    recall, error, dense = torch.zeros(heads), torch.zeros(heads, tokens), []
    outputs = []
    for h in range(heads):
        logits = x.scaling * x.query[h].double() @ x.key[h // group].double().T
        value = x.value[h // group].double()
        full = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        recall[h] = (full * seen[h]).sum(-1)[rows].mean()
        dense.append(full @ value)
        outputs.append(logits.masked_fill(~(causal & seen[h]), -torch.inf).softmax(-1) @ value)
    whole = torch.cat(dense, -1) @ x.projection.double().T  # [T, hidden]
    for h in range(heads):
        part = x.projection[:, 8 * h : 8 * h + 8].double()
        error[h] = ((outputs[h] - dense[h]) @ part.T).square().sum(-1) / whole.square().sum(-1)
    return recall, error[:, rows].mean(-1)


KIND = torch.tensor([DENSE, STREAMING, VERTICAL_SLASH, BLOCKS])


@pytest.mark.parametrize(("blocks", "stride"), [([0, 1, 2, 3, 4], 1), ([1, 3], 4)])
def test_recall_and_error_are_those_of_the_whole_matrix(blocks, stride):
    x = attended(300)
    budgets = [torch.tensor([[64, 128]] * 4), torch.tensor([[100, 192]] * 4)]
    indices = [prefill_index(KIND, b, x.query[None], x.key[None], scaling=x.scaling) for b in budgets]
    recall, error = score(
        x.query,
        x.key,
        x.value,
        indices,
        scaling=x.scaling,
        projection=x.projection,
        blocks=blocks,
        stride=stride,
    )
    rows = [t for t in range(300) if t // 64 in blocks and (t + 1) % stride == 0]
    for k, index in enumerate(indices):
        expected = lost(x, index, rows)
        torch.testing.assert_close(recall[:, k], expected[0].double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(error[:, k], expected[1].double(), rtol=1e-3, atol=1e-6)
    assert recall[0].tolist() == pytest.approx([1, 1])
    assert (error[2:, 0] > 1e-3).all()


def test_candidates_are_taken_in_parts_without_a_difference(monkeypatch):
    x = attended(300)
    budgets = [torch.tensor([[64 * n, 128]] * 4) for n in (1, 2, 3)]
    indices = [prefill_index(KIND, b, x.query[None], x.key[None], scaling=x.scaling) for b in budgets]
    options = {"scaling": x.scaling, "projection": x.projection, "blocks": [1, 3]}
    whole = score(x.query, x.key, x.value, indices, **options)
    monkeypatch.setattr("acc.calibrate.head_search.AT_ONCE", 1)
    for one, other in zip(whole, score(x.query, x.key, x.value, indices, **options), strict=True):
        torch.testing.assert_close(one, other)


def test_scored_rows_are_none_that_patterns_are_estimated_from():
    for tokens in (128, 200, 1000, 4096, 4090):
        blocks = scored_blocks(tokens)
        assert 1 <= len(blocks) <= 8
        assert 64 * (blocks[-1] + 1) <= tokens - 64
        assert 64 * (blocks[-1] + 2) > tokens - 64
    assert set(scored_blocks(4096, [(1280, 1285), (4080, 4085)])) - set(scored_blocks(4096)) == {19, 20}


def planted(tokens=1024):
    """Four heads: one looks at first and recent keys, one at columns and along a diagonal, one at blocks, one
    everywhere. The last 64 rows are no different for any but the first."""
    blocks = tokens // 64
    token, block = torch.eye(tokens), torch.eye(blocks).repeat_interleave(64, 0)
    key = torch.cat([token, block], 1)
    query = torch.zeros(4, tokens, tokens + blocks)
    chosen = torch.randint(0, blocks, (blocks,), generator=torch.Generator().manual_seed(2))
    for t in range(tokens):
        near = range(max(t - 150, 0), t + 1) if t < tokens - 64 else range(t - 20, t + 1)
        query[0, t, [0, 1, *near]] = 1
        if t >= tokens - 64:  # which look away at places of their own
            query[0, t, [(37 * t) % (tokens // 2), (53 * t) % (tokens // 2)]] = 1
        query[1, t, [j for j in (130, 300, 301, 555) if j <= t]] = 1
        query[1, t, max(t - 400, 0)] = 1
        query[2, t, tokens + min(int(chosen[t // 64]), t // 64)] = 1
    return attended(tokens, query=24 * query, key=key.expand(4, -1, -1))


@pytest.mark.parametrize("objective", ["error", "squares", "recall"])
def test_planted_heads_get_their_kinds(objective):
    learned = concluded([planted()], cost=0.6, objective=objective)
    assert learned.tensors["kind"][0, :3].tolist() == [STREAMING, VERTICAL_SLASH, BLOCKS]
    assert (learned.tensors["recall"][0, :3] > 0.9).all()
    assert (learned.tensors["margin"][0, 1:3] > 1e-4).all()
    assert float(learned.tensors["cost"].mean()) <= 0.6


def test_more_budget_never_keeps_less():
    x = attended(1024)
    tensors = concluded([x]).tensors
    kind, share = tensors["curve_kind"], tensors["curve_budget"]
    for one in (STREAMING, BLOCKS):
        mine = (kind == one).nonzero()[:, 0]
        mine = mine[share[mine].sum(-1).argsort()]
        kept = tensors["curve_recall"][0][:, mine, 0]
        assert (kept.diff(dim=1) >= -1e-6).all()
        assert (tensors["curve_cost"][0][:, mine, 0].diff(dim=1) >= 0).all()
    full = [
        prefill_index(torch.full((4,), one), torch.tensor([[1024, 1024]] * 4), x.query[None], x.key[None], scaling=0.5)
        for one in (STREAMING, VERTICAL_SLASH, BLOCKS)
    ]
    recall, error = score(x.query, x.key, x.value, full, scaling=0.5, projection=x.projection, blocks=[7, 14])
    torch.testing.assert_close(recall, torch.ones_like(recall))
    assert (error < 1e-9).all()


def test_what_is_stored_is_what_runs():
    seen = [attended(n, seed=n) for n in (640, 1280)]
    learned = concluded(seen, cost=0.5, minimum_recall=0)
    t = learned.tensors
    assert t["length"].tolist() == [640, 1280]
    assert not learned.events
    for at, x in enumerate(seen):
        tokens = len(x.prompt)
        budget = budget_at(t["length"], t["budget"][0], tokens)
        index = prefill_index(t["kind"][0], budget, x.query[None], x.key[None], scaling=x.scaling)
        recall, error = score(
            x.query,
            x.key,
            x.value,
            [index],
            scaling=x.scaling,
            projection=x.projection,
            blocks=scored_blocks(tokens),
        )
        torch.testing.assert_close(t["recall"][0, :, at], recall[:, 0].float())
        torch.testing.assert_close(t["error"][0, :, at], error[:, 0].float())
        price = cost(index, tokens)[0] / dense_cost(tokens, tokens)
        torch.testing.assert_close(t["cost"][0, :, at], price.float())
        assert float(price.mean()) <= 0.5 + 1e-6
    assert learned.summary["at_1280_tokens"]["cost"] == pytest.approx(float(t["cost"][..., 1].mean()), abs=1e-4)


def test_heads_that_keep_too_little_stay_dense():
    learned = concluded([attended(1024)], cost=1.0, minimum_recall=0.97)
    assert (learned.tensors["recall"] >= 0.97).all()
    dense = learned.tensors["kind"] == DENSE
    assert (learned.tensors["recall"][dense] == 1).all()
    assert (learned.tensors["budget"][dense] == 1).all()


def test_a_cost_that_cannot_be_reached_is_an_event():
    learned = concluded([attended(512)], cost=0.05)
    least = float(learned.tensors["cost"].mean())
    assert least > 0.05
    assert learned.events[0].startswith(f"512 tokens: the least budgets cost {least:.2f} of dense attention")


def test_the_least_gamma_that_keeps_enough():
    x = attended(1024)
    for target in (0.5, 0.97):
        learned = concluded([x], gamma_recall=target)
        gamma = round(float(learned.tensors["gamma"]), 4)
        assert gamma in GAMMAS
        kept = learned.summary["gamma_recall"]
        assert kept >= target or any(f"gamma {GAMMAS[-1]}" in event for event in learned.events)
        if target == 0.5:
            assert gamma == GAMMAS[0]


def test_short_prompts_count_only_where_there_are_no_others():
    assert concluded([attended(320), attended(640)], cost=0.5).tensors["length"].tolist() == [640]
    assert concluded([attended(192), attended(320), attended(40)], cost=0.9).tensors["length"].tolist() == [320]
    learned = concluded([attended(100)])
    assert (learned.tensors["kind"] == DENSE).all()
    assert (learned.tensors["budget"] == 1).all()
    assert "every prompt is shorter than 128 tokens" in learned.events[0]


def problem(seed, heads=3, lengths=2):
    kind = torch.tensor([0, 1, 1, 2, 2])
    generator = torch.Generator().manual_seed(seed)
    loss, price = torch.rand(2, heads, 5, lengths, generator=generator, dtype=torch.float64)
    loss[:, 0], price[:, 0] = 0, 1
    allowed = torch.rand(heads, 5, lengths, generator=generator) > 0.15
    allowed[:, 0] = True
    return kind, loss, price, allowed


def assignments(kind, loss, price, allowed):
    """Every assignment that keeps a head to one kind: its loss and its mean cost at each length."""
    heads, count, lengths = loss.shape
    of_head = [
        [
            picks
            for picks in itertools.product(range(count), repeat=lengths)
            if len({int(kind[k]) for k in picks}) == 1 and all(allowed[h, k, b] for b, k in enumerate(picks))
        ]
        for h in range(heads)
    ]
    for chosen in itertools.product(*of_head):
        total = sum(float(loss[h, k, b]) for h, picks in enumerate(chosen) for b, k in enumerate(picks))
        means = [sum(float(price[h, picks[b], b]) for h, picks in enumerate(chosen)) / heads for b in range(lengths)]
        yield total, means


@pytest.mark.parametrize("seed", range(6))
def test_the_program_finds_the_optimum(seed):
    kind, loss, price, allowed = problem(seed)
    limit = torch.tensor([0.45, 0.6], dtype=torch.float64).maximum(least_cost(kind, price, allowed) + 1e-9)
    choice = assign(kind, loss, price, allowed, limit)
    at = (torch.arange(3)[:, None], choice, torch.arange(2))
    assert allowed[at].all()
    assert (kind[choice] == kind[choice[:, :1]]).all()
    assert (price[at].mean(0) <= limit + 1e-9).all()
    best = min(
        total
        for total, means in assignments(kind, loss, price, allowed)
        if all(mean <= float(most) for mean, most in zip(means, limit, strict=True))
    )
    assert float(loss[at].sum()) == pytest.approx(best, abs=1e-3)


def test_kinds_are_those_of_the_greatest_length_and_are_allowed_at_all():
    """A head, two kinds besides dense: the first is best at the greatest length, the second at the least."""
    kind = torch.tensor([0, 1, 2], dtype=torch.uint8)
    loss = torch.tensor([[[0.0, 0.0], [5.0, 1.0], [1.0, 2.0]]])
    cost = torch.tensor([[[1.0, 1.0], [0.5, 0.2], [0.2, 0.2]]])
    allowed = torch.ones_like(loss, dtype=torch.bool)
    choice, least = choose(kind, loss, cost, allowed, 0.2)
    assert choice.tolist() == [[1, 1]]
    torch.testing.assert_close(least, torch.tensor([0.5, 0.2]))
    allowed[0, 1, 0] = False
    assert choose(kind, loss, cost, allowed, 0.2)[0].tolist() == [[2, 2]]


def test_a_limit_below_all_assignments_is_refused():
    kind, loss, price, allowed = problem(0)
    with pytest.raises(ValueError, match="no assignment of kinds costs as little"):
        assign(kind, loss, price, allowed, torch.tensor([0.01, 0.9], dtype=torch.float64))


def test_the_margin_is_to_the_next_best_kind():
    kind = torch.tensor([0, 1, 1, 2, 2])
    loss = torch.tensor([[0.0, 0.2, 0.1, 0.5, 0.3], [0.0, 0.4, 0.2, 0.3, 0.05]])[..., None]
    price = torch.tensor([[1.0, 0.2, 0.4, 0.2, 0.5], [1.0, 0.2, 0.4, 0.3, 0.6]])[..., None]
    allowed = torch.ones_like(loss, dtype=torch.bool)
    # the first could be of kind 2 at 0.2; the second, of kind 2 at 0.3, of kind 1 at 0.2; dense would lose its best
    found = margins(kind, loss, price, allowed, torch.tensor([[2], [3]]))
    assert found.tolist() == pytest.approx([0.5 - 0.1, 0.4 - 0.3])
    assert margins(kind, loss, price, allowed, torch.tensor([[0], [0]])).tolist() == pytest.approx([0.1, 0.05])


def test_candidates_begin_with_dense_and_cover_each_kind():
    kind, share = candidates(3)
    assert kind[0] == DENSE
    assert share[0].tolist() == [1, 1]
    assert [(kind == one).sum() for one in range(4)] == [1, 3, 9, 3]
    assert (share[1:].sum(-1) <= 0.5).all()


def test_coverage_reads_the_index():
    x = attended(200)
    index = prefill_index(KIND, torch.tensor([[64, 128]] * 4), x.query[None], x.key[None], scaling=0.5)
    seen = coverage(index, [1, 3], 200)
    assert seen.shape == (4, 2, 200)
    assert seen[0, 1].all()
    assert seen[:, :, 0].all()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_end_to_end(checkpoint, tmp_path, family):
    source = open_source(checkpoint(family))
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(torch.randint(3, 128, (n,), generator=generator), "text", "random") for n in (192, 256, 256)]
    prompts.append(Prompt(torch.randint(3, 128, (250,), generator=generator), "passkey", "random", (), ((100, 105),)))
    journal = Journal(tmp_path / "out", {"x": 1})
    learned = learn(source, [Heads(cost=0.8)], prompts, journal, dtype=torch.float32)["heads"]
    t = learned.tensors
    assert t["kind"].shape == (3, 4)
    assert t["kind"].dtype == torch.uint8
    assert t["length"].tolist() == [256]
    assert t["length"].dtype == torch.int32
    assert t["budget"].shape == (3, 4, 1, 2)
    assert ((t["budget"] >= 0) & (t["budget"] <= 1)).all()
    assert all(bool(x.isfinite().all()) for x in t.values() if x.is_floating_point())
    left = torch.tensor([layer in (0, 2) and family == "gemma3_text" for layer in range(3)])
    assert (t["kind"][left] == DENSE).all()
    assert (t["budget"][left] == 1).all()
    assert (t["recall"][left] == 1).all()
    assert (t["cost"][~left].mean((0, 1)) <= 0.8 + 1e-6).all()
    assert sum(learned.summary["kinds"].values()) == 4 * int((~left).sum())
