"""Bit planes made of grouped integers: the same weights and the same logits, from acc's files and from GPTQ's."""

from __future__ import annotations

import pytest
import torch
from acc.compress.apply import apply
from acc.compress.recipe import Recipe
from acc.formats.engine import export
from acc.formats.source import open_source
from transformers import AutoModelForCausalLM


def packed(folder, out, **step) -> str:
    recipe = Recipe.from_dict({"steps": [{"method": "rtn", "group_size": 32, **step}]})
    apply(recipe, open_source(str(folder)), out, [])
    return str(out)


def logits(folder) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


@pytest.mark.parametrize(
    "step", [{"bits": 2}, {"bits": 3, "symmetric": True}, {"bits": 4, "group_size": -1}, {"bits": 8}]
)
def test_the_same_weights_and_logits(checkpoint, tmp_path, step):
    source = open_source(packed(checkpoint("llama"), tmp_path / "rtn", **step))
    (tmp_path / "bcq").mkdir()
    export(source, tmp_path / "bcq", "bcq")
    made = open_source(str(tmp_path / "bcq"))
    assert made.entries.keys() == source.entries.keys()
    for name in source.names():
        assert torch.equal(made.tensor(name), source.tensor(name))
    for entry in made.entries.values():
        assert entry.cls.name == "bcq"
    assert torch.allclose(logits(tmp_path / "bcq"), logits(tmp_path / "rtn"), atol=1e-4)


def test_from_what_gptq_files_hold(checkpoint, tmp_path):
    source = open_source(packed(checkpoint("llama"), tmp_path / "rtn", bits=4, symmetric=True))
    for name in ("gptq", "bcq"):
        (tmp_path / name).mkdir()
    export(source, tmp_path / "gptq", "gptq")
    export(open_source(str(tmp_path / "gptq")), tmp_path / "bcq", "bcq")
    made = open_source(str(tmp_path / "bcq"))
    for name in source.entries:
        assert torch.equal(made.packed(name).dequantize(), source.packed(name).dequantize())


def test_what_is_not_evenly_spaced_is_refused(checkpoint, tmp_path):
    recipe = Recipe.from_dict({"steps": [{"method": "lut_gemm", "bits": 2, "activation_aware": False}]})
    apply(recipe, open_source(str(checkpoint("llama"))), tmp_path / "planes", [])
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="packed as bcq"):
        export(open_source(str(tmp_path / "planes")), tmp_path / "out", "bcq")
    stacked = open_source(packed(checkpoint("gpt_oss"), tmp_path / "oss", bits=4))
    with pytest.raises(ValueError, match="stack of 4"):
        export(stacked, tmp_path / "out", "bcq")
