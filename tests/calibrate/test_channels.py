"""Channels: sums against plain loops, planted outliers that the official statistic misses, recall counted by hand."""

from types import SimpleNamespace

import pytest
import torch
from acc.calibrate import channels as module
from acc.calibrate.base import Attended
from acc.calibrate.channels import STATISTICS, Channels, Moments, Problem, Queries
from acc.calibrate.prompts import Prompt
from acc.formats.model import AttentionLayer

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
LAYER = AttentionLayer(0, "layers.0.self_attn", HEADS, KV_HEADS, HEAD_DIM, None)


def attended(tokens=96, seed=0, kind="text", asked=(), query=None, key=None):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(HEADS, tokens, HEAD_DIM, generator=draw) if query is None else query
    key = torch.randn(KV_HEADS, tokens, HEAD_DIM, generator=draw) if key is None else key
    prompt = Prompt(torch.zeros(tokens, dtype=torch.int64), kind, "random", asked=asked)
    return Attended(LAYER, prompt, query, key, key, HEAD_DIM**-0.5, None, torch.zeros(tokens, 8))


def concluded(prompts, **settings):
    """What the pass says of one layer, and of another one that is left alone."""
    settings = Channels(**{"sink": 1, "recent": 2, **settings})
    learner = settings.learner(LAYER)
    for one in prompts:
        learner.see(one)
    layers = [LAYER, AttentionLayer(1, "", HEADS, KV_HEADS, HEAD_DIM, "another kind")]
    subject = SimpleNamespace(layers=layers, open=layers[:1], prompts=[one.prompt for one in prompts])
    return settings.conclude(subject, {0: learner.result()})


