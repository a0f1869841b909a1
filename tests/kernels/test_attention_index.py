"""Which keys a head reads: sums against double loops, and every promise of an index against its own four tensors."""

import math

import pytest
import torch
from acc.kernels.attention_index import (
    Index,
    adaptive_index,
    block_index,
    cost,
    estimate_blocks,
    estimate_vertical_slash,
    stack,
    streaming_index,
    vertical_slash_index,
)

SIZES = [(1, 1), (1, 50), (40, 40), (64, 64), (65, 65), (100, 130), (130, 130), (200, 263), (128, 320), (63, 640)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32)


def uses(index, rows, keys):
    """How often each row reads each key, int64 `[B, H, T, S]`, by plain loops over the four tensors."""
    batch, heads, blocks = index.block_count.shape
    assert blocks == math.ceil(rows / 64)
    times = torch.zeros(batch, heads, rows, keys, dtype=torch.int64)
    for b in range(batch):
        for h in range(heads):
            for r in range(blocks):
                offsets = index.block_offset[b, h, r, : index.block_count[b, h, r]].tolist()
                columns = index.column_index[b, h, r, : index.column_count[b, h, r]].tolist()
                assert offsets == sorted(offsets), "offsets ascend"
                assert all(0 <= column < keys for column in columns)
                for offset in offsets:
                    times[b, h, r * 64 : r * 64 + 64, max(offset, 0) : max(offset + 64, 0)] += 1
                for column in columns:
                    times[b, h, r * 64 : r * 64 + 64, column] += 1
    return times


def coverage(index, rows, keys):
    """bool `[B, H, T, S]`: what each row sees. Nothing twice, and every row something."""
    assert all(tensor.dtype == torch.int32 for tensor in index)
    times = uses(index, rows, keys)
    assert times.max() <= 1, "ranges and columns are disjoint"
    position = torch.arange(keys - rows, keys)[:, None]
    seen = (times > 0) & (torch.arange(keys) <= position)
    assert seen.any(-1).all(), "every row sees a key"
    assert seen.diagonal(keys - rows, -2, -1).all(), "every row sees itself"
    return seen


