"""compressed-tensors' format against its own package, and transformers with it against acc's loader."""

from __future__ import annotations

import json
import re

import pytest
import torch
from acc.formats.engine import export
from acc.formats.source import open_source
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@pytest.fixture
def exported(packed, tmp_path):
    def make(family="llama", **step):
        source = open_source(packed(family, "rtn", **({"group_size": 32} | step)))
        folder = tmp_path / "out"
        folder.mkdir()
        return source, folder, export(source, folder, "compressed-tensors")

    return make


def weights_by_the_package(folder, name):
    """What the package itself makes of a stored weight."""
    helpers = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    module = name.removesuffix(".weight")
    for group in table["config_groups"].values():
        if group["targets"] == ["Linear"] or any(re.match(t.removeprefix("re:"), module) for t in group["targets"]):
            scheme = quantization.QuantizationScheme.model_validate(group)
            break
    tensors = load_file(folder / "model.safetensors")
    state = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
    compressor = helpers.BaseCompressor.get_value_from_registry("pack-quantized")
    return compressor.decompress(state, scheme)["weight"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_package_finds_the_same_weights(exported, bits, symmetric):
    source, folder, _ = exported(bits=bits, symmetric=symmetric)
    for name in source.entries:
        assert torch.equal(weights_by_the_package(folder, name), source.packed(name).dequantize())


@pytest.mark.parametrize(
    ("family", "step"),
    [
        ("llama", {"symmetric": True, "bits": 4}),
        ("llama", {"symmetric": False, "bits": 3}),
        ("llama", {"symmetric": True, "bits": 8, "group_size": -1}),
        ("mixtral", {"symmetric": True, "bits": 4}),
    ],
    ids=str,
)
def test_transformers_computes_what_acc_does(exported, family, step):
    pytest.importorskip("compressed_tensors")
    source, folder, _ = exported(family, **step)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    ours = AutoModelForCausalLM.from_pretrained(source.folder, dtype=theirs.dtype)
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = theirs(ids).logits, ours(ids).logits
    assert theirs.dtype == torch.float32
    assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_a_model_in_16_bits_keeps_the_digits_of_its_scales(packed, tmp_path):
    """bfloat16 has fewer digits than float16 scales: the config names float16, and loses none."""
    pytest.importorskip("compressed_tensors")
    from acc.compress.apply import apply
    from acc.compress.recipe import Recipe

    model = AutoModelForCausalLM.from_pretrained(open_source(packed("llama", "rtn", group_size=32)).folder)
    dense = tmp_path / "dense"
    export(open_source(packed("llama", "rtn", group_size=32)), _made(dense), "dense")
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(tmp_path / "brain")
    del model
    recipe = Recipe.from_dict({"steps": [{"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True}]})
    apply(recipe, open_source(tmp_path / "brain"), tmp_path / "packed", [])
    source = open_source(tmp_path / "packed")
    made = export(source, _made(tmp_path / "out"), "compressed-tensors")
    assert "float16, not bfloat16" in made.notes[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.float16
    loaded(torch.arange(3, 9)[None])  # unpacks
    for name in source.entries:
        assert torch.equal(loaded.get_parameter(name), source.packed(name).dequantize(torch.float16))


def _made(folder):
    folder.mkdir()
    return folder


def test_mixed_bits_are_groups_of_their_own(checkpoint, tmp_path):
    from acc.compress.apply import apply
    from acc.compress.recipe import Recipe

    steps = [
        {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True, "ignore": ["*.o_proj"]},
        {"method": "rtn", "bits": 8, "group_size": 32, "symmetric": True, "targets": ["*.1.mlp.down_proj"]},
    ]
    out = tmp_path / "packed"
    apply(Recipe.from_dict({"steps": steps}), open_source(checkpoint("llama")), out, [])
    folder = _made(tmp_path / "out")
    source = open_source(out)
    export(source, folder, "compressed-tensors")
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert len(table["config_groups"]) == 2
    assert r"re:model\.layers\.\d+\.self_attn\.o_proj$" in table["ignore"]
    again = open_source(folder)
    for name in source.entries:
        assert torch.equal(again.packed(name).dequantize(), source.packed(name).dequantize())
        assert torch.equal(weights_by_the_package(folder, name), source.packed(name).dequantize())
    pytest.importorskip("compressed_tensors")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        a, b = theirs(ids).logits, AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_what_its_readers_would_get_wrong_is_refused(packed, checkpoint, tmp_path):
    from acc.compress.apply import apply
    from acc.compress.recipe import Recipe

    source = open_source(packed("mixtral", "rtn", bits=4, group_size=32, symmetric=False))
    with pytest.raises(ValueError, match=r"experts\.0\..*: it is an expert with zeros"):
        export(source, tmp_path, "compressed-tensors")
    steps = [
        {"method": "rtn", "bits": 4, "group_size": 32},
        {"method": "rtn", "bits": 8, "group_size": 32, "targets": ["*.1.mlp.down_proj"]},
    ]
    apply(Recipe.from_dict({"steps": steps}), open_source(checkpoint("llama")), tmp_path / "packed", [])
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight: it has other bits"):
        export(open_source(tmp_path / "packed"), tmp_path, "compressed-tensors")


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_files_of_versions_before_0_20_are_read(exported, bits):
    """Those packed as many whole codes as fit a word."""
    source, folder, _ = exported(bits=bits, symmetric=False)
    tensors = load_file(folder / "model.safetensors")

    def with_gaps(codes):  # [R, N]
        per_word = 32 // bits
        found = torch.zeros(len(codes), -(-codes.shape[1] // per_word), dtype=torch.int64)
        for column in range(codes.shape[1]):
            found[:, column // per_word] |= codes[:, column].long() << bits * (column % per_word)
        return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)

    for name in source.entries:
        grid = source.packed(name).grid()
        tensors[f"{name}_packed"] = with_gaps(grid.codes)
        tensors[f"{name}_zero_point"] = with_gaps(grid.zero).T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    again = open_source(folder)
    for name in source.entries:
        assert torch.equal(again.packed(name).dequantize(), source.packed(name).dequantize())


def test_scales_with_more_digits_than_16_bits_are_dequantised(exported):
    source, folder, _ = exported(bits=4, symmetric=False)
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(source.entries))
    tensors[f"{name}_scale"] *= 1.0001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    again = open_source(folder)
    assert again.packed(name) is None
    grid = source.packed(name).grid()
    scale, zero = (t.repeat_interleave(32, -1) for t in (tensors[f"{name}_scale"], grid.zero.T))
    assert torch.equal(again.tensor(name), scale * (grid.codes.float() - zero))


def test_damaged_checkpoints_and_other_formats_are_one_line(exported):
    _, folder, _ = exported(bits=4, symmetric=True)
    config = json.loads((folder / "config.json").read_text())
    table = config["quantization_config"]
    group = table["config_groups"]["group_0"]
    cases = {
        "no group of config.json": group | {"targets": ["re:nothing$"]},
        "8 bits of float": group | {"weights": group["weights"] | {"num_bits": 8, "type": "float"}},
        "acc reads group and channel": group | {"weights": group["weights"] | {"strategy": "tensor"}},
        "words a row do not hold": group | {"weights": group["weights"] | {"num_bits": 7}},
        "weight_zero_point is missing": group | {"weights": group["weights"] | {"symmetric": False}},
        "weight_scale is": group | {"weights": group["weights"] | {"group_size": 16}},
    }
    for line, changed in cases.items():
        edited = config | {"quantization_config": table | {"config_groups": {"group_0": changed}}}
        (folder / "config.json").write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=line):
            open_source(folder)
