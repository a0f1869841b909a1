"""The tool that writes checkpoints of real size: what it writes is a model, whatever its dimensions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from acc.formats.source import open_source
from transformers import AutoModelForCausalLM, AutoTokenizer

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 2048}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}
FEWER = {"llama-7b": SMALL, "moe-64": SMALL | {"num_experts": 4, "num_experts_per_tok": 2}}


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[1] / "tools" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", FEWER)
def test_a_checkpoint_opens(tool, tmp_path, shape):
    count = tool.make(tmp_path, tool.SHAPES[shape] | FEWER[shape], shard_bytes=200_000)
    source = open_source(tmp_path)
    assert len(source.shards.files) > 2
    assert all((tmp_path / file).stat().st_size < 300_000 for file in source.shards.files[1:-1])
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert model.num_parameters() == count == sum(source.tensor(name).numel() for name in source.names())
    ids = AutoTokenizer.from_pretrained(tmp_path)("Some text.", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_fewer_blocks_are_the_first_ones(tool, tmp_path):
    config = tool.SHAPES["llama-7b"] | SMALL
    tool.make(tmp_path / "two", config)
    tool.make(tmp_path / "one", config | {"num_hidden_layers": 1})
    one, two = open_source(tmp_path / "one"), open_source(tmp_path / "two")
    assert set(one.names()) < set(two.names())
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.names())


@pytest.mark.parametrize("shape", FEWER)
def test_the_shapes_have_7b_parameters(tool, shape):
    config = tool.COMMON | tool.SHAPES[shape]
    count = sum(torch.Size(size).numel() for _, size in tool.tensors(config))
    assert 6.5e9 < count < 7.2e9