def attention(query, key, scaling):
    """Probabilities `[B, H, T, S]` in float64, by the definition."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = scaling * query.double() @ key.transpose(-1, -2)
    rows, keys = logits.shape[-2:]
    hidden = torch.arange(keys) > torch.arange(keys - rows, keys)[:, None]
    return torch.softmax(logits.masked_fill(hidden, -torch.inf), -1)


# Estimates


@pytest.mark.parametrize(("rows", "keys"), SIZES, ids=str)
@pytest.mark.parametrize("at_once", [1 << 23, 1], ids=["at once", "in slices"])
def test_sums_of_columns_and_diagonals(monkeypatch, rows, keys, at_once):
    monkeypatch.setattr("acc.kernels.attention_index.AT_ONCE", at_once)
    query, key = normal(2, 4, rows, 8), normal(2, 2, keys, 8)
    vertical, slash = estimate_vertical_slash(query, key, scaling=0.7, rows=40)
    probability = attention(query, key, 0.7)[:, :, -40:]
    used = probability.shape[2]
    expected = torch.zeros(2, 4, keys, dtype=torch.float64)
    for i in range(used):
        for j in range(keys - used + i + 1):
            expected[..., keys - used + i - j] += probability[..., i, j] / used
    torch.testing.assert_close(slash.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vertical.double(), probability.mean(2), rtol=1e-5, atol=1e-6)


def test_the_scale_of_the_logits_is_used():
    query, key = normal(1, 1, 80, 8), normal(1, 1, 80, 8)
    for estimate in (
        lambda **k: estimate_vertical_slash(query, key, **k)[0],
        lambda **k: estimate_blocks(query, key, **k),
    ):
        assert not torch.allclose(estimate(scaling=0.1), estimate(scaling=1.0))


@pytest.mark.parametrize(("rows", "keys"), SIZES, ids=str)
def test_blocks_are_scored_by_the_means_of_their_own_tokens(rows, keys):
    query, key = normal(2, 4, rows, 8), normal(2, 2, keys, 8)
    scores = estimate_blocks(query, key, scaling=0.3)
    assert scores.shape == (2, 4, math.ceil(rows / 64), math.ceil(keys / 64))
    for h in range(4):
        for r in range(scores.shape[2]):
            for c in range(scores.shape[3]):
                q = query[:, h, 64 * r : 64 * r + 64].double().mean(1)
                k = key[:, h // 2, 64 * c : 64 * c + 64].double().mean(1)
                expected = 0.3 * (q * k).sum(-1)
                if 64 * c > keys - rows + min(64 * r + 63, rows - 1):
                    expected = torch.full_like(expected, -torch.inf)
                torch.testing.assert_close(scores[:, h, r, c].double(), expected, rtol=1e-5, atol=1e-6)


# Vertical-slash


def best(scores, count, always):
    """The places of the greatest scores, of equal ones the first, by sorting pairs."""
    ordered = sorted(range(len(scores)), key=lambda i: (i >= always, -scores[i] if i >= always else 0, i))
    return ordered[: max(count, always)]


@pytest.mark.parametrize("budgets", [(1, 1), (70, 9), (100, 40), (9999, 3), (80, 9999)], ids=str)
@pytest.mark.parametrize(("rows", "keys"), SIZES, ids=str)
def test_every_column_and_diagonal_that_was_asked_for_is_seen(rows, keys, budgets):
    vertical, slash = normal(2, 3, keys).abs(), normal(2, 3, keys, seed=1).abs()
    vertical_budget = torch.tensor([budgets[0], 64, budgets[0] + 5])
    slash_budget = torch.tensor([budgets[1], budgets[1] + 7, 2])
    index = vertical_slash_index(vertical, slash, vertical_budget, slash_budget, rows)
    seen = coverage(index, rows, keys)
    position = torch.arange(keys - rows, keys)
    for b in range(2):
        for h in range(3):
            columns = best(vertical[b, h].tolist(), int(vertical_budget[h]), 64)
            distances = best(slash[b, h].tolist(), int(slash_budget[h]), 1)
            for column in columns:
                assert torch.equal(seen[b, h, :, column], position >= column)
            for distance in distances:
                inside = position >= distance
                assert seen[b, h, inside, position[inside] - distance].all()
            # and what is seen beside: only within 64 of a distance asked for, or of a range that follows on one
            far = torch.ones(rows, keys, dtype=torch.bool)
            for distance in distances:
                near = position[:, None] - torch.arange(keys) - distance
                far &= (near <= -64) | (near >= 128)
            extra = seen[b, h] & far
            extra[:, columns] = False
            assert not extra.any()


def test_distances_far_apart_cost_a_range_each_and_neighbours_share_one():
    slash = torch.zeros(1, 1, 4096)
    slash[0, 0, [1000, 1064, 3000, 3001, 3030]] = 1.0
    index = vertical_slash_index(torch.zeros(1, 1, 4096), slash, torch.tensor([64]), torch.tensor([6]), 64)
    distance = 4096 - 64 - index.block_offset[0, 0, 0, : index.block_count[0, 0, 0]]
    assert distance.tolist() == [3064, 3000, 1064, 1000, 0]


def test_equal_sums_go_to_the_nearest_distance_and_the_first_column():
    flat = torch.ones(1, 1, 1000)
    index = vertical_slash_index(flat, flat, torch.tensor([90]), torch.tensor([20]), 64)
    assert index.column_index[0, 0, 0, : index.column_count[0, 0, 0]].tolist() == list(range(90))
    assert index.block_offset[0, 0, 0, : index.block_count[0, 0, 0]].tolist() == [872, 936]


@pytest.mark.parametrize("budget", [1, 30, 99])
def test_a_small_budget_keeps_distance_0_and_the_first_columns(budget):
    """Where 100 distances were forced and fewer kept, the official choice among equals could lose the nearest."""
    vertical, slash = normal(1, 2, 500).abs(), normal(1, 2, 500).abs()
    slash[..., 0] = 0
    vertical[..., :64] = 0
    rows = torch.tensor([budget, budget])
    seen = coverage(vertical_slash_index(vertical, slash, rows, rows, 500), 500, 500)
    assert seen[..., :64].equal(torch.ones(500, 500).tril().bool()[:, :64].expand(1, 2, -1, -1))


@pytest.mark.parametrize("at_once", [1, 2000])
def test_slices_do_not_change_an_index(monkeypatch, at_once):
    arguments = normal(2, 3, 400).abs(), normal(2, 3, 400, seed=1).abs(), torch.tensor([90, 64, 70])
    whole = vertical_slash_index(*arguments, torch.tensor([5, 60, 1]), 300)
    blocks = block_index(normal(2, 3, 5, 7), torch.tensor([1, 3, 5]), 300, 400)
    monkeypatch.setattr("acc.kernels.attention_index.AT_ONCE", at_once)
    for expected, actual in zip(whole, vertical_slash_index(*arguments, torch.tensor([5, 60, 1]), 300), strict=True):
        assert torch.equal(expected, actual)
    again = block_index(normal(2, 3, 5, 7), torch.tensor([1, 3, 5]), 300, 400)
    assert all(torch.equal(a, b) for a, b in zip(blocks, again, strict=True))


# A shape


@pytest.mark.parametrize(("rows", "keys"), SIZES, ids=str)
def test_windows_are_rounded_outwards_and_sinks_are_exact(rows, keys):
    sink, recent = torch.tensor([0, 4, 64, 100, 9999]), torch.tensor([1, 64, 65, 200, 9999])
    seen = coverage(streaming_index(sink, recent, rows, keys, batch=2), rows, keys)
    distance = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)
    for h in range(5):
        asked = (distance >= 0) & ((torch.arange(keys) < sink[h]) | (distance < recent[h]))
        assert seen[0, h][asked].all()
        beside = (torch.arange(keys) >= sink[h]) & (distance >= recent[h] + 126)
        assert not (seen[0, h] & beside).any()
        assert torch.equal(seen[0, h], seen[1, h])


def test_a_head_without_a_window_is_refused():
    with pytest.raises(ValueError, match="at least 1 recent token"):
        streaming_index(torch.tensor([4]), torch.tensor([0]), 64, 64)


# Blocks


@pytest.mark.parametrize(("rows", "keys"), SIZES, ids=str)
def test_the_best_blocks_of_each_row_are_seen_whole(rows, keys):
    blocks, columns = math.ceil(rows / 64), math.ceil(keys / 64)
    scores = normal(2, 3, blocks, columns)
    budget = torch.tensor([1, 3, 9999])
    seen = coverage(block_index(scores, budget, rows, keys), rows, keys)
    position = torch.arange(keys - rows, keys)[:, None]
    for h in range(3):
        for r in range(blocks):
            part = position[64 * r : 64 * r + 64]
            causal = [c for c in range(columns) if 64 * c <= part.max()]
            always = {0, *(int(p) // 64 for p in part)}
            for b in range(2):
                rest = [c for c in causal if c not in always]
                rest.sort(key=lambda c: (-scores[b, h, r, c].item(), c))
                chosen = [*always, *rest[: max(int(budget[h]) - len(always), 0)]]
                expected = torch.isin(torch.arange(keys) // 64, torch.tensor(chosen)) & (torch.arange(keys) <= part)
                assert torch.equal(seen[b, h, 64 * r : 64 * r + 64], expected)


# The budget of each prompt


def heads_of_many_kinds(rows, keys):
    """Query and key `[1, 4, ., 16]`: diffuse, a few columns, the diagonal, and blocks that the pooled keys predict."""
    query, key = 0.2 * normal(1, 4, rows, 16), 0.2 * normal(1, 4, keys, 16, seed=5)
    query[:, 1, :, 0] += 6
    key[:, 1, [5, keys // 2, keys - 9], 0] += 6
    key[:, 2] *= 10
    query[:, 2] = key[:, 2].roll(100, 1)[:, keys - rows :]  # each row finds what is 100 before it
    query[:, 3, :, 1] += 3
    key[:, 3, 64:128, 1] += 3
    return query, key


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("rows", "keys"), [(700, 700), (640, 640), (200, 700), (30, 30), (1, 500)], ids=str)
def test_the_blocks_hold_the_share_that_was_asked_for(rows, keys, tau, gamma):
    query, key = heads_of_many_kinds(rows, keys)
    index = adaptive_index(query, key, scaling=1.0, gamma=gamma, tau=tau, min_budget=64)
    seen = coverage(index, rows, keys)
    held = (attention(query, key, 1.0) * seen)[:, :, -64:].sum(-1).mean(-1)
    assert (held >= gamma - 1e-6).all()


def test_the_pattern_of_a_head_is_found():
    query, key = heads_of_many_kinds(1024, 1024)
    dense = cost(streaming_index(torch.zeros(4), torch.full((4,), 1024), 1024, 1024), 1024)
    share = cost(adaptive_index(query, key, scaling=1.0, tau=0.0, min_budget=64), 1024) / dense
    assert share[0, 0] > 0.8, "a diffuse head reads nearly everything"
    assert (share[0, 1:] < torch.tensor([0.4, 0.75, 0.4])).all()  # a diagonal of 1024 tokens is a few blocks per row
    aware = cost(adaptive_index(query, key, scaling=1.0, tau=0.2, min_budget=64), 1024) / dense
    assert aware[0, 3] < share[0, 3], "a head that pooled keys predict reads fewer blocks"
    assert torch.equal(aware[0, 1:3], share[0, 1:3]), "the others are no query-aware heads"


def test_the_least_budget_is_kept():
    query, key = heads_of_many_kinds(1024, 1024)
    for tau in (0.0, 1.0):
        counts = adaptive_index(query, key, scaling=1.0, gamma=0.1, tau=tau, min_budget=320).block_count
        assert (counts[..., -1] >= 5).all()


def test_the_distance_of_distributions_is_that_of_scipy():
    from acc.kernels.attention_index import _divergence
    from scipy.spatial.distance import jensenshannon

    query, key = normal(1, 2, 100, 8), normal(1, 1, 300, 8)
    vertical = torch.rand(1, 2, 5, generator=torch.Generator().manual_seed(0))
    vertical[..., 2] = 0  # 0 log 0
    vertical /= vertical.sum(-1, keepdim=True)
    means = torch.stack([part.mean(0) for part in key[0, 0].split(64)])
    predicted = torch.softmax(0.5 * query[0, :, -64:].mean(1) @ means.T, -1)
    expected = jensenshannon(predicted.double().numpy(), vertical[0].double().numpy(), axis=1)
    torch.testing.assert_close(
        _divergence(vertical, query, key, 0.5)[0].double(), torch.tensor(expected), rtol=1e-4, atol=1e-5
    )


# Several heads


def test_heads_of_several_kinds_in_one_index():
    rows, keys = 150, 200
    budget = torch.tensor([70, 90])
    one = vertical_slash_index(normal(1, 2, keys).abs(), normal(1, 2, keys).abs(), budget, budget // 10, rows)
    two = streaming_index(torch.tensor([4]), torch.tensor([50]), rows, keys)
    three = block_index(normal(1, 1, 3, 4), torch.tensor([2]), rows, keys)
    index = stack([([3, 0], one), ([2], two), ([1], three)])
    seen = coverage(index, rows, keys)
    parts = [coverage(part, rows, keys)[0] for part in (one, two, three)]
    for head, expected in ((3, parts[0][0]), (0, parts[0][1]), (2, parts[1][0]), (1, parts[2][0])):
        assert torch.equal(seen[0, head], expected)
    assert cost(index, rows)[0].tolist() == [cost(p, rows)[0, i] for p, i in ((one, 1), (three, 0), (two, 0), (one, 0))]
    for wrong in ([([0, 0], one)], [([0, 2], one)], [([0], one)]):
        with pytest.raises(ValueError, match="each head must come once"):
            stack(wrong)


def test_cost_counts_what_is_computed():
    index = Index(torch.tensor([[[2, 1]]]), torch.zeros(1, 1, 2, 2), torch.tensor([[[0, 5]]]), torch.zeros(1, 1, 2, 5))
    assert cost(index, 70).tolist() == [[64 * 128 + 6 * 69]]
