"""Which heads stream: as many as were asked for, nested, the same each time."""

import pytest
import torch
from acc.formats.streaming import ranks, streams


def test_the_number_is_that_of_the_share_and_choices_are_nested():
    generator = torch.Generator().manual_seed(0)
    gate = torch.randint(0, 4, (9, 3), generator=generator) / 4  # many ties
    score = torch.randint(0, 2, (9, 3), generator=generator).float()
    open_ = torch.tensor([True, False, True, True, True, True, False, True, True])
    rank = ranks(gate, score, open_)
    assert rank[open_].flatten().sort().values.tolist() == list(range(21))
    assert (rank[~open_] == -1).all()
    before = torch.zeros_like(rank).bool()
    for step in range(101):
        chosen = streams(rank, step / 100)
        assert int(chosen.sum()) == round(step / 100 * 21)
        assert not chosen[~open_].any()
        assert not (before & ~chosen).any()
        before = chosen


def test_the_lower_gate_goes_first_then_the_lower_score_then_the_earlier():
    gate = torch.tensor([[0.5, 0.2], [0.5, 0.5]])
    score = torch.tensor([[1.0, 9.0], [0.0, 1.0]])
    assert ranks(gate, score, torch.ones(2).bool()).tolist() == [[2, 0], [1, 3]]


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan")])
def test_a_share_outside_is_refused(sparsity):
    with pytest.raises(ValueError, match="from 0 to 1"):
        streams(torch.zeros(1, 1, dtype=torch.int32), sparsity)
