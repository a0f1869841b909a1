"""Which heads retrieve: what is summed of them, what is concluded, and a model of which it is known."""

import pytest
import torch
from acc.calibrate.attention import learn
from acc.calibrate.base import Attended
from acc.calibrate.prompts import Prompt, passkey_prompt, text_prompts
from acc.calibrate.retrieval import GRAIN, OUTSIDE, Evidence, Retrieval, answers, sizes, split, unseen, weigh
from acc.formats.calibration import Journal
from acc.formats.model import AttentionLayer
from acc.formats.source import open_source
from acc.formats.streaming import streams
from pydantic import ValidationError

SINK, RECENT = 4, 16
LAYER = AttentionLayer(0, "model.layers.0.self_attn", 6, 2, 8, None)


def random_prompt(length, kind="passkey", seed=0, asked=6):
    ids = torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed))
    spans = ((asked, asked + 3),), ((length - 5, length - 2),)
    return Prompt(ids, kind, "random", *(spans if kind == "passkey" else ()))


def attended(prompt, seed=0, projection=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = len(prompt)
    return Attended(
        LAYER,
        prompt,
        2 * draw(6, tokens, 8),
        draw(2, tokens, 8),
        draw(2, tokens, 5),
        0.4,
        draw(12, 30) if projection else None,
        draw(tokens, 12),
    )


def weights_of(seen, head, row, allowed=lambda j, row: True):
    """Attention of one row, pair by pair."""
    key = seen.key[head // 3].double()
    score = [float(seen.scaling * seen.query[head, row].double() @ key[j]) for j in range(row + 1)]
    kept = torch.tensor([s if allowed(j, row) else -torch.inf for j, s in enumerate(score)], dtype=torch.float64)
    return kept.softmax(0)


def in_sight(j, row):
    return j < SINK or row - j < RECENT


def test_of_text_the_attention_out_of_sight_and_by_place_and_distance_is_summed():
    seen = attended(random_prompt(45, "text"))
    learner = Evidence(LAYER, SINK, RECENT)
    learner.see(seen)
    found = learner.result()
    assert float(found["rows"]) == 45 - 20
    for head in range(6):
        outside, places, distances = 0.0, torch.zeros(SINK), torch.zeros(RECENT)
        for row in range(20, 45):
            for j, weight in enumerate(weights_of(seen, head, row).tolist()):
                if j < SINK:
                    places[j] += weight
                elif row - j < RECENT:
                    distances[row - j] += weight
                else:
                    outside += weight
        assert float(found["outside"][head]) == pytest.approx(outside, rel=1e-4)
        torch.testing.assert_close(found["places"][head].float(), places, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["distances"][head].float(), distances, rtol=1e-4, atol=1e-6)


def test_of_passkeys_the_attention_on_what_is_copied_is_summed():
    prompt = random_prompt(40)
    seen = attended(prompt)
    learner = Evidence(LAYER, SINK, RECENT)
    learner.see(seen)
    found = learner.result()
    assert float(found["answers"]) == 3
    for head in range(6):
        copied = sum(weights_of(seen, head, 34 + m)[6 + m] for m in range(3))
        matched = sum(weights_of(seen, head, 34 + m)[5 + m] for m in range(3))
        assert float(found["copied"][head]) == pytest.approx(float(copied), rel=1e-4)
        assert float(found["matched"][head]) == pytest.approx(float(matched), rel=1e-4)


def test_what_a_streaming_head_sees_is_no_sign_of_copying():
    learner = Evidence(LAYER, SINK, RECENT)
    learner.see(attended(random_prompt(40, asked=25)))
    assert float(learner.result()["answers"]) == 0
    assert learner.result()["copied"].abs().max() == 0


def test_the_quadratic_form_is_the_error_of_any_gates():
    prompt = random_prompt(40)
    learner = Evidence(LAYER, SINK, RECENT)
    expected = 0.0
    gates = torch.tensor([0.3, 0.9], dtype=torch.float64)
    for seed in range(2):
        seen = attended(prompt, seed)
        learner.see(seen)
        for row in (34, 35, 36):
            error = torch.zeros(12, dtype=torch.float64)
            for head in range(6):
                value = seen.value[head // 3, : row + 1].double()
                full = weights_of(seen, head, row) @ value
                cut = weights_of(seen, head, row, in_sight) @ value
                mixed = gates[head // 3] * full + (1 - gates[head // 3]) * cut
                error += seen.projection[:, 5 * head : 5 * head + 5].double() @ (mixed - full)
            expected += float(error.square().sum())
    closed = 1 - gates
    assert float(closed @ learner.result()["quadratic"] @ closed) == pytest.approx(expected, rel=1e-4)


def test_without_a_projection_each_head_has_its_own_squares():
    seen = attended(random_prompt(40), projection=False)
    learner = Evidence(LAYER, SINK, RECENT)
    learner.see(seen)
    expected = torch.zeros(2, dtype=torch.float64)
    for row in (34, 35, 36):
        for head in range(6):
            change = weights_of(seen, head, row, in_sight) - weights_of(seen, head, row)
            expected[head // 3] += (change @ seen.value[head // 3, : row + 1].double()).square().sum()
    torch.testing.assert_close(learner.result()["quadratic"], expected.diag(), rtol=1e-4, atol=1e-9)


def test_the_neediest_query_head_speaks_for_its_group():
    learner = Evidence(LAYER, SINK, RECENT)
    learner.see(attended(random_prompt(40)))
    learner.see(attended(random_prompt(45, "text")))
    found = learner.result()
    numbers = weigh([found, found], SINK, RECENT)
    copy = (found["copied"] + found["matched"]) / found["answers"]
    assert numbers["copy"].tolist() == [[float(copy[:3].max()), float(copy[3:].max())]] * 2
    assert numbers["score"].amax() <= 1
    assert numbers["quadratic"].shape == (2, 2, 2)


def test_sizes_cut_off_no_more_than_they_may():
    generator = torch.Generator().manual_seed(0)
    falls = torch.exp(-torch.arange(128) / torch.tensor([2.0, 10.0, 40.0, 1e9])[:, None])
    places, distances = torch.rand(4, 64, generator=generator) * falls[:, :64], falls
    sink, recent = sizes(places, distances, 64, 128)
    seen = places.sum(1) + distances.sum(1)
    for head in range(4):
        for mass, size, whole in ((places, sink, 64), (distances, recent, 128)):
            enough = next(n for n in range(1, whole + 1) if mass[head, n:].sum() <= OUTSIDE / 2 * seen[head] + 1e-9)
            assert int(size[head]) == min(-(-enough // GRAIN) * GRAIN, whole)
    assert int(recent[0]) < int(recent[2])
    assert int(recent[3]) == 128


def test_sizes_stay_full_where_no_text_could_tell():
    sink, recent = sizes(torch.zeros(3, 8), torch.zeros(3, 40), 8, 40)
    assert sink.tolist() == [8] * 3
    assert recent.tolist() == [40] * 3


def test_prompts_are_split_and_those_that_ask_for_nothing_far_are_left_out():
    far = [random_prompt(40 + n, seed=n) for n in range(8)]
    near, text = random_prompt(40, asked=25), random_prompt(40, "text")
    train, test, events = split([near, *far, text], SINK, RECENT, 0.25)
    assert train == far[:6]
    assert test == far[6:]
    assert events == []
    assert split(far[:1], SINK, RECENT, 0.25)[2] == [
        "the cost of streaming is measured on a prompt that gates were learned from"
    ]
    train, test, events = split([near, text], SINK, RECENT, 0.25)
    assert train == test == []
    assert "take a larger --seqlen" in events[0]


def test_what_is_asked_for_was_stated():
    ids = torch.arange(100)
    prompt = Prompt(ids, "passkey", "x", ((10, 13), (20, 23)), ((90, 93), (80, 83)))
    rows, stated = answers(prompt)
    assert rows.tolist() == [89, 90, 91, 79, 80, 81]
    assert stated.tolist() == [10, 11, 12, 20, 21, 22]
    assert unseen(rows, stated, 10, 16).tolist() == [False, True, True, True, True, True]
    assert not unseen(rows, stated, 10, 80).any()


def run(source, tmp_path, prompts, name="out", **settings):
    journal = Journal(tmp_path / name, {})
    one = Retrieval(**{"sink": SINK, "recent": RECENT, "steps": 4, **settings})
    return learn(source, [one], prompts, journal, dtype=torch.float32)["retrieval"]


def some_prompts():
    return [random_prompt(60 + n, seed=n) for n in range(4)] + [random_prompt(50, "text", seed=9)]


@pytest.mark.parametrize("method", ["optimize", "score"])
def test_layers_that_are_left_alone_are_neutral_and_all_others_ranked(checkpoint, tmp_path, method):
    source = open_source(checkpoint("gemma3_text"))
    learned = run(source, tmp_path, some_prompts(), method=method, sparsity=0.3)
    of = learned.tensors
    for index in (0, 2):
        assert of["gate"][index].tolist() == [1, 1]
        assert of["rank"][index].tolist() == [-1, -1]
    assert sorted(of["rank"][1].tolist()) == [0, 1]
    assert of["gate"][1].argsort().tolist() == of["rank"][1].argsort().tolist()
    assert of["sink"].dtype == of["recent"].dtype == of["rank"].dtype == torch.int32
    assert ("losses" in learned.summary) == (method == "optimize")
    torch.testing.assert_close(of["pareto_sparsity"], torch.tensor([0, 0.25, 0.3, 0.5, 0.625, 0.75, 0.875, 1]))


def test_the_same_run_gives_the_same_and_the_curve_has_its_ends(checkpoint, tmp_path):
    source = open_source(checkpoint("llama"))
    first = run(source, tmp_path, some_prompts(), "first", random=1)
    again = run(source, tmp_path, some_prompts(), "again", random=1)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert first.summary == again.summary
    of = first.tensors
    assert of["gate"].unique().numel() == 6
    assert float(of["gate"].mean()) == pytest.approx(0.5, abs=1e-4)
    assert of["pareto_loss"][0] == of["pareto_random"][0] == 0
    assert of["pareto_loss"][-1] == of["pareto_random"][-1] > 0
    assert first.summary["streaming"] == int(streams(of["rank"], 0.5).sum()) == 3


def test_without_long_prompts_gates_are_scores_and_it_says_so(checkpoint, tmp_path):
    learned = run(open_source(checkpoint("llama")), tmp_path, [random_prompt(40, asked=25)], steps=1)
    assert "gates are forward scores" in learned.events[0]
    assert "pareto_loss" not in learned.tensors
    assert sorted(learned.tensors["rank"].flatten().tolist()) == list(range(6))


@pytest.mark.parametrize("wrong", [{"sparsity": 1.5}, {"method": "guess"}, {"sink": 0}, {"seed": 1}])
def test_settings_have_bounds(wrong):
    with pytest.raises(ValidationError):
        Retrieval(**wrong)


@pytest.mark.parametrize("method", ["optimize", "score"])
def test_the_heads_that_copy_in_the_demo_model_are_found(tmp_path, method):
    """Its card says that layer 1 copies: whichever others stream, answers stay right; a random choice is worse."""
    from acc.cli.base import tokenizer_of

    source = open_source("demo")
    tokenizer = tokenizer_of(source)
    story = "The river ran past the old mill, and people of the town came to trade grain for cloth. " * 12
    ids = torch.tensor(tokenizer(story, add_special_tokens=False)["input_ids"])
    prompts = [passkey_prompt(tokenizer, ids, 300, "story", count=4, seed=seed) for seed in range(3)]
    prompts += text_prompts(ids, [200], "story")
    learned = run(
        source, tmp_path, prompts, method=method, sink=16, recent=32, sparsity=0.75, steps=6, held_out=0.34, random=2
    )
    rank = learned.tensors["rank"]
    assert sorted(rank[1].tolist()) == [6, 7]
    assert learned.tensors["gate"][1].min() > learned.tensors["gate"][[0, 2, 3]].max()
    curve = learned.summary["pareto"]
    at = curve["sparsity"].index(0.75)
    assert curve["loss"][at] < 0.2 * curve["random"][at]
    assert curve["accuracy"][at] > curve["random_accuracy"][at] + 0.2
    assert curve["loss"][at] < 0.3 * curve["loss"][-1]
