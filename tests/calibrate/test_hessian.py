"""The Hessian of a layer's output error: what it sums, and that its halves come together."""

import pytest
import torch
from acc.calibrate.hessian import Hessian, inverse_factor, normalised


def rows(tokens, features, seed=0):
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [1, 7, 256, 300, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_definition_and_is_symmetric(features, dtype):
    x = rows(40, features).to(dtype)
    hessian = Hessian(features)
    hessian.update(x[:13])
    hessian.update(x[13:13])
    hessian.update(x[13:])
    value = hessian.value()
    assert hessian.tokens == 40
    assert torch.equal(value, value.T)
    torch.testing.assert_close(value.double(), 2 / 40 * x.double().T @ x.double(), rtol=1e-4, atol=1e-5)


def test_every_token_weighs_the_same_whatever_it_came_with():
    x = rows(60, 16)
    one, other = Hessian(16), Hessian(16)
    for part in x.split([1, 50, 9]):
        one.update(part)
    for part in x.split([30, 30]):
        other.update(part)
    torch.testing.assert_close(one.value(), other.value())


@pytest.mark.parametrize("features", [24, 1100])
def test_second_moment_predicts_the_output_error(features):
    """tr(Δ H Δᵀ) / 2 is the mean squared error of the output."""
    x, delta = rows(500, features), rows(8, features, seed=1)
    hessian = Hessian(features)
    hessian.update(x)
    true = (x @ delta.T).square().sum(1).mean()
    torch.testing.assert_close((delta @ hessian.value() * delta).sum() / 2, true)
    assert hessian.error(delta) == pytest.approx(float(true), rel=1e-5)


def test_untouched_and_with_no_tokens_it_is_zero():
    hessian = Hessian(5)
    assert hessian.tokens == 0
    assert torch.equal(hessian.value(), torch.zeros(5, 5))


def test_many_small_updates_lose_no_digits():
    x = rows(4096, 8).abs() + 10
    hessian = Hessian(8)
    for part in x.split(4):
        hessian.update(part)
    torch.testing.assert_close(hessian.value().double(), 2 / 4096 * x.double().T @ x.double(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_factor_is_the_cholesky_factor_of_the_inverse(damp):
    hessian, said = Hessian(48), []
    hessian.update(rows(300, 48) * torch.logspace(-2, 1, 48))
    value = normalised(hessian, lambda *_, **__: None)
    assert float(value.diagonal().mean()) == pytest.approx(1)
    factor = inverse_factor(value, damp, lambda kind, **_: said.append(kind)).double()
    assert torch.equal(factor, factor.triu())
    expected = torch.linalg.cholesky(torch.linalg.inv(value.double() + damp * torch.eye(48)), upper=True)
    torch.testing.assert_close(factor, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert not said


def test_a_matrix_that_is_not_positive_gets_more_damping():
    said = []
    hessian = Hessian(64)
    hessian.update(rows(3, 64))
    factor = inverse_factor(hessian.value(), 0.0, lambda kind, **fields: said.append((kind, fields)))
    assert torch.isfinite(factor).all()
    assert said[0][0] == "damping_retry"
    assert said[0][1]["damp_percent"] > 0


def test_what_no_damping_helps_becomes_the_identity():
    said = []
    hopeless = torch.full((8, 8), 5.0).fill_diagonal_(1)
    factor = inverse_factor(hopeless, 0.0, lambda kind, **fields: said.append(kind))
    assert said == ["rounding"]
    assert torch.equal(factor, torch.eye(8))
