"""The grouped format by its formula, and GPTQ's conventions."""

import numpy as np
import pytest
import torch
from acc.formats.grouped import GroupedWeight


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [8, 32, -1])
def test_formula(bits, symmetric, group_size):
    rows, columns = 19, 72
    width = columns if group_size == -1 else group_size
    groups = -(-columns // width)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    scale = torch.rand(groups, rows, generator=generator).half()
    zero = None if symmetric else torch.randint(0, 1 << bits, (groups, rows), generator=generator)
    scheme = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": "float16"}
    packed = GroupedWeight.encode(codes, scale, zero, scheme)
    packed.check()
    assert ("_zero" in packed.tensors()) is not symmetric
    expected = np.zeros((rows, columns), np.float32)
    for o in range(rows):
        for i in range(columns):
            middle = 1 << bits - 1 if zero is None else int(zero[i // width, o])
            expected[o, i] = np.float32(scale[i // width, o]) * np.float32(int(codes[o, i]) - middle)
    assert np.array_equal(packed.dequantize().numpy(), expected)
    again = GroupedWeight.from_tensors(packed.tensors(), packed.shape, packed.scheme)
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_nominal_bits_of_the_usual_setting():
    scheme = {"bits": 4, "group_size": 128, "symmetric": False, "scale_dtype": "float16"}
    assert GroupedWeight.nominal_bits((4096, 4096), scheme) == 4 + (16 + 4) / 128
    layout = GroupedWeight.layout((4096, 4096), scheme)
    stored = sum(torch.Size(size).numel() * dtype.itemsize * 8 for size, dtype in layout.values()) / 4096**2
    assert stored == 4 + (16 + 4) / 128


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_negative_scale_is_for_symmetric_grids(symmetric):
    scheme = {"bits": 3, "group_size": 8, "symmetric": symmetric, "scale_dtype": "float16"}
    scale, zero = torch.full((1, 2), -0.5).half(), None if symmetric else torch.full((1, 2), 4)
    packed = GroupedWeight.encode(torch.arange(16).view(2, 8) % 8, scale, zero, scheme)
    if symmetric:
        packed.check()
        assert packed.dequantize()[0].tolist() == [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5]
        assert torch.equal(packed.matmul(torch.eye(8)).T, packed.dequantize())
    else:
        with pytest.raises(ValueError, match="negative"):
            packed.check()
