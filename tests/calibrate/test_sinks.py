"""Sinks: attention whose mass is known, against plain loops, whatever the tiles; planted drains and flips."""

from types import SimpleNamespace

import pytest
import torch
from acc.calibrate import sinks as module
from acc.calibrate.base import Attended
from acc.calibrate.prompts import Prompt
from acc.calibrate.sinks import EDGES, SINKS, SKIPPED, Sinks
from acc.formats.model import AttentionLayer

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 24
LAYER = AttentionLayer(0, "layers.0.self_attn", HEADS, KV_HEADS, HEAD_DIM, None)


def attended(tokens=40, seed=0, domain="a", **given):
    draw = torch.Generator().manual_seed(seed)
    made = {
        "query": torch.randn(HEADS, tokens, HEAD_DIM, generator=draw),
        "key": torch.randn(KV_HEADS, tokens, HEAD_DIM, generator=draw),
        "value": torch.randn(KV_HEADS, tokens, HEAD_DIM, generator=draw),
        "projection": torch.randn(HIDDEN, HEADS * HEAD_DIM, generator=draw),
        "residual": torch.randn(tokens, HIDDEN, generator=draw),
    } | given
    prompt = Prompt(torch.zeros(tokens, dtype=torch.int64), "text", domain)
    return Attended(LAYER, prompt, made["query"], made["key"], made["value"], 0.5, made["projection"], made["residual"])


def concluded(prompts, **settings):
    settings = Sinks(**settings)
    learner = settings.learner(LAYER)
    for one in prompts:
        learner.see(one)
    layers = [LAYER, AttentionLayer(1, "", HEADS, KV_HEADS, HEAD_DIM, "another kind")]
    subject = SimpleNamespace(layers=layers, open=layers[:1], prompts=[one.prompt for one in prompts])
    return settings.conclude(subject, {0: learner.result()})


def looking_at(mass, tokens=64, domain="a", value=None):
    """Attention of head h with `mass[h]` on token 0 and the rest spread evenly over the others, in every row but that
    of token 0. Queries see in channel h what their head looks at."""
    query = torch.zeros(HEADS, tokens, HEAD_DIM)
    key = torch.zeros(KV_HEADS, tokens, HEAD_DIM)
    key[:, 0, 0] = 1.0
    for head, share in enumerate(mass):
        for row in range(1, tokens):
            query[head, row, 0] = 2 * torch.log(torch.tensor(share * row / (1 - share)))  # the scaling is 1 / 2
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    return attended(tokens, domain=domain, **given)


