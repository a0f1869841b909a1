"""Packed checkpoints in stock transformers: same logits, same tensors when saved again, and no load that is silently
wrong."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import acc
import pytest
import torch
from acc.formats.hf import Packed
from acc.formats.source import open_source
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

FAMILIES = [
    "llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss",
]  # fmt: skip
METHODS = ["rtn", "spqr"]


def ids(rows: int = 2, length: int = 48) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def dense_twin(folder, target):
    """The same model as a plain fp32 checkpoint, dequantised without rounding."""
    source = open_source(folder)
    tensors = {}
    for name in source.names():
        weight = source.packed(name)
        parts = weight if isinstance(weight, list) else [weight]
        tensors[name] = source.tensor(name) if weight is None else source.entries[name].dense(parts, torch.float32)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    (target / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(target, experts_implementation="eager", dtype=torch.float32).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_dequantised_model(packed, tmp_path, family, method):
    folder = packed(family, method)
    model = acc.load(folder, dtype=torch.float32)
    expected = dense_twin(folder, tmp_path / "dense")(ids()).logits
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=2e-4)
    text = model.generate(ids(1, 8), max_new_tokens=6, do_sample=False)
    assert text.shape == (1, 14)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "deepseek_v3"])
def test_saving_again_gives_the_same_tensors(packed, tmp_path, family):
    folder = packed(family, "spqr")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    first, second = open_source(folder), open_source(tmp_path / "again")
    assert first.raw_names() == second.raw_names()
    for name in first.raw_names():
        assert torch.equal(first.raw(name), second.raw(name)), name
    assert first.config["quantization_config"] == second.config["quantization_config"]


@pytest.mark.parametrize("ignore", ["*.layers.1.*", "*.experts.2.*", "*down_proj", "re:experts\\.0\\..*gate_proj"])
@torch.no_grad()
def test_partly_packed_experts(packed, tmp_path, ignore):
    """Dense and packed layers, experts and projections side by side load, agree and save again."""
    folder = packed("olmoe", "rtn", ignore=[ignore])
    model = acc.load(folder, dtype=torch.float32)
    expected = dense_twin(folder, tmp_path / "dense")(ids()).logits
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=2e-4)
    model.save_pretrained(tmp_path / "again")
    assert open_source(tmp_path / "again").raw_names() == open_source(folder).raw_names()


def test_tied_embeddings_stay_tied(packed):
    folder = packed("llama", "rtn")
    assert not any("lm_head" in name for name in open_source(folder).raw_names())
    model = acc.load(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


LOAD = """
loaded = []
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        loaded.append(folder)
    except Exception as e:
        print(e, file=sys.stderr)
print(len(loaded))
"""


@pytest.mark.parametrize(
    ("first", "loads"),
    [("transformers", False), ("acc, transformers", True), ("transformers, transformers.modeling_utils, acc", True)],
)
def test_without_acc_transformers_raises(packed, first, loads):
    """In a process of its own: packed codes have another shape than the dense weight, so only with acc do they load."""
    folders = [str(packed(family, "spqr")) for family in ("llama", "qwen3_moe", "gpt_oss")]
    command = [sys.executable, "-c", f"import sys, {first}\n{LOAD}", *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == [str(len(folders) if loads else 0)], done.stderr[-2000:]


def damaged(folder, tmp_path, change):
    """A copy of the checkpoint with one shard changed by `change(tensors)`, and no index to notice it first."""
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    tensors = {}
    for path in sorted(copy.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (copy / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("lost", ["weight_scale", "weight", "input_layernorm.weight"])
def test_a_missing_tensor_raises(packed, tmp_path, lost):
    def drop(tensors):
        del tensors[next(n for n in tensors if n.endswith(lost) and "layers.1" in n)]

    copy = damaged(packed("llama", "rtn"), tmp_path, drop)
    with pytest.raises(ValueError, match=r"missing|incomplete|lacks"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_another_format_version_is_refused(packed, tmp_path):
    copy = damaged(packed("llama", "rtn"), tmp_path, lambda tensors: None)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_moving_and_casting_never_rounds_packed_tensors(packed):
    model = acc.load(packed("llama", "spqr"), dtype=torch.float32)
    module = model.model.layers[0].mlp.up_proj
    before = {n: b.clone() for n, b in module.named_buffers()}
    module.to(torch.bfloat16)
    module.to("cpu")
    for name, buffer in module.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    y = module(torch.randn(2, 64, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "olmoe"])
@torch.no_grad()
def test_the_cache_gives_the_same_logits_and_is_dropped_when_the_model_is_cast(packed, monkeypatch, family):
    expected = acc.load(packed(family, "spqr"), dtype=torch.float32)(ids()).logits
    monkeypatch.setenv("ACC_KERNELS", "cache")
    model = acc.load(packed(family, "spqr"), dtype=torch.float32)
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=2e-4)
    holders = [m for m in model.modules() if isinstance(m, Packed) and m._parts]
    assert holders
    model.to(torch.bfloat16)
    assert not any(m._parts for m in holders)
    assert torch.isfinite(model(ids()).logits).all()
    cached = [part._product.weight for m in holders for parts in m._parts.values() for part in parts]
    assert {weight.dtype for weight in cached if weight is not None} == {torch.bfloat16}


@torch.no_grad()
def test_a_model_that_has_run_can_be_copied_and_loaded_anew(packed):
    model = acc.load(packed("llama", "spqr"))
    expected = model(ids()).logits
    twin = copy.deepcopy(model)
    other = {name: torch.zeros_like(buffer) for name, buffer in model.state_dict().items() if "outlier_value" in name}
    state = twin.state_dict()
    model.load_state_dict(other, strict=False)
    assert torch.equal(twin(ids()).logits, expected)
    assert not torch.equal(model(ids()).logits, expected)
    model.load_state_dict(state)
    assert torch.equal(model(ids()).logits, expected)