def planted(tokens, seed, outliers):
    """Random queries and keys; in each head one channel is 20 times as large in both."""
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(HEADS, tokens, HEAD_DIM, generator=draw)
    key = torch.randn(KV_HEADS, tokens, HEAD_DIM, generator=draw)
    for head, channel in enumerate(outliers):
        key[head, :, channel] *= 20
        for own in range(head * HEADS // KV_HEADS, (head + 1) * HEADS // KV_HEADS):
            query[own, :, channel] *= 20
    return query, key


def test_moments_are_those_of_plain_loops():
    prompts = [attended(tokens, seed) for seed, tokens in enumerate((5, 8, 3))]
    moments = Moments(HEADS, KV_HEADS, HEAD_DIM)
    for one in prompts:
        moments.update(one.query, one.key)
    product = torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64)
    grams = torch.zeros(3, KV_HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    for one in prompts:
        mean = one.key.double().mean(1)
        for token in range(one.key.shape[1]):
            for head in range(HEADS):
                query, key = one.query[head, token].double(), one.key[head // 2, token].double()
                for channel in range(HEAD_DIM):
                    product[head, channel] += abs(float(query[channel]) * float(key[channel]))
                grams[0, head // 2] += torch.outer(query, query)
            for head in range(KV_HEADS):
                key = one.key[head, token].double()
                grams[1, head] += torch.outer(key, key)
                grams[2, head] += torch.outer(key - mean[head], key - mean[head])
    assert moments.tokens == 16
    torch.testing.assert_close(moments.product, product)
    torch.testing.assert_close(torch.stack([moments.query, moments.key, moments.spread]), grams)


def test_moments_do_not_depend_on_the_order_of_prompts():
    prompts = [attended(tokens, seed) for seed, tokens in enumerate((40, 9, 21))]
    one, other = Moments(HEADS, KV_HEADS, HEAD_DIM), Moments(HEADS, KV_HEADS, HEAD_DIM)
    for a, b in zip(prompts, reversed(prompts)):
        one.update(a.query, a.key)
        other.update(b.query, b.key)
    torch.testing.assert_close(one.product, other.product)
    torch.testing.assert_close(one.variance, other.variance)


def official_statistic(query, key):
    """The "qk" statistic as the official script has it: heads and tokens are mixed by a reshape without a transpose,
    and of several blocks only the last one is left."""
    for start in range(0, query.shape[1], 512):
        q, k = query[:, start : start + 512], key[:, start : start + 512].repeat_interleave(len(query) // len(key), 0)
        found = (q.reshape(-1, len(query), q.shape[-1]) * k.reshape(-1, len(query), q.shape[-1])).abs().mean(0)
    return found


@pytest.mark.parametrize("outliers", [(3, 11), (0, 15)])
def test_planted_outliers_come_first_and_the_official_statistic_misses_them(outliers):
    prompts = [planted(128, seed, outliers) for seed in range(4)]
    learned = concluded([attended(128, query=query, key=key) for query, key in prompts]).tensors
    assert tuple(learned["order"][0, :, 0].tolist()) == outliers
    assert tuple(learned["importance"][0].argmax(-1).tolist()) == outliers
    wanted = [outliers[head // 2] for head in range(HEADS)]
    assert learned["product"][0].argmax(-1).tolist() == wanted
    query = torch.cat([query for query, _ in prompts], 1)
    key = torch.cat([key for _, key in prompts], 1)
    foil = official_statistic(query, key)
    assert foil.argmax(-1).tolist() != wanted
    both = foil.argsort(dim=-1, descending=True)[:, :2].sort(-1).values
    assert torch.equal(both, torch.tensor(sorted(outliers)).expand(HEADS, 2))  # one list for all heads


def test_what_all_keys_have_in_common_is_not_taken_for_importance():
    """A channel in which every key has the same large value ranks no token, however large its products are."""
    prompts = []
    for seed in range(4):
        query, key = planted(128, seed, (3, 11))
        query[..., 7] = 30.0
        key[..., 7] = 30.0
        prompts.append(attended(128, query=query, key=key))
    learned = concluded(prompts)
    assert learned.tensors["product"][0].argmax(-1).tolist() == [7] * HEADS
    assert learned.tensors["order"][0, :, 0].tolist() == [3, 11]
    recall = learned.summary["recall"]
    assert recall["chosen"][0] > recall["official"][0] + 0.1


def test_what_is_stored_is_whole():
    learned = concluded([attended(64, seed) for seed in range(4)])
    tensors = learned.tensors
    shapes = {
        "order": (torch.int16, (2, KV_HEADS, HEAD_DIM)),
        "importance": (torch.float32, (2, KV_HEADS, HEAD_DIM)),
        "scale8": (torch.float32, (2, KV_HEADS, HEAD_DIM)),
        "scale4": (torch.float32, (2, KV_HEADS, HEAD_DIM)),
        "dense": (torch.bool, (2,)),
        "count": (torch.int32, (4,)),
        "recall": (torch.float32, (2, KV_HEADS, 4)),
        "recall4": (torch.float32, (2, KV_HEADS, 4)),
        "ceiling": (torch.float32, (2, KV_HEADS)),
        "statistic": (torch.uint8, (2, KV_HEADS)),
        "product": (torch.float32, (2, HEADS, HEAD_DIM)),
    }
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == shapes
    every = torch.arange(HEAD_DIM, dtype=torch.int16).expand(2, KV_HEADS, HEAD_DIM)
    assert torch.equal(tensors["order"].sort(-1).values, every)
    assert torch.equal(tensors["order"][1], every[1])
    assert bool(tensors["dense"][1])
    assert tensors["count"].tolist() == [1, 2, 4, 8]
    torch.testing.assert_close(tensors["importance"][0].sum(-1), torch.ones(KV_HEADS))
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert sum(learned.summary["heads_by_statistic"].values()) == KV_HEADS


def test_a_layer_whose_tokens_are_not_found_stays_dense_and_is_told():
    flat = [attended(256, seed, query=torch.zeros(HEADS, 256, HEAD_DIM)) for seed in range(2)]
    learned = concluded(flat)
    assert learned.tensors["dense"].tolist() == [True, True]
    assert len(learned.events) == 1
    assert "these layers stay dense: 0 (" in learned.events[0]
    assert not concluded(flat, minimum_recall=0).tensors["dense"][0]


def test_a_lone_prompt_is_split_and_says_so():
    query, key = planted(200, 0, (3, 11))
    learned = concluded([attended(query=query, key=key)])
    assert learned.tensors["order"][0, :, 0].tolist() == [3, 11]
    half = query[:, :100].double() * key[:, :100].double().repeat_interleave(2, 0)
    torch.testing.assert_close(learned.tensors["product"][0], half.abs().mean(1).float())
    assert any("one prompt only" in event for event in learned.events)


def plain_recall(one, position, channels, tokens, sink, recent):
    """Attention mass `[Hkv]` of the chosen tokens, one query at a time, in fp64."""
    found = []
    group = HEADS // KV_HEADS
    for head in range(KV_HEADS):
        mass = torch.zeros(position + 1, dtype=torch.float64)
        worth = torch.zeros(position + 1, dtype=torch.float64)
        for own in range(head * group, (head + 1) * group):
            query, keys = one.query[own, position].double(), one.key[head, : position + 1].double()
            mass += (one.scaling * keys @ query).softmax(0) / group
            worth += (one.scaling * keys[:, channels[head]] @ query[channels[head]]).softmax(0)
        budget = min(max(-(-(position + 1) * tokens // 1), sink + recent), position + 1)
        always = {n for n in range(position + 1) if n < sink or n > position - recent}
        ranked = sorted((n for n in range(position + 1) if n not in always), key=lambda n: -float(worth[n]))
        taken = [*always, *ranked][: int(budget)]
        found.append(float(mass[taken].sum()))
    return torch.tensor(found)


def test_recall_is_counted_as_by_hand():
    one = attended(80, 3)
    queries = Queries.of(one, 8)
    problem = Problem.of(queries, 1 / 8, 2, 3)
    order = torch.stack([torch.randperm(HEAD_DIM, generator=torch.Generator().manual_seed(h)) for h in range(KV_HEADS)])
    found = problem.recalls([order[:, :4], order])  # [Hkv, 2, R]
    for row, position in enumerate(queries.position.tolist()):
        for index, count in enumerate((4, HEAD_DIM)):
            wanted = plain_recall(one, position, order[:, :count], 1 / 8, 2, 3)
            torch.testing.assert_close(found[:, index, row], wanted.float(), rtol=1e-4, atol=1e-5)


def test_all_channels_find_the_best_tokens_there_are():
    one = attended(120, 5, query=3 * torch.randn(HEADS, 120, HEAD_DIM, generator=torch.Generator().manual_seed(9)))
    queries = Queries.of(one, 8)
    order = torch.arange(HEAD_DIM).expand(KV_HEADS, -1)
    found = Problem.of(queries, 1 / 8, 0, 1).recalls([order])[:, 0]
    for row, position in enumerate(queries.position.tolist()):
        scores = one.scaling * one.query[:, position].double().view(KV_HEADS, 2, -1) @ one.key.double().mT
        mass = scores[..., : position + 1].softmax(-1).mean(1)
        rest = mass[:, :-1].topk(-(-(position + 1) // 8) - 1).values.sum(-1)
        torch.testing.assert_close(found[:, row], (rest + mass[:, -1]).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [16, 4])
def test_tokens_are_chosen_as_the_runtime_does(bits):
    gone = "the kernels that select by labels are not there"
    select = pytest.importorskip("acc.kernels.attention_select", reason=gone)
    label = pytest.importorskip("acc.kernels.attention_label", reason=gone)
    choose = pytest.importorskip("acc.kernels.chosen", reason=gone)
    one = attended(200, 6)
    queries = Queries.of(one, 6)
    problem = Problem.of(queries, 1 / 8, 2, 3)
    channels = torch.tensor([[3, 0, 9, 14], [5, 1, 2, 12]])
    step = module.label_step(one.key, 4)
    found = problem.recalls([channels], step if bits == 4 else None)[:, 0]
    scale = step.gather(1, channels)
    for row, position in enumerate(queries.position.tolist()):
        keys = one.key[None, :, : position + 1]
        labels = label.attention_label(keys, channels, scale, bits=bits)
        query = one.query[None, :, position]
        score = select.attention_select(query, labels, channels, scale, bits=bits, scaling=one.scaling)
        taken = choose.chosen(score, tokens=-(-(position + 1) // 8), sink=2, recent=3)
        mass = problem.mass[:, row].gather(1, taken[0].long()).sum(1)
        torch.testing.assert_close(found[:, row], mass, rtol=1e-4, atol=1e-5)


def test_held_out_queries_ask_for_passkeys_too():
    rows = module.held_rows(attended(100, kind="passkey", asked=((90, 95), (96, 99))).prompt, 100, 8)
    assert set(rows.tolist()) & {*range(89, 94), *range(95, 98)}
    assert rows.min() >= 50
    assert len(rows) == len(rows.unique())


def test_statistics_do_not_see_the_prompts_that_they_are_measured_on():
    """Prompts of odd number change no statistic: with another one there, every ranking is the same."""
    one, other = attended(64, 1), attended(64, 2)
    same = attended(64, 0)
    first = [concluded([same, held]).tensors["product"] for held in (one, other)]
    assert torch.equal(*first)


@pytest.mark.parametrize("bits", [8, 4])
def test_labels_are_within_half_a_step_and_no_clip_of_the_grid_is_better(bits):
    key = torch.randn(KV_HEADS, 300, HEAD_DIM, generator=torch.Generator().manual_seed(0)) ** 3
    key[:, :, 5] = 0
    step = module.label_step(key, bits)
    largest = 2 ** (bits - 1) - 1
    assert (step[:, 5] == 0).all()
    told = module.labelled(key, step, bits)
    inside = key.abs() <= step[:, None] * largest
    assert inside.float().mean() > 0.95
    assert ((told - key).abs() <= step[:, None] / 2 * 1.0001)[inside].all()
    clipped = (step[:, None] * largest).expand_as(key) * key.sign()
    torch.testing.assert_close(told[~inside], clipped[~inside])
    error = (told - key).square().mean(1)
    for clip in module.CLIPS.tolist():
        other = clip * key.abs().amax(1) / largest
        assert (error <= (module.labelled(key, other, bits) - key).square().mean(1) * 1.0001 + 1e-12).all()


def test_greedy_takes_what_leaves_least_at_every_step():
    root = torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    form = root @ root.mT
    order = module.greedy_order(form)
    share = module.added_variance(form, order)
    for n in range(3):
        left = torch.ones(6, dtype=torch.float64)
        for channel in order[n].tolist():
            rest = {}
            for c in range(6):
                if left[c]:
                    other = left.clone()
                    other[c] = 0
                    rest[c] = float(other @ form[n] @ other)
            assert min(rest, key=rest.__getitem__) == channel
            drop = float(left @ form[n] @ left) - rest[channel]
            assert float(share[n, channel]) == pytest.approx(drop / float(form[n].sum()))
            left[channel] = 0


def test_the_variance_of_far_queries_is_that_of_plain_loops():
    one = attended(30, 4)
    queries = Queries.of(one, 5)
    found = module.query_variance(queries)
    wanted = torch.zeros_like(found)
    for head in range(HEADS):
        for position in queries.position.tolist():
            products = one.query[head, position].double() * one.key[head // 2, : position + 1].double()
            covariance = torch.cov(products.T, correction=0)
            wanted[head // 2] += covariance / covariance.sum()
    torch.testing.assert_close(found, wanted)


def test_drawn_prompts_are_bounded_and_the_same_every_time():
    def drawn():
        side = module.Drawn(3)
        for seed in range(20):
            side.offer(Queries.of(attended(8, seed), 2))
        return side.kept

    one, other = drawn(), drawn()
    assert len(one) == 3
    assert all(torch.equal(a.key, b.key) for a, b in zip(one, other))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model, calibrated on text that it drew itself, and measured on more of it."""
    from acc.calibrate.attention import learn
    from acc.calibrate.prompts import text_prompts
    from acc.calibrate.text import load_text
    from acc.cli.base import sampler, text_limits, tokenizer_of
    from acc.formats.calibration import Journal
    from acc.formats.source import open_source

    source = open_source("demo")
    drawn = {"generate": sampler(source)}
    text = load_text("self", tokenizer_of(source), nsamples=4, seqlen=512, seed=0, **text_limits(source), **drawn)
    prompts = text_prompts(text.batches.flatten(), [512] * 4, "self")
    journal = Journal(tmp_path_factory.mktemp("channels") / "out", {})
    return learn(source, [Channels(rows=64)], prompts, journal)["channels"]


@pytest.mark.parametrize("foil", ["random", "magnitude", "official", "official_heads_mixed"])
def test_the_demo_models_channels_find_more_than_others(demo, foil):
    recall = demo.summary["recall"]
    assert all(chosen >= other - 0.01 for chosen, other in zip(recall["chosen"], recall[foil]))
    assert sum(recall["chosen"]) > sum(recall[foil])


def test_on_the_demo_model_more_channels_find_more(demo):
    chosen = demo.summary["recall"]["chosen"]
    assert chosen == sorted(chosen)
    assert chosen[-1] <= demo.summary["recall_of_all_channels"] + 0.01
    assert set(STATISTICS) == set(demo.summary["heads_by_statistic"])