def plain(one):
    """The attention of every head and row, in fp64."""
    tokens = one.query.shape[1]
    weights = torch.zeros(HEADS, tokens, tokens, dtype=torch.float64)
    for head in range(HEADS):
        for row in range(tokens):
            scores = one.scaling * one.key[head // 2, : row + 1].double() @ one.query[head, row].double()
            weights[head, row, : row + 1] = scores.softmax(0)
    return weights


def test_known_mass_is_found():
    mass = (0.9, 0.25, 0.6, 0.01)
    tensors = concluded([looking_at(mass)]).tensors
    torch.testing.assert_close(tensors["sink_mass"][0, 0], torch.tensor(mass), rtol=1e-4, atol=1e-6)
    assert tensors["class"][0, 0].tolist() == [1, 0, 1, 0]
    assert (tensors["sink_mass"][0, 1] == 0).all()


@pytest.mark.parametrize("rows", [0, 9])
def test_everything_is_as_in_plain_loops(rows):
    prompts = [attended(280, 0), attended(90, 1)]
    tensors = concluded(prompts, rows=rows).tensors
    edges = [edge for edge in EDGES.tolist() if edge < 280]
    for head in range(HEADS):
        wanted = {name: [] for name in ("sink_mass", "first4_mass", "window64_mass", "window256_mass", "entropy")}
        norms, bins = [], []
        for one in prompts:
            weights = plain(one)[head]
            positions = module.sampled_rows(len(weights), rows).tolist()
            assert min(positions) >= SKIPPED
            told = {name: 0.0 for name in wanted}
            norm, binned = 0.0, torch.zeros(len(EDGES), dtype=torch.float64)
            for row in positions:
                told["sink_mass"] += float(weights[row, 0])
                told["first4_mass"] += float(weights[row, :4].sum())
                told["window64_mass"] += float(weights[row, max(row - 63, 0) : row + 1].sum())
                told["window256_mass"] += float(weights[row, max(row - 255, 0) : row + 1].sum())
                told["entropy"] += float(torch.special.entr(weights[row]).sum())
                out = weights[row] @ one.value[head // 2].double()
                norm += float((one.projection[:, head * HEAD_DIM : (head + 1) * HEAD_DIM].double() @ out).norm())
                distance = row - torch.arange(row + 1)
                for place, (edge, after) in enumerate(zip(edges, [*edges[1:], 10**9])):
                    binned[place] += weights[row, : row + 1][(distance >= edge) & (distance < after)].sum()
            for name, total in told.items():
                wanted[name].append(total / len(positions))
            norms.append(norm / len(positions))
            bins.append(binned / len(positions))
        for name, found in wanted.items():
            assert float(tensors[name][0, 0, head]) == pytest.approx(sum(found) / 2, rel=1e-4, abs=1e-6), name
        assert float(tensors["out_norm"][0, 0, head]) == pytest.approx(sum(norms) / 2, rel=1e-4)
        torch.testing.assert_close(tensors["distance"][0, 0, head], sum(bins).float() / 2, rtol=1e-3, atol=1e-5)
        error = abs(wanted["sink_mass"][0] - wanted["sink_mass"][1]) / 2
        assert float(tensors["sink_mass_error"][0, 0, head]) == pytest.approx(error, rel=1e-2, abs=1e-6)
    torch.testing.assert_close(tensors["distance"][0, 0].sum(-1), torch.ones(HEADS))


def test_tiles_and_the_order_of_prompts_change_nothing(monkeypatch):
    prompts = [attended(70, 0), attended(33, 1), attended(50, 2)]
    whole = concluded(prompts, tile=1000).tensors
    for other in (concluded(prompts, tile=7).tensors, concluded(prompts[::-1]).tensors):
        for name, tensor in whole.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(module, "SCORES", 100)  # a row at a time
    for name, tensor in concluded(prompts).tensors.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)


def test_a_drained_value_and_a_dormant_head_are_found():
    """The first token's value is zero for one KV head; a head that looks at it alone puts nothing out."""
    value = torch.randn(KV_HEADS, 64, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    value[0, 0] = 0
    value[1, 0] *= 5
    tensors = concluded([looking_at((0.999, 0.3, 0.9, 0.3), value=value)]).tensors
    assert tensors["value_ratio"][0, 0, 0] == 0
    norm = value.norm(dim=-1)
    torch.testing.assert_close(tensors["value_ratio"][0, 0, 1], norm[1, 0] / norm[1, 1:].mean())
    assert tensors["class"][0, 0].tolist() == [2, 0, 1, 0]


def test_a_head_whose_class_depends_on_the_domain_is_told():
    prompts = [looking_at((0.9, 0.1, 0.9, 0.1), domain="prose"), looking_at((0.9, 0.1, 0.2, 0.1), domain="code")]
    learned = concluded(prompts)
    assert learned.summary["domains"] == ["prose", "code"]
    assert learned.summary["flips"] == [[0, 2]]
    assert learned.tensors["flips"].tolist() == [[False, False, True, False], [False] * HEADS]
    assert learned.summary["heads"]["code"] == {"active": 3, "sink": 1, "dormant": 0}
    assert learned.events == ()
    alone = concluded(prompts[:1])
    assert alone.summary["flips"] == []
    assert "one domain only" in alone.events[0]


def test_the_residual_of_the_first_token_and_its_massive_channels():
    residual = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0))
    residual[0, 5], residual[0, 17] = -4000.0, 2500.0
    learned = concluded([attended(50, residual=residual)])
    tensors = learned.tensors
    assert tensors["massive_idx"][0, :2].tolist() == [5, 17]
    assert tensors["massive_val"][0, :2].tolist() == [-4000.0, 2500.0]
    norm = residual.norm(dim=-1)
    torch.testing.assert_close(tensors["resid_norm"][0], torch.stack([norm[0], norm.median()]))
    assert learned.summary["massive_channels"] == [5, 17]
    assert learned.summary["residual_of_token_0"]["layer"] == 0


def test_the_suggested_sizes_are_the_smallest():
    far = 3 * torch.randn(HEADS, 90, HEAD_DIM, generator=torch.Generator().manual_seed(7))
    prompts = [attended(90, 0, query=far), looking_at((0.9, 0.5, 0.2, 0.95), 90)]
    allowed = 0.1
    tensors = concluded(prompts, rows=0, outside=allowed).tensors
    weights = [plain(one)[:, SKIPPED:] for one in prompts]
    column = torch.arange(90)
    distance = torch.arange(SKIPPED, 90)[:, None] - column

    def missed(head, sinks, window):
        outside = (column >= sinks) & (distance >= window)
        return sum(float(one[head][outside].sum()) / len(distance) / 2 for one in weights)

    for head in range(HEADS):
        sizes = [(s, w) for s in SINKS for w in EDGES[1:].tolist() if w <= 128]
        fine = {size: sum(size) for size in sizes if missed(head, *size) <= allowed}
        chosen = (int(tensors["n_sink"][0, head]), int(tensors["window"][0, head]))
        assert chosen in fine
        assert sum(chosen) == min(fine.values())


def test_a_short_window_streams_and_a_long_one_does_not():
    near = attended(600)
    position = torch.arange(600.0)
    query, key = torch.zeros(HEADS, 600, HEAD_DIM), torch.zeros(KV_HEADS, 600, HEAD_DIM)
    key[0, :, 0] = position  # the later the better
    query[:2, :, 0] = 10.0
    tensors = concluded([attended(600, query=query, key=key, value=near.value)]).tensors
    assert tensors["streams"][0, 0].tolist() == [True, False]
    assert tensors["window"][0, :2].tolist() == [1, 1]


def test_a_prompt_without_rows_is_refused():
    with pytest.raises(ValueError, match="4 tokens"):
        concluded([attended(4)])
