"""Kinds and budgets of heads: the keys they name, against plain loops."""

import pytest
import torch
from acc.formats.patterns import (
    ADAPTIVE_FLOOR,
    BLOCKS,
    DENSE,
    FLOORS,
    KINDS,
    STREAMING,
    VERTICAL_SLASH,
    Estimate,
    band_mass,
    budget_at,
    dense_cost,
    prefill_index,
    spread,
)
from acc.kernels.attention_index import adaptive_index, cost
from acc.kernels.attention_sparse import attention_sparse

ALL_KINDS = torch.tensor([DENSE, STREAMING, VERTICAL_SLASH, BLOCKS], dtype=torch.uint8)


def inputs(rows, keys, heads=4, key_heads=2, width=16, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, rows, width, generator=generator)
    return query, torch.randn(batch, key_heads, keys, width, generator=generator)


def seen(index, rows, keys):
    """The pairs that each head reads, bool `[B, H, T, S]`, by plain loops."""
    block_count, block_offset, column_count, column_index = index
    batch, heads, blocks = block_count.shape
    found = torch.zeros(batch, heads, rows, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for r in range(blocks):
                places = []
                for n in range(block_count[b, h, r]):
                    first = int(block_offset[b, h, r, n])
                    places += range(first, first + 64)
                places += column_index[b, h, r, : column_count[b, h, r]].tolist()
                assert len(places) == len(set(places))
                for t in range(64 * r, min(64 * r + 64, rows)):
                    found[b, h, t, [j for j in places if 0 <= j <= keys - rows + t]] = True
    return found


def causal(rows, keys):
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)


def test_budgets_are_shares_between_lengths_with_floors():
    length = torch.tensor([1024, 4096])
    budget = torch.tensor([[[0.5, 0.25], [0.25, 0.125]], [[0.0, 0.125], [0.0, 0.0]]])  # [H, N, 2]
    assert budget_at(length, budget, 4096).tolist() == [[1024, 512], [64, 128]]
    assert budget_at(length, budget, 1024).tolist() == [[512, 256], [64, 128]]
    assert budget_at(length, budget, 2048).tolist() == [[768, 384], [64, 128]]  # half way of the logarithm
    assert budget_at(length, budget, 8192)[0].tolist() == [2048, 1024]
    assert budget_at(length, budget, 512)[0].tolist() == [256, 128]
    assert budget_at(length, budget, 32).tolist() == [[32, 32], [32, 32]]
    assert budget_at(length[:1], budget[:, :1], 2048)[0].tolist() == [1024, 512]
    assert (budget_at(length, budget, 300) >= torch.tensor(FLOORS)).all()


def test_band_mass_is_that_of_the_pairs_in_the_band():
    slash = torch.rand(300, generator=torch.Generator().manual_seed(0))
    found = band_mass(slash)
    for m in range(5):
        total = 0.0
        for row in range(64):  # of a block whose last position is 63; the band begins 64 m before it
            for key in range(-64 * m, -64 * m + 64):
                distance = row - key
                if 0 <= distance < 300:
                    total += float(slash[distance]) / 64
        assert float(found[m]) == pytest.approx(total, rel=1e-5)


def test_columns_spread_over_the_distances_of_the_last_rows():
    keys = 300
    vertical = torch.rand(keys, generator=torch.Generator().manual_seed(0))
    found = torch.zeros(keys)
    for row in range(keys - 64, keys):
        for key in range(row + 1):
            found[row - key] += vertical[key] / 64
    torch.testing.assert_close(spread(vertical)[64:], found[64:], rtol=1e-5, atol=1e-6)
    # the nearest 63 keys are not yet there for the first of the rows, and are spread as if they were
    assert (spread(vertical)[:64] >= found[:64] - 1e-6).all()


@pytest.mark.parametrize(("rows", "keys"), [(256, 256), (200, 200), (70, 333), (64, 64), (1, 130)])
def test_heads_of_all_kinds_in_one_index(rows, keys):
    query, key = inputs(rows, keys, batch=2)
    index = prefill_index(ALL_KINDS, torch.tensor([[64, 128]] * 4), query, key, scaling=0.25)
    found = seen(index, rows, keys)
    assert (found[:, 0] == causal(rows, keys)).all()
    first = torch.arange(keys) < 64
    for t in range(rows):
        position = keys - rows + t
        window = (torch.arange(keys) > position - 128) & (torch.arange(keys) <= position)
        assert found[:, 1, t][:, window | (first & (torch.arange(keys) <= position))].all()
        assert found[:, :, t, position].all()
        assert found[:, :, t, 0].all()


