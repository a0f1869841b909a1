"""Bit planes on disk: read by an independent reader, exact for even grids, usable plane by plane."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from acc.compress.rtn import Rtn
from acc.formats.base import quantization_config
from acc.formats.bcq import BcqWeight
from acc.formats.hf import packed_weights
from acc.formats.source import open_source
from acc.formats.spqr import SpQRWeight
from acc.kernels.bcq import pack_planes, unpack_planes
from safetensors.torch import load_file, save_file

SHAPES = [(1, 1), (5, 31), (7, 64), (33, 100)]


def silent(*_, **__):
    pass


def made(shape, bits=3, group_size=32, scales="free", seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows, groups = shape[0], 1 if group_size == -1 else -(-shape[1] // group_size)
    scheme = {"bits": bits, "group_size": group_size, "scales": scales, "scale_dtype": "float16"}
    codes = torch.randint(0, 1 << bits, shape, generator=draw)
    if scales == "codes":
        scale = torch.randint(0, 256, (groups, bits, rows), generator=draw, dtype=torch.uint8)
        offset = torch.randint(0, 256, (groups, rows), generator=draw, dtype=torch.uint8)
        return BcqWeight.encode(codes, scale, offset, torch.rand(2, rows, generator=draw).half(), scheme)
    scale = torch.rand((groups, rows) if scales == "even" else (groups, bits, rows), generator=draw).half()
    return BcqWeight.encode(codes, scale, torch.randn(groups, rows, generator=draw).half(), None, scheme)


def read_by_the_words(packed):
    """The weight in fp64, from the bytes of its tensors alone."""
    (rows, columns), scheme = packed.shape, packed.scheme
    bits, kind = scheme["bits"], scheme["scales"]
    width = columns if scheme["group_size"] == -1 else scheme["group_size"]
    words = packed.codes.numpy()  # [C, q, O], little-endian: byte k holds inputs 8 k to 8 k + 7
    planes = np.unpackbits(np.ascontiguousarray(words.transpose(1, 2, 0)).view(np.uint8), axis=-1, bitorder="little")
    scale, offset = (t.double().numpy() for t in (packed.scale, packed.offset))
    dense = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            group = column // width
            sign = [2.0 * planes[b, row, column] - 1 for b in range(bits)]
            if kind == "even":
                steps = sum(sign[b] * 2.0 ** (bits - 2 - b) for b in range(bits))
                dense[row, column] = scale[group, row] * (steps + offset[group, row])
            elif kind == "codes":
                of_scale, of_offset = packed.stat.double().numpy()[:, row]
                dense[row, column] = of_offset * (offset[group, row] - 128)
                dense[row, column] += sum(sign[b] * of_scale * scale[group, b, row] for b in range(bits))
            else:
                dense[row, column] = offset[group, row] + sum(sign[b] * scale[group, b, row] for b in range(bits))
    return torch.from_numpy(dense)


@pytest.mark.parametrize("scales", ["free", "codes", "even"])
@pytest.mark.parametrize(("bits", "group_size"), [(1, 16), (2, 24), (3, 128), (5, -1), (8, 32)])
def test_an_independent_reader_finds_the_same_weight(bits, group_size, scales):
    for shape in SHAPES:
        packed = made(shape, bits, group_size, scales)
        expected = read_by_the_words(packed)
        torch.testing.assert_close(
            packed.dequantize().double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planes_come_apart_again(bits, shape):
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits))
    words = pack_planes(codes, bits)
    assert words.shape == (-(-shape[1] // 32), bits, shape[0])
    assert torch.equal(unpack_planes(words, shape[1]).long(), codes)


# Even grids


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("settings", [{"symmetric": True}, {"group_size": 16}, {"group_size": -1}], ids=str)
def test_integers_become_planes_without_loss(bits, settings):
    weight = torch.randn(21, 75, generator=torch.Generator().manual_seed(bits)) + 0.3
    for scale in (1.0, 1e-7):  # the small one is stored in bfloat16
        grouped = Rtn(bits=bits, **settings).compress(scale * weight, None, silent)
        packed = BcqWeight.of_grid(grouped.grid())
        packed.check()
        assert torch.equal(packed.dequantize(), grouped.dequantize())
        own, grid = grouped.grid(), packed.grid()
        assert torch.equal(own.codes, grid.codes)
        assert torch.equal(own.scale, grid.scale)
        assert torch.equal(own.zero, grid.zero)
        other = own.top - own.codes
        assert torch.equal(packed.with_codes(other).dequantize(), grouped.with_codes(other).dequantize())


def test_the_conversion_is_the_paper_s_in_fp64():
    """`α_i = s 2^(i - 1)` and `z = s ((2^q - 1) / 2 - zp)` give `s (u - zp)`."""
    draw = torch.Generator().manual_seed(0)
    for bits in range(1, 9):
        u = torch.randint(0, 1 << bits, (100,), generator=draw)
        s, zero = torch.rand(100, generator=draw).double(), torch.randint(0, 1 << bits, (100,), generator=draw).double()
        planes = sum(s * 2.0 ** (i - 1) * (2 * (u >> i & 1) - 1) for i in range(bits))
        offset = s * (((1 << bits) - 1) / 2 - zero)
        torch.testing.assert_close(planes + offset, s * (u - zero), rtol=0, atol=1e-12)


def test_what_cannot_be_converted_says_why():
    scheme = {
        "bits": 3, "group_size": 16, "scale_bits": 3, "zero_bits": 3, "stat_group_size": 16, "stat_dtype": "float16",
    }  # fmt: skip
    codes = torch.randint(0, 8, (16, 32))
    small, stat = torch.randint(0, 8, (2, 16)), torch.rand(2, 1, 4).half() + 0.1
    none = torch.zeros(0, dtype=torch.long)
    outlier = torch.tensor([1]), torch.tensor([2]), torch.tensor([1.0])
    cases = {
        "another order": (torch.arange(32), (none, none, none.float())),
        "corrections": (None, outlier),
        "halves of integers": (None, (none, none, none.float())),
    }
    for reason, (perm, outliers) in cases.items():
        order = {"order": "identity" if perm is None else "act_order"}
        packed = SpQRWeight.encode(codes, small, small, stat, perm, outliers, scheme | order)
        with pytest.raises(ValueError, match=reason):
            BcqWeight.of_grid(packed.grid())


def test_a_model_of_integers_computes_the_same_as_planes(packed, tmp_path):
    """Logits of a tiny Llama, converted tensor by tensor, bit for bit with the dense weights in memory."""
    import json
    import shutil

    import acc

    folder = packed("llama", "rtn")
    source = open_source(str(folder))
    again = tmp_path / "planes"
    shutil.copytree(folder, again)
    tensors = {}
    for path in again.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    table = {}
    for name, entry in source.entries.items():
        stored = {suffix: tensors.pop(name + suffix) for suffix in entry.layout()}
        planes = BcqWeight.of_grid(entry.unpack(stored)[0].grid())
        tensors |= {name + suffix: tensor for suffix, tensor in planes.tensors().items()}
        table[name] = (planes.shape, planes.scheme)
    save_file(tensors, again / "model.safetensors", metadata={"format": "pt"})
    for path in again.glob("*.index.json"):
        path.unlink()
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config(table)}))
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, logits = (acc.load(place, dtype=torch.float32)(ids).logits for place in (folder, again))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


# Planes, values, schemes


@pytest.mark.parametrize("scales", ["free", "codes", "even"])
def test_the_first_planes_are_a_weight_of_their_own(scales):
    packed = made((9, 70), bits=4, scales=scales)
    whole = read_by_the_words(packed)
    for planes in (1, 2, 3, 4):
        first = packed.first_planes(planes)
        first.check()
        assert type(first).layout(first.shape, first.scheme).keys() == first.tensors().keys()
        type(first).from_tensors(first.tensors(), first.shape, first.scheme)
        codes = unpack_planes(packed.codes, 70)
        assert torch.equal(unpack_planes(first.codes, 70), codes & (1 << planes) - 1)
        torch.testing.assert_close(first.dequantize().double(), read_by_the_words(first), rtol=1e-4, atol=1e-4)
    assert packed.first_planes(4) is packed.first_planes(7) is packed
    torch.testing.assert_close(packed.dequantize().double(), whole, rtol=1e-4, atol=1e-4)


def test_a_model_is_loaded_with_its_first_planes(packed):
    """The model in memory, and the source that the evaluation streams, have the same weights."""
    import acc

    folder = packed("qwen3_moe", "lut_gemm")
    source = open_source(str(folder))
    before = sum(source.info(name).nbytes for name in source.names())
    source.read_planes(2)
    assert sum(source.info(name).nbytes for name in source.names()) < before
    model, whole = acc.load(folder, planes=2, dtype=torch.float32), acc.load(folder, dtype=torch.float32)
    own, all_of_them = (packed_weights(each) for each in (model, whole))
    assert len(own) == len(all_of_them) > 0
    for first, every in zip(own, all_of_them, strict=True):
        assert first.scheme["bits"] == 2
        assert torch.equal(first.dequantize(), every.first_planes(2).dequantize())
    name = next(iter(source.entries))
    found = source.packed(name)
    found = found[0] if isinstance(found, list) else found
    assert any(torch.equal(found.dequantize(), first.dequantize()) for first in own if first.shape == found.shape)
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        few, many = model(ids).logits, whole(ids).logits
    assert torch.isfinite(few).all()
    assert not torch.equal(few, many)
    for planes in (0, 4):
        with pytest.raises(ValueError, match="1 to 3"):
            acc.load(folder, planes=planes)
    with pytest.raises(ValueError, match="none of its weights has planes"):
        open_source(str(packed("llama", "rtn"))).read_planes(2)


def test_impossible_values_and_schemes_are_named():
    packed = made((4, 40))
    packed.scale[0, 0, 0] = -0.5
    with pytest.raises(ValueError, match="negative"):
        packed.check()
    for change, message in (({"bits": 0}, "1 to 8"), ({"scales": "odd"}, "free, codes, even")):
        with pytest.raises(ValueError, match=message):
            BcqWeight.layout(packed.shape, packed.scheme | change)


@pytest.mark.parametrize(("scales", "group_size", "expected"), [
    ("free", 128, 3 + 0.375 + 0.125), ("free", 64, 4.0), ("codes", 64, 3.5 + 32 / 512), ("even", 128, 3.25),
])  # fmt: skip
def test_bits_are_the_paper_s_and_the_file_s(scales, group_size, expected):
    packed = made((64, 512), group_size=group_size, scales=scales)
    assert packed.nominal == pytest.approx(expected)
    assert packed.stored_bits == pytest.approx(expected)


def test_grids_are_told_only_of_even_planes():
    assert made((4, 40)).grid() is None
    assert made((4, 40), scales="codes").grid() is None
    assert made((4, 40), scales="even").grid() is not None


@pytest.mark.parametrize(("bits", "group_size", "scales"), [(3, 16, "free"), (2, 32, "codes"), (1, -1, "free")])
def test_levels_rise_and_the_nearest_place_is_the_nearest_level(bits, group_size, scales):
    """By trying: every value that a group's signs can make, and for random weights the one that is nearest."""
    packed = made((6, 40), bits, group_size, scales)
    levels, dense = packed.levels(), packed.dequantize()
    width = 40 if group_size == -1 else group_size
    weight = dense.mean() + dense.std() * torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    place = levels.places(weight).round().clamp(0, levels.top).long()
    for row in range(6):
        for column in range(40):
            group = column // width
            values = levels.levels[group, :, row]
            assert (values.diff() >= 0).all()
            assert values[levels.codes[row, column].long()] == dense[row, column]
            nearest = (values - weight[row, column]).abs()
            assert nearest[place[row, column]] == nearest.min()
    again = packed.with_codes(torch.full((6, 40), levels.top, dtype=torch.uint8)).dequantize()
    expected = levels.levels[:, -1].T.repeat_interleave(width, 1)[:, :40]
    assert torch.equal(again, expected), "the last code is the greatest value"


def test_a_group_of_one_value_keeps_its_codes():
    packed = made((4, 40))
    packed = replace(packed, scale=torch.zeros_like(packed.scale))
    levels = packed.levels()
    assert torch.equal(levels.places(torch.randn(4, 40)), levels.codes.float())
    assert torch.equal(levels.weights(levels.codes), packed.dequantize())
