"""What holds for every statistic: pieces add up to the whole, in any order; it can be put away and taken up again."""

import pytest
import torch
from acc.calibrate.base import Statistic
from acc.registry import listing, lookup
from safetensors.torch import load_file, save_file

FEATURES = 24
ROWS = torch.randn(200, FEATURES, generator=torch.Generator().manual_seed(0))


def over(name, *chunks):
    statistic = lookup("calibrate", name)(FEATURES)
    for chunk in chunks:
        statistic.update(chunk)
    return statistic


def close(one: Statistic, other: Statistic):
    assert one.tokens == other.tokens
    torch.testing.assert_close(one.value(), other.value(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", listing("calibrate", "Statistic"))
def test_chunks_are_the_whole(name):
    whole = over(name, ROWS)
    assert whole.tokens == len(ROWS)
    close(over(name, *ROWS.split(7)), whole)


@pytest.mark.parametrize("name", listing("calibrate", "Statistic"))
def test_merging_commutes_and_is_the_whole(name):
    one, other = over(name, ROWS[:60]), over(name, ROWS[60:])
    one.merge(other)
    reverse = over(name, ROWS[60:])
    reverse.merge(over(name, ROWS[:60]))
    close(one, over(name, ROWS))
    close(one, reverse)
    close(other, over(name, ROWS[60:]))  # what was merged in is as it was


@pytest.mark.parametrize("name", listing("calibrate", "Statistic"))
def test_merging_nothing_changes_nothing(name):
    one = over(name, ROWS)
    one.merge(over(name))
    close(one, over(name, ROWS))


@pytest.mark.parametrize("name", listing("calibrate", "Statistic"))
def test_state_survives_a_file(tmp_path, name):
    first = over(name, ROWS[:60])
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    resumed = lookup("calibrate", name)(FEATURES)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    close(resumed, first)
    resumed.update(ROWS[60:])
    first.update(ROWS[60:])
    assert torch.equal(resumed.value(), first.value())


@pytest.mark.parametrize("name", listing("calibrate", "Statistic"))
def test_input_is_not_touched(name):
    x = ROWS.clone()
    over(name, x)
    assert torch.equal(x, ROWS)
