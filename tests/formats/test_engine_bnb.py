"""bitsandbytes' checkpoints, loaded by stock transformers in a process that has never heard of acc."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from acc.compress.apply import apply
from acc.compress.recipe import Recipe
from acc.formats.engine import export
from acc.formats.source import open_source
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytest.importorskip("bitsandbytes")

LOAD = """
import sys, torch
import bitsandbytes as bnb
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert "acc" not in sys.modules and not any(info.values()), info
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[name] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    with torch.no_grad():
        found["logits"] = model(torch.arange(3, 40)[None]).logits.float()
    save_file(found, folder + "/found")
"""
LLAMA = {"ignore": ["*.down_proj", "*.1.self_attn.v_proj"]}
CASES = {
    "nf4": ("llama", {"method": "nf4", **LLAMA}),
    "nf4, double": ("llama", {"method": "nf4", "double_quant": True, **LLAMA}),
    "int8": ("llama", {"method": "int8", **LLAMA}),
    "experts": ("mixtral", {"method": "nf4"}),
}


def quantized(checkpoint, out, steps):
    apply(Recipe.from_dict({"steps": steps}), open_source(checkpoint), out, [])
    return open_source(out)


@pytest.fixture(scope="module")
def loaded(checkpoint, tmp_path_factory):
    """`{case: (acc's source, what the export said, weights and logits that a process without acc found)}`."""
    made = {}
    for number, (case, (family, step)) in enumerate(CASES.items()):
        home = tmp_path_factory.mktemp("bnb")
        source = quantized(checkpoint(family), home / "packed", [step])
        folder = home / f"{number}"
        folder.mkdir()
        made[case] = source, export(source, folder, "bnb", dense_rest=case == "experts"), folder
    words = [sys.executable, "-c", LOAD, *(str(folder) for _, _, folder in made.values())]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path_factory.getbasetemp())
    assert done.returncode == 0, done.stderr
    return {case: (source, said, load_file(folder / "found")) for case, (source, said, folder) in made.items()}


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_finds_the_same_weights(loaded, case):
    source, said, found = loaded[case]
    found = dict(found)
    logits = found.pop("logits")
    assert {f"{module}.weight" for module in found} == source.entries.keys() - said.dense.keys()
    assert all(".experts." in name for name in said.dense)
    for module, weight in found.items():
        assert torch.equal(weight, source.packed(f"{module}.weight").dequantize(weight.dtype))
    if case == "int8":
        assert "other logits" in said.notes[0]
        pytest.skip("in 8 bits bitsandbytes rounds the inputs too, so only the weights are compared")
    ours = AutoModelForCausalLM.from_pretrained(source.folder)
    with torch.no_grad():
        expected = ours(torch.arange(3, 40)[None]).logits
    # bitsandbytes' kernel for the CPU multiplies in bfloat16
    assert float((logits - expected).norm() / expected.norm()) < 0.02


def test_the_files_are_what_bitsandbytes_itself_saves(checkpoint, tmp_path):
    """Quantised by transformers while it loads, and saved: the same tensors, bit for bit, and the same JSON."""
    from transformers import BitsAndBytesConfig

    skip = ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(3))]
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    source = quantized(checkpoint("llama"), tmp_path / "packed", [{"method": "nf4", "ignore": ["*.down_proj"]}])
    (tmp_path / "ours").mkdir()
    export(source, tmp_path / "ours", "bnb")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if "quant_state" in name:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(b[name].tolist()))
        else:
            assert torch.equal(tensor, b[name]), name


def test_experts_are_packed_here_and_refused_there(checkpoint, tmp_path):
    source = quantized(checkpoint("mixtral"), tmp_path / "packed", [{"method": "nf4"}])
    assert any(".experts." in name for name in source.entries)
    with pytest.raises(ValueError, match=r"experts\.0\..*: transformers gives bitsandbytes linear layers only"):
        export(source, tmp_path, "bnb")


def test_refused_by_tensor_and_reason(packed, checkpoint, tmp_path):
    source = quantized(checkpoint("llama"), tmp_path / "packed", [{"method": "nf4"}])
    with pytest.raises(ValueError, match=r"mlp\.down_proj\.weight: its 96 inputs are no multiple of 64"):
        export(source, tmp_path, "bnb")
    mixed = [{"method": "nf4", "ignore": ["*.down_proj"]}, {"method": "int8", "targets": ["*.2.mlp.up_proj"]}]
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight: it is packed otherwise"):
        export(quantized(checkpoint("llama"), tmp_path / "mixed", mixed), tmp_path, "bnb")
    with pytest.raises(ValueError, match="packed as grouped, and bitsandbytes has nf4 and int8"):
        export(open_source(packed("llama", "rtn")), tmp_path, "bnb")


def test_a_double_quantised_artifact_survives_the_disk(checkpoint, tmp_path):
    source = quantized(checkpoint("qwen3"), tmp_path / "packed", [{"method": "nf4", "double_quant": True}])
    name = next(iter(source.entries))
    tensors = {f"w{s}": t for s, t in source.packed(name).tensors().items()}
    save_file(tensors, tmp_path / "one.safetensors")
    assert tensors.keys() == {"w", "w_absmax", "w_nested_absmax", "w_offset"}
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    assert torch.isfinite(model(torch.arange(3, 9)[None]).logits).all()
