"""Who shares an input is found out by running, results are those of each alone, and nothing waits too long."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import ClassVar

import pytest
import torch
from acc.formats.shared import SharedInput
from torch import nn

ROWS = (5, 3, 3, 4)


class Weight:
    """A matrix that can be multiplied together with others."""

    launches: ClassVar[list[int]] = []
    together = True

    def __init__(self, dense):
        self.dense = dense

    @classmethod
    def shared_product(cls, parts):
        def run(x):
            cls.launches.append(len(parts))
            return [x @ part.dense.T for part in parts]

        return run if cls.together else None


class Linear(nn.Module):
    def __init__(self, dense):
        super().__init__()
        self.register_buffer("dense", dense)

    def parts(self):
        return [Weight(self.dense)]

    def forward(self, x):
        y = self.shared.product(self.key, x)
        return x @ self.dense.T if y is None else y


@pytest.fixture
def members():
    """Four linears that may share, and afterwards how many matrices each launch took."""
    Weight.launches = []
    generator = torch.Generator().manual_seed(0)
    made = nn.ModuleList(Linear(torch.randn(rows, 8, generator=generator)) for rows in ROWS)
    shared = SharedInput(list(made))
    for key, member in enumerate(made):
        member.shared, member.key = shared, key
    return made


def x_of(seed):
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))


def check(members, x):
    """Each member's product, one after the other."""
    for member in members:
        assert torch.equal(member(x), x @ member.dense.T)


@pytest.fixture
def no_cycles():
    """What nothing refers to is gone at once."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_one_launch_per_tensor_for_those_that_share(members):
    for seed in range(3):
        x = x_of(seed)
        check(members[:3], x)
        check(members[3:], x_of(9))
    assert Weight.launches == [4, 3, 3]


def test_any_of_them_may_be_first(members):
    check(members[1:3], x := x_of(0))
    check([members[0], members[3]], x)
    assert Weight.launches == [4]


def test_members_that_get_another_tensor_leave_and_the_others_stay(members):
    x = x_of(0)
    check([members[0], members[1]], x)
    check([members[2], members[3]], x_of(1))
    assert Weight.launches == [4]
    check(members, x)
    check(members, x_of(2))
    assert Weight.launches == [4, 2, 2]


def test_nobody_is_left(members):
    check([members[0]], x_of(0))
    check(members, x_of(1))
    check(members, x_of(2))
    assert Weight.launches == [4]


@pytest.mark.usefixtures("no_cycles")
def test_nothing_lives_longer_than_it_is_needed(members):
    x = x_of(0)
    products = [weakref.ref(members[i](x)) for i in range(3)]
    gone = weakref.ref(x)
    waiting = weakref.ref(members[0].shared._round.products[3])
    assert all(product() is None for product in products)
    assert waiting() is not None
    del x
    assert gone() is None
    assert waiting() is None
    check(members[:3], x_of(1))
    assert members[0].shared._round is None
    assert Weight.launches == [4, 3]


@pytest.mark.usefixtures("no_cycles")
def test_nothing_waits_after_the_last_one(members):
    check(members, x := x_of(0))
    assert members[0].shared._round is None
    gone = weakref.ref(x)
    del x
    assert gone() is None


@pytest.mark.usefixtures("no_cycles")
def test_members_do_not_keep_each_other_alive(members):
    check(members, x_of(0))
    gone = weakref.ref(members[1])
    del members[1]
    assert gone() is None
    check(members, x_of(1))
    check(members, x_of(2))
    assert Weight.launches == [4, 4, 3]


def test_a_tensor_that_was_changed_in_place_is_multiplied_anew(members):
    x = x_of(0)
    check(members[:2], x)
    x.mul_(2)
    check(members[2:], x)
    check(members[:2], x)
    x.data = x.data + 1  # other memory
    check(members, x)


def test_inference_tensors_are_multiplied_alone(members):
    with torch.inference_mode():
        x = x_of(0)
        check(members[:2], x)
        x.mul_(2)
        check(members, x)
    assert Weight.launches == []


def test_another_thread_is_multiplied_alone(members):
    x, failed = x_of(0), []

    def other():
        try:
            check(members, x_of(1))
            check(members, x)
        except AssertionError as error:
            failed.append(error)

    check(members[:2], x)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert not failed
    assert Weight.launches == [4]
    check(members[2:], x)
    assert Weight.launches == [4]


def test_copies_share_among_themselves(members):
    check(members, x_of(0))
    twin = copy.deepcopy(members)
    for member in twin:
        member.dense.mul_(2)
    check(twin, x_of(1))
    check(members, x_of(1))
    assert Weight.launches == [4, 4, 4]


def test_other_weights_are_used_once_it_is_told_to_forget(members):
    check(members[:1], x := x_of(0))
    for member in members:
        member.dense = 2 * member.dense
    members[0].shared.forget()
    check(members, x)


def test_without_a_kernel_each_is_multiplied_alone(members, monkeypatch):
    monkeypatch.setattr(Weight, "together", False)
    check(members, x_of(0))
    assert Weight.launches == []


def test_compiles_as_one_graph_with_one_launch(members):
    check(members, x_of(0))

    def forward(x):
        x = x + 1
        return [member(x) for member in members]

    compiled = torch.compile(forward, fullgraph=True, backend="eager")
    for seed in (1, 2):
        for y, expected in zip(compiled(x_of(seed)), forward(x_of(seed)), strict=True):
            assert torch.equal(y, expected)
    shared = members[0].shared
    assert shared._traced_x is None
    assert not shared._traced
    assert Weight.launches == [4] * 5  # the first, two that were compiled and two that were not
    torch._dynamo.reset()
