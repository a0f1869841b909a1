"""What holds for every other engine's format: nothing is lost silently, and one weight is in memory at a time."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from acc.formats.engine import codes_of, engine, engines, exactly, export, patterns, reading_dtype, words
from acc.formats.safefile import Piece, open_shards, write_shards
from acc.formats.source import open_source
from safetensors.torch import load_file


def written(source, tmp_path, to, **options):
    out = tmp_path / to
    out.mkdir()
    return out, export(open_source(source), out, to, **options)


def bits_of(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of a row of 32-bit words, as a dense little-endian stream, one bit at a time."""
    stream = np.unpackbits(packed.astype("<i4").view(np.uint8), bitorder="little")
    return np.array([sum(int(stream[k * bits + b]) << b for b in range(bits)) for k in range(count)])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [32, 40, 96, 7])
def test_words_are_a_dense_stream_of_bits(bits, columns):
    codes = torch.randint(0, 1 << bits, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = words(codes, bits)
    assert packed.shape == (5, -(-columns * bits // 32))
    for row, line in zip(codes.numpy(), packed.numpy(), strict=True):
        assert (bits_of(line, bits, columns) == row).all()
    assert torch.equal(codes_of(packed, bits, columns), codes)


def test_packing_piece_by_piece_changes_nothing(monkeypatch):
    codes = torch.randint(0, 8, (50, 64), dtype=torch.uint8)
    whole = words(codes, 3)
    monkeypatch.setattr("acc.formats.engine.ROWS", 200)
    assert torch.equal(words(codes, 3), whole)
    assert torch.equal(codes_of(whole, 3, 64), codes)


def test_patterns_fit_what_they_should_and_nothing_else():
    names = [f"model.layers.{i}.mlp.{leaf}" for i in range(12) for leaf in ("gate", "gate_proj", "up_proj")]
    wanted = [n for n in names if n.endswith(".gate")] + ["model.layers.3.mlp.up_proj"]
    found = patterns(wanted, [n for n in names if n not in wanted])
    assert [n for n in names if any(re.match(p, n) for p in found)] == sorted(wanted, key=names.index)
    assert len(found) == 2


def test_scales_are_moved_to_another_type_exactly_or_not_at_all():
    assert exactly(torch.tensor([0.5, 3.0], dtype=torch.bfloat16), torch.float16).tolist() == [0.5, 3.0]
    for value, dtype in ((1e-9, torch.bfloat16), (1e9, torch.bfloat16)):
        with pytest.raises(ValueError, match="float16 does not hold"):
            exactly(torch.tensor([value], dtype=dtype), torch.float16)
    with pytest.raises(ValueError, match="bfloat16 does not hold"):
        exactly(torch.tensor([1.001], dtype=torch.float16), torch.bfloat16)
    half, brain = {"scale_dtype": "float16"}, {"scale_dtype": "bfloat16"}
    assert reading_dtype([half, half], torch.bfloat16) == torch.float16
    assert reading_dtype([half, brain], torch.bfloat16) == torch.float32
    assert reading_dtype([brain], torch.bfloat16) == torch.bfloat16
    assert reading_dtype([half], torch.float32) == torch.float32


@pytest.mark.parametrize("limit", [1, 100, 10**9])
def test_shards_are_what_any_reader_reads(tmp_path, limit):
    """Odd sizes and all types side by side; the tensors of the model come back, in one file or in many."""
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.float16]
    tensors = {f"t{i}": torch.arange(2 * i + 1).to(dtype) for i, dtype in enumerate(dtypes)} | {"s": torch.tensor(3.0)}
    pieces = [Piece({n: (tuple(t.shape), t.dtype)}, lambda n=n, t=t: {n: t}) for n, t in tensors.items()]
    total = write_shards(tmp_path, pieces, limit)
    assert total == sum(t.numel() * t.element_size() for t in tensors.values())
    read = {n: t for path in sorted(tmp_path.glob("*.safetensors")) for n, t in load_file(path).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    assert open_shards(tmp_path).extents.keys() == tensors.keys()
    assert len(list(tmp_path.glob("*.safetensors"))) == {1: 7, 10**9: 1}.get(limit, 2)


def test_a_piece_is_made_when_its_place_in_the_file_has_come(tmp_path):
    """Never two at a time: each is gone before the next is made."""
    alive = []

    def make(name):
        assert all(reference() is None for reference in alive)
        tensor = torch.ones(8)
        alive.append(weakref.ref(tensor))
        return {name: tensor}

    write_shards(tmp_path, [Piece({n: ((8,), torch.float32)}, lambda n=n: make(n)) for n in "abc"])
    assert len(alive) == 3


def test_there_is_a_line_for_each_engine():
    assert {"gptq", "compressed-tensors"} <= engines().keys()
    assert all(line.endswith(".") for line in engines().values())
    with pytest.raises(ValueError, match="there is dense, "):
        engine("gguf")


@pytest.mark.parametrize("to", engines())
def test_what_cannot_be_held_is_refused_by_name(packed, tmp_path, to):
    """Stacked experts go nowhere; with `dense_rest` they are written dense, and said to be."""
    source = packed("gpt_oss", "rtn", group_size=8)
    with pytest.raises(ValueError, match=r"\.weight: .*; --dense-rest|experts\.\w+: .*; --dense-rest"):
        written(source, tmp_path, to)
    assert not list((tmp_path / to).iterdir())


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_the_rest_is_written_dense_when_asked(packed, tmp_path, to):
    source = packed("gpt_oss", "rtn", group_size=8)
    out, made = written(source, tmp_path, to, dense_rest=True)
    opened = open_source(source)
    stacked = {name for name, entry in opened.entries.items() if entry.stack is not None}
    assert stacked <= made.dense.keys()
    again = open_source(out)
    assert again.entries.keys() == opened.entries.keys() - made.dense.keys()
    for name in opened.names():
        same = again.tensor(name).float() - opened.tensor(name).float()
        assert float(same.abs().max()) <= 2**-10 * float(opened.tensor(name).abs().max()), name


def test_an_unpacked_model_is_not_exported(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="the model is not packed"):
        written(checkpoint("llama"), tmp_path, "gptq")


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_back_again_it_is_the_same_weight(packed, tmp_path, to, symmetric, bits):
    source = open_source(packed("llama", "rtn", bits=bits, group_size=32, symmetric=symmetric))
    out, made = written(source.spec, tmp_path, to)
    assert not made.dense
    again = open_source(out)
    assert again.quantized
    assert "quantization_config" not in again.config
    assert again.names() == source.names()
    for name, entry in source.entries.items():
        ours, theirs = source.packed(name), again.packed(name)
        assert again.entries[name].shape == entry.shape
        assert torch.equal(ours.dequantize(), theirs.dequantize())
        assert torch.equal(again.tensor(name), theirs.dequantize(again.dtype))
        assert ours.scheme | {"scale_dtype": ""} == theirs.scheme | {"scale_dtype": ""}


def test_from_one_engine_to_the_other_and_back(packed, tmp_path):
    """A pure repack: the last checkpoint has the bytes of the first."""
    first, _ = written(packed("llama", "rtn", bits=4, group_size=32, symmetric=True), tmp_path, "gptq")
    second = tmp_path / "other"
    second.mkdir()
    export(open_source(first), second, "compressed-tensors")
    third = tmp_path / "again"
    third.mkdir()
    export(open_source(second), third, "gptq")
    a, b = (load_file(path / "model.safetensors") for path in (first, third))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    tables = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (first, third)]
    assert tables[0] == tables[1]


def test_to_dense_from_another_engines_checkpoint(packed, tmp_path):
    source = open_source(packed("llama", "rtn", bits=3, group_size=32, symmetric=False))
    first, _ = written(source.spec, tmp_path, "gptq")
    dense = tmp_path / "dense"
    dense.mkdir()
    export(open_source(first), dense, "dense")
    plain = open_source(dense)
    assert not plain.quantized
    for name in source.entries:
        assert torch.equal(plain.tensor(name), source.packed(name).dequantize(torch.float16))
    assert not Path(dense / "quantize_config.json").exists()