def test_full_budgets_are_dense():
    query, key = inputs(150, 200)
    index = prefill_index(ALL_KINDS, torch.tensor([[200, 200]] * 4), query, key, scaling=0.25)
    assert (seen(index, 150, 200) == causal(150, 200)).all()


def planted(keys, columns, distance):
    """Keys that are all orthogonal, and queries that look at some columns and back over one distance, or nowhere."""
    key = torch.eye(keys)
    query = torch.zeros(keys, keys)
    for t in range(keys):
        for j in columns:
            query[t] += key[j] * (j <= t)
        if distance is not None and t >= distance:
            query[t] += key[t - distance]
    return 20 * query[None, None], key[None, None]


def test_columns_and_diagonals_that_matter_are_found():
    columns, distance = (130, 300, 301), 400
    query, key = planted(1024, columns, distance)
    # 64 columns are the first ones; two bands are the nearest, and distance 400 lies in two
    index = prefill_index(torch.tensor([VERTICAL_SLASH]), torch.tensor([[64 + 3, 256]]), query, key, scaling=1.0)
    found = seen(index, 1024, 1024)[0, 0]
    for t in range(1024):
        for j in columns:
            assert j > t or found[t, j]
        assert t < distance or found[t, t - distance]
    assert float(found.sum()) < 0.5 * float(causal(1024, 1024).sum())


def test_what_the_last_rows_see_nearby_takes_no_column():
    # the last rows look hard at their own neighbourhood: as columns, those keys would displace the one that counts
    query, key = planted(1024, (300,), None)
    for back in range(40):
        query += 0.9 * 20 * torch.roll(key, back, 2) * (torch.arange(1024) >= back)[:, None]
    index = prefill_index(torch.tensor([VERTICAL_SLASH]), torch.tensor([[65, 128]]), query, key, scaling=1.0)
    assert seen(index, 1024, 1024)[0, 0, 300:, 300].all()


def test_columns_and_bands_cost_what_their_budget_says():
    query, key = inputs(1024, 1024)
    for columns, diagonals in ((64, 128), (256, 128), (128, 512)):
        budget = torch.tensor([[columns, diagonals]] * 4)
        index = prefill_index(torch.full((4,), VERTICAL_SLASH), budget, query, key, scaling=0.25)
        reads = index.block_count * 64 + index.column_count
        assert int(reads.max()) <= columns + diagonals


def test_the_dense_cost_is_that_of_all_blocks():
    assert dense_cost(256, 256) == 64 * 64 * (1 + 2 + 3 + 4)
    assert dense_cost(64, 256) == 64 * 256


def test_an_adaptive_index_leaves_dense_heads_dense():
    query, key = inputs(700, 700)
    kind = torch.tensor([STREAMING, DENSE, VERTICAL_SLASH, BLOCKS])
    index = prefill_index(kind, torch.tensor([[64, 128]] * 4), query, key, scaling=0.25, adaptive=(0.3, 0.1))
    own = adaptive_index(query, key, scaling=0.25, gamma=0.3, tau=0.1, min_budget=ADAPTIVE_FLOOR)
    price = cost(index, 700)[0]
    assert price[1] == dense_cost(700, 700)
    others = [0, 2, 3]
    assert torch.equal(price[others], cost(own, 700)[0, others])
    assert (seen(index, 700, 700)[0, 1] == causal(700, 700)).all()


def test_an_index_runs(monkeypatch):
    query, key = inputs(200, 200)
    index = prefill_index(ALL_KINDS, torch.tensor([[64, 128]] * 4), query, key, scaling=0.25)
    out = attention_sparse(query, key, key, *index, scaling=0.25)
    mask = seen(index, 200, 200)
    whole = key.repeat_interleave(2, 1)
    logits = (0.25 * query.double() @ whole.double().transpose(2, 3)).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ whole.double(), rtol=1e-4, atol=1e-5)


def test_a_kind_that_there_is_not_is_refused():
    query, key = inputs(64, 64)
    with pytest.raises(ValueError, match=r"kinds \[1, 9\]; there are 0 to 3: dense, streaming"):
        prefill_index(torch.tensor([1, 1, 9, 1]), torch.tensor([[64, 128]] * 4), query, key, scaling=1.0)


def test_kinds_that_nobody_asks_for_are_not_estimated():
    query, key = inputs(128, 128)
    estimate = Estimate.of(query, key, scaling=1.0, kinds={DENSE, STREAMING})
    assert estimate.vertical is None
    assert estimate.blocks is None
    assert len(KINDS) == 4
