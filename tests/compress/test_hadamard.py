"""Hadamard matrices: orthogonal at every order, the fast product is the matrix product, sizes of real models."""

import pytest
import torch
from acc.compress.hadamard import Rotation, factors, paley


def rotation(size: int, seed: int = 0) -> Rotation:
    return Rotation(size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("order", [12, 20, 24, 28, 36, 44, 60, 76, 84, 104, 108, 140, 180])
def test_paley_s_matrices_are_hadamard(order):
    matrix = paley(order)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [2, 6, 16, 52, 92, 100])
def test_orders_out_of_paley_s_reach(order):
    assert paley(order) is None


@pytest.mark.parametrize("size", [64, 72, 96, 128, 192, 576, 640, 896, 960, 1152, 1536, 2048, 2304, 2560, 2880, 3072,
                                  3584, 4096, 5120, 5376, 6656, 7168, 8192])  # fmt: skip
def test_hidden_sizes_of_real_models_are_mixed_whole(size):
    found = factors(size)
    assert found is not None
    assert rotation(size).order == size
    assert max(map(len, found)) <= 180


@pytest.mark.parametrize("size", [2, 64, 100, 192, 576])
def test_the_fast_product_is_orthogonal_and_linear(size):
    turn = rotation(size)
    matrix = turn(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    x = torch.randn(3, 5, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = (x.unflatten(-1, (2, size)) @ matrix).flatten(-2)
    torch.testing.assert_close(turn(x), expected, rtol=0, atol=1e-13)


def test_without_a_matrix_of_the_size_blocks_are_mixed():
    turn = rotation(4 * 47)
    assert (turn.order, str(turn)) == (4, "47 blocks of 4")
    matrix = turn(torch.eye(188, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(188, dtype=torch.float64), rtol=0, atol=1e-13)


def test_one_outlier_is_spread_evenly():
    spike = torch.zeros(576, dtype=torch.float64)
    spike[7] = 24.0
    assert torch.allclose(rotation(576)(spike).abs(), torch.ones(576, dtype=torch.float64))


def test_signs_are_the_seed_s():
    x = torch.randn(4, 64, dtype=torch.float64)
    assert torch.equal(rotation(64, 3)(x), rotation(64, 3)(x))
    assert not torch.equal(rotation(64, 3)(x), rotation(64, 4)(x))
