"""Rounding to nearest, against a definition weight by weight."""

import itertools

import numpy as np
import pytest
import torch
from acc.compress.rtn import Rtn


def silent(*_, **__):
    pass


def definition(weight, bits, size, symmetric):
    top, rounded = 2**bits - 1, np.empty_like(weight)
    for o in range(len(weight)):
        for first in range(0, weight.shape[1], size):
            group = weight[o, first : first + size]
            low, high = min(group.min(), 0), max(group.max(), 0)
            if symmetric:
                high = max(high, -low)
                low = -high
            scale = np.float32(np.float16(np.float32(high - low) / np.float32(top)))
            zero = 2 ** (bits - 1) if symmetric else np.clip(np.round(-low / max(scale, 1e-38)), 0, top)
            for i, w in enumerate(group):
                code = np.clip(np.round(w / scale + zero), 0, top) if scale else zero
                rounded[o, first + i] = scale * np.float32(code - zero)
    return rounded


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [8, 32, 128, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_definition(bits, group_size, symmetric):
    weight = 0.05 * torch.randn(11, 200, generator=torch.Generator().manual_seed(bits))
    packed = Rtn(bits=bits, group_size=group_size, symmetric=symmetric).compress(weight, None, silent)
    expected = definition(weight.numpy(), bits, 200 if group_size == -1 else group_size, symmetric)
    different = packed.dequantize().numpy() != expected
    assert different.mean() < 0.001  # a weight half way between two codes


@pytest.mark.parametrize("symmetric", [False, True])
def test_error_halves_with_every_bit(symmetric):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in range(2, 9):
        packed = Rtn(bits=bits, symmetric=symmetric).compress(weight, None, silent)
        errors.append(float((packed.dequantize() - weight).square().mean().sqrt()))
    assert all(1.7 < worse / better < 2.6 for worse, better in itertools.pairwise(errors))


def test_zero_stays_zero():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) + 3
    weight[:, ::7] = 0
    assert not Rtn(bits=3, group_size=16).compress(weight, None, silent).dequantize()[:, ::7].any()


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_scales_that_float16_cannot_hold_are_said_and_held(factor):
    said = []
    weight = factor * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    packed = Rtn(bits=4).compress(weight, None, lambda kind, **fields: said.append((kind, fields["dtype"])))
    assert said == [("scale_dtype", "bfloat16")]
    assert packed.scale.dtype == torch.bfloat16
    assert float((packed.dequantize() - weight).norm() / weight.norm()) < 0.15


@pytest.mark.parametrize("settings", [{"bits": 1}, {"bits": 9}, {"group_size": 12}, {"group_size": 0}, {"grid": 3}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Rtn(**settings)
