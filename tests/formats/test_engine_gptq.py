"""GPTQ's format against an unpacker written from its description, in plain loops over bits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from acc.formats.engine import export
from acc.formats.source import open_source
from safetensors.torch import load_file, save_file


def bits_of(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    stream = np.unpackbits(packed.astype("<i4").view(np.uint8), bitorder="little")
    return np.array([sum(int(stream[k * bits + b]) << b for b in range(bits)) for k in range(count)])


def dequantized(tensors: dict, stem: str, bits: int, version: int) -> np.ndarray:
    """`W [O, I]` in float64: scales[g_idx] · (code - zero), zeros of version 1 stored less one."""
    qweight, qzeros = (tensors[f"{stem}.{leaf}"].numpy() for leaf in ("qweight", "qzeros"))
    scales = tensors[f"{stem}.scales"].double().numpy()
    index = tensors[f"{stem}.g_idx"].numpy()
    rows, columns = scales.shape[1], len(index)
    zeros = np.array([bits_of(line, bits, rows) for line in qzeros]) + (version == 1)
    codes = np.array([bits_of(qweight[:, row], bits, columns) for row in range(rows)])
    weight = np.empty((rows, columns))
    for column, group in enumerate(index):
        weight[:, column] = scales[group] * (codes[:, column] - zeros[group])
    return weight


@pytest.fixture
def exported(packed, tmp_path):
    def make(**step):
        source = open_source(packed("llama", "rtn", **({"group_size": 32} | step)))
        folder = tmp_path / "out"
        folder.mkdir()
        return source, folder, export(source, folder, "gptq")

    return make


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_independent_reader_finds_the_same_weights(exported, bits, symmetric):
    source, folder, _ = exported(bits=bits, symmetric=symmetric)
    config = json.loads((folder / "config.json").read_text())
    table = config["quantization_config"]
    assert table == json.loads((folder / "quantize_config.json").read_text())
    assert (table["bits"], table["group_size"], table["sym"], table["desc_act"]) == (bits, 32, symmetric, False)
    assert table["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert config["dtype"] == "float16"
    tensors = load_file(folder / "model.safetensors")
    for name in source.entries:
        theirs = dequantized(tensors, name.removesuffix(".weight"), bits, 1 if symmetric else 2)
        assert np.array_equal(theirs, source.packed(name).dequantize().double().numpy())
        assert name not in tensors


def test_symmetric_zeros_are_the_words_that_kernels_expect(exported):
    _, folder, _ = exported(bits=4, symmetric=True)
    tensors = load_file(folder / "model.safetensors")
    assert all((t == 0x77777777).all() for n, t in tensors.items() if n.endswith("qzeros"))


def test_whole_rows_are_one_group(exported):
    source, folder, _ = exported(bits=4, symmetric=True, group_size=-1)
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(source.entries))
    assert tensors[name.replace("weight", "scales")].shape[0] == 1
    theirs = dequantized(tensors, name.removesuffix(".weight"), 4, 1)
    assert np.array_equal(theirs, source.packed(name).dequantize().double().numpy())


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({"bits": 5}, "it has 5 bits, and 2, 3, 4, 8"),
        ({"group_size": 64}, "its 96 inputs are no multiple of its group of 64"),
    ],
)
def test_refused_by_tensor_and_reason(packed, tmp_path, step, reason):
    source = open_source(packed("llama", "rtn", **({"bits": 4, "group_size": 32, "symmetric": True} | step)))
    with pytest.raises(ValueError, match=rf"model\.layers\.0\..*\.weight: {reason}"):
        export(source, tmp_path, "gptq")


def test_rows_that_are_no_multiple_of_32_are_refused(packed, tmp_path):
    source = open_source(packed("deepseek_v3", "rtn", bits=4, group_size=8, symmetric=True))
    with pytest.raises(ValueError, match=r"it is \d+ x \d+, and both have to be multiples of 32"):
        export(source, tmp_path, "gptq")


def test_other_quantisers_weights_are_refused(packed, tmp_path):
    with pytest.raises(ValueError, match="packed as spqr, and only grouped integers"):
        export(open_source(packed("llama", "spqr")), tmp_path, "gptq")


def test_mixed_settings_and_dense_layers_are_in_dynamic(checkpoint, tmp_path):
    from acc.compress.apply import apply
    from acc.compress.recipe import Recipe

    steps = [
        {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True, "ignore": ["*.o_proj"]},
        {"method": "rtn", "bits": 8, "group_size": 32, "symmetric": True, "targets": ["*.down_proj"]},
    ]
    out = tmp_path / "packed"
    apply(Recipe.from_dict({"steps": steps}), open_source(checkpoint("llama")), out, [])
    folder = tmp_path / "gptq"
    folder.mkdir()
    source = open_source(out)
    export(source, folder, "gptq")
    dynamic = json.loads((folder / "config.json").read_text())["quantization_config"]["dynamic"]
    assert dynamic[r"+:^model\.layers\.\d+\.mlp\.down_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    assert r"-:^model\.layers\.\d+\.self_attn\.o_proj$" in dynamic
    again = open_source(folder)
    for name in source.entries:
        assert torch.equal(again.packed(name).dequantize(), source.packed(name).dequantize())


def test_inputs_in_an_order_of_their_own_are_dequantised(exported):
    """`desc_act`: g_idx sends neighbours to different groups. No packed form, the same numbers."""
    _, folder, _ = exported(bits=4, symmetric=False)
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.1.mlp.down_proj"
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    tensors[f"{stem}.g_idx"] = tensors[f"{stem}.g_idx"][order].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder)
    assert source.packed(f"{stem}.weight") is None
    assert f"{stem}.weight" not in source.entries
    expected = torch.from_numpy(dequantized(tensors, stem, 4, 2)).to(torch.float16)
    assert torch.equal(source.tensor(f"{stem}.weight"), expected)


def edited(folder, **changes):
    """The folder with other tensors; None takes one out."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_damaged_checkpoints_are_one_line(exported):
    _, folder, _ = exported(bits=4, symmetric=True)
    stem = "model.layers.0.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    cases = {
        "qzeros is missing": {f"{stem}.qzeros": None},
        r"qzeros is \(2, 12\) torch.int64": {f"{stem}.qzeros": tensors[f"{stem}.qzeros"].long()},
        "g_idx does not name a group": {f"{stem}.g_idx": tensors[f"{stem}.g_idx"] + 2},
        "its scales are torch.float32": {f"{stem}.scales": tensors[f"{stem}.scales"].float()},
    }
    whole = (folder / "model.safetensors").read_bytes()
    for line, changes in cases.items():
        edited(folder, **changes)
        with pytest.raises(ValueError, match=line):
            open_source(folder)
        (folder / "model.safetensors").write_bytes(whole)
    edited(folder, **{f"{stem}.qzeros": torch.full_like(tensors[f"{stem}.qzeros"], 0x66666666)})
    with pytest.raises(ValueError, match="says sym, but a zero is not 8"):
        open_source(folder).packed(f"{stem}.weight")
    edited(folder, **{f"{stem}.qzeros": torch.full_like(tensors[f"{stem}.qzeros"], -1)})
    with pytest.raises(ValueError, match="version 1 stores a zero of -1"):
        open_source(folder).tensor(f"{stem}.weight")
    config = json.loads((folder / "config.json").read_text())
    for key, value, line in (("checkpoint_format", "marlin", "acc reads gptq"), ("bits", 5, "none of GPTQ's")):
        table = config["quantization_config"] | {key: value}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": table}))
        with pytest.raises(ValueError, match=line):
            open_source(folder)
