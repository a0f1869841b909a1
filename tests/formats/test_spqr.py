"""The SpQR format by its formula, its outlier lists at the edges, and what it takes on disk."""

import numpy as np
import pytest
import torch
from acc.formats.spqr import SpQRWeight

SCHEME = {"bits": 3, "group_size": 16, "scale_bits": 3, "zero_bits": 3, "stat_group_size": 16, "order": "act_order"}


def random_parts(rows, columns, scheme, outliers, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def integers(high, *size):
        return torch.randint(0, high, size, generator=generator)

    groups = -(-columns // scheme["group_size"])
    stat = torch.randn(groups, -(-rows // scheme["stat_group_size"]), 4, generator=generator).half()
    place = torch.randperm(rows * columns, generator=generator)[:outliers]
    value = torch.randn(len(place), generator=generator).half()
    return {
        "codes": integers(1 << scheme["bits"], rows, columns),
        "scale": integers(1 << scheme["scale_bits"], groups, rows),
        "zero": integers(1 << scheme["zero_bits"], groups, rows),
        "stat": stat,
        "perm": None if scheme["order"] == "identity" else torch.randperm(columns, generator=generator),
        "outliers": (place // columns, place % columns, value),
    }


def encode(parts, scheme):
    return SpQRWeight.encode(**parts, scheme={**scheme, "stat_dtype": "float16"})


def by_formula(parts, scheme):
    """W in fp32, weight by weight."""
    rows, columns = parts["codes"].shape
    weight = np.zeros((rows, columns), np.float32)
    stat = parts["stat"].float().numpy()
    for o in range(rows):
        for j in range(columns):
            g = j // scheme["group_size"]
            ss, sz, zs, zz = stat[g, o // scheme["stat_group_size"]]
            s = ss * (np.float32(int(parts["scale"][g, o])) - sz)
            z = zs * (np.float32(int(parts["zero"][g, o])) - zz)
            weight[o, j] = (np.float32(int(parts["codes"][o, j])) - z) * s
    for row, column, value in zip(*(t.tolist() for t in parts["outliers"]), strict=True):
        weight[row, column] += np.float32(value)
    if parts["perm"] is None:
        return weight
    original = np.empty_like(weight)
    original[:, parts["perm"].numpy()] = weight
    return original


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("order", ["act_order", "identity"])
def test_formula(bits, order):
    scheme = SCHEME | {"bits": bits, "scale_bits": bits - 1, "zero_bits": min(bits + 1, 8), "order": order}
    parts = random_parts(37, 77, scheme, 90, seed=bits)
    packed = encode(parts, scheme)
    packed.check()
    assert ("_perm" in packed.tensors()) is (order == "act_order")
    assert np.array_equal(packed.dequantize().numpy(), by_formula(parts, scheme))
    x = torch.randn(3, 77, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed.matmul(x), x @ packed.dequantize().T, rtol=1e-4, atol=1e-3)
    again = SpQRWeight.from_tensors(packed.tensors(), packed.shape, packed.scheme)
    assert torch.equal(again.dequantize(), packed.dequantize())


@pytest.mark.parametrize("columns", [8, 255, 256, 257, 511, 512])
@pytest.mark.parametrize("count", ["none", "one", "row", "row but one", "all"])
def test_outliers_at_the_edges_of_a_count(columns, count):
    """One byte counts up to 256 columns, the full block included, and whatever is left of it."""
    rows = 3
    position = {
        "none": [],
        "one": [(2, columns - 1)],
        "row": [(1, j) for j in range(columns)],
        "row but one": [(1, j) for j in range(columns) if j != 7],
        "all": [(i, j) for i in range(rows) for j in range(columns)],
    }[count]
    parts = random_parts(rows, columns, SCHEME, 0)
    values = torch.arange(1, len(position) + 1).half()
    row, column = torch.tensor(position, dtype=torch.long).view(-1, 2).T
    shuffle = torch.randperm(len(position), generator=torch.Generator().manual_seed(0))
    parts["outliers"] = (row[shuffle], column[shuffle], values[shuffle])
    packed = encode(parts, SCHEME)
    packed.check()
    assert packed.outlier_value.dtype == torch.float16
    assert len(packed.outlier_column) - len(position) <= columns // 256 * rows
    assert np.array_equal(packed.dequantize().numpy(), by_formula(parts, SCHEME))


def test_the_order_in_which_outliers_arrive_does_not_matter():
    parts = random_parts(16, 300, SCHEME, 200)
    packed = encode(parts, SCHEME)
    parts["outliers"] = tuple(t.flip(0) for t in parts["outliers"])
    for suffix, tensor in encode(parts, SCHEME).tensors().items():
        assert torch.equal(tensor, packed.tensors()[suffix])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.02])
def test_stored_bits_within_one_percent_of_nominal(bits, share):
    """Nominal bits: A.5 of the paper with 24 bits per outlier, on a matrix of usual size."""
    rows = columns = 4096
    scheme = SCHEME | {"bits": bits}
    place = torch.arange(int(share * rows * columns)) * 47  # coprime to the size: all different
    parts = {
        "codes": torch.zeros(rows, columns, dtype=torch.uint8),
        "scale": torch.zeros(columns // 16, rows, dtype=torch.uint8),
        "zero": torch.zeros(columns // 16, rows, dtype=torch.uint8),
        "stat": torch.zeros(columns // 16, rows // 16, 4, dtype=torch.float16),
        "perm": torch.arange(columns),
        "outliers": (place % rows, place // rows % columns, torch.ones(len(place)).half()),
    }
    packed = encode(parts, scheme)
    nominal = packed.nominal_bits(packed.shape, packed.scheme, outliers=len(packed.outlier_value))
    assert nominal == pytest.approx(bits + 6 / 16 + 64 / 256 + 24 * share, abs=1e-4)
    # 8 bits per 256 columns of a row count outliers, 16 bits per column say its place
    assert packed.stored_bits - nominal == pytest.approx(8 / 256 + 16 / rows, abs=1e-6)
    assert packed.stored_bits <= (1.014 if bits == 2 else 1.01) * nominal


def test_wide_matrices_have_wide_indices():
    layout = SpQRWeight.layout((16, 1 << 16), SCHEME | {"stat_dtype": "float16"})
    assert layout["_perm"] == ((1 << 16,), torch.uint16)
    layout = SpQRWeight.layout((16, (1 << 16) + 1), SCHEME | {"stat_dtype": "float16"})
    assert layout["_perm"] == (((1 << 16) + 1,), torch.int32)


@pytest.mark.parametrize(
    ("suffix", "spoil", "message"),
    [
        ("_perm", lambda t: t.fill_(0), "not a permutation"),
        ("_outlier_count", lambda t: t.add_(1), "are counted"),
        ("_outlier_column", lambda t: t.fill_(255), "out of range or out of order"),
        ("_outlier_column", lambda t: t.copy_(t.flip(0)), "out of range or out of order"),
    ],
)
def test_check_finds_impossible_values(suffix, spoil, message):
    parts = random_parts(16, 300, SCHEME, 200)
    packed = encode(parts, SCHEME)
    tensors = {s: t.clone() for s, t in packed.tensors().items()}
    spoil(tensors[suffix])
    with pytest.raises(ValueError, match=message):
        SpQRWeight.from_tensors(tensors, packed.shape, packed.scheme).check()


def test_stacks_of_matrices_with_different_numbers_of_outliers():
    parts = [encode(random_parts(16, 300, SCHEME, n, seed=n), SCHEME) for n in (0, 5, 70)]
    stacked = SpQRWeight.stack(parts)
    for part, again in zip(parts, SpQRWeight.unstack(stacked, 3, (16, 300), parts[0].scheme), strict=True):
        again.check()
        assert torch.equal(part.dequantize(), again.dequantize())
    with pytest.raises(ValueError, match="does not split"):
        SpQRWeight.unstack(stacked | {"_outlier_value": stacked["_outlier_value"][1:]}, 3, (16, 300), parts[0].scheme)
