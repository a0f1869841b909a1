"""Writes checkpoints of real size with random weights: what memory and time depend on, without a download.

    python tests/tools/make_checkpoint.py FOLDER --shape llama-7b --blocks 3

A tensor is drawn, written and forgotten before the next one, so that 7B parameters need no more memory than the
largest of them. Each has a seed of its own, made of its name: fewer blocks are the first blocks of the whole model.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

TOKENIZER = Path(__file__).parents[2] / "recipes" / "demo"  # its 2048 ids are among those of every shape
SHARD_BYTES = 5 * 10**9  # as transformers cuts them
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "moe-64": {  # OLMoE-1B-7B
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
    },
}
COMMON = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
Shape = tuple[int, ...]


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Every tensor of the checkpoint, in the order of the files."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, width)
    for index in range(config["num_hidden_layers"]):
        for name, shape in block(config):
            yield f"model.layers.{index}.{name}.weight", shape
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def block(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """The tensors of one decoder block, `.weight` left out."""
    width, inner, experts = config["hidden_size"], config["intermediate_size"], config.get("num_experts")
    shared = width * config["num_key_value_heads"] // config["num_attention_heads"]  # width of keys and of values
    for leaf, rows in (("q_proj", width), ("k_proj", shared), ("v_proj", shared), ("o_proj", width)):
        yield f"self_attn.{leaf}", (rows, width)
    if experts is not None:
        yield "self_attn.q_norm", (width,)
        yield "self_attn.k_norm", (shared,)
        yield "mlp.gate", (experts, width)
    for place in ["mlp"] if experts is None else [f"mlp.experts.{expert}" for expert in range(experts)]:
        yield f"{place}.gate_proj", (inner, width)
        yield f"{place}.up_proj", (inner, width)
        yield f"{place}.down_proj", (width, inner)
    yield "input_layernorm", (width,)
    yield "post_attention_layernorm", (width,)


def shards(wanted: list[tuple[str, Shape]], limit: int) -> list[list[tuple[str, Shape]]]:
    """Cuts the list where the next tensor would make a file larger than `limit` bytes."""
    files: list[list[tuple[str, Shape]]] = [[]]
    size = 0
    for name, shape in wanted:
        nbytes = 2 * math.prod(shape)
        if files[-1] and size + nbytes > limit:
            files.append([])
            size = 0
        files[-1].append((name, shape))
        size += nbytes
    return files


def draw(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """The tensor `name`: ones for a norm, else normal with the deviation that models start from."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, COMMON["initializer_range"], generator=generator)


def write_shard(file: BinaryIO, members: list[tuple[str, Shape]], seed: int) -> None:
    """One safetensors file: a header that says where each tensor will lie, then the tensors one by one."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in members:
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name, shape in members:
        draw(name, shape, seed).view(torch.uint8).numpy().tofile(file)


def make(folder: Path, config: dict[str, Any], *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes the checkpoint that `config` describes (keys as in SHAPES) and returns its number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    config = COMMON | config
    files = shards(list(tensors(config)), shard_bytes)
    weight_map: dict[str, str] = {}
    for number, members in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {tensor: name for tensor, _ in members}
        with (folder / name).open("wb") as file:
            write_shard(file, members, seed)
    count = sum(math.prod(shape) for members in files for _, shape in members)
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--blocks", type=int, help="write fewer blocks than the shape has")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = dict(SHAPES[arguments.shape])
    if arguments.blocks is not None:
        config["num_hidden_layers"] = arguments.blocks
    count = make(arguments.folder, config, seed=arguments.seed)
    print(f"{arguments.folder}: {arguments.shape}, {config['num_hidden_layers']} blocks, {count / 1e9:.2f}B parameters")


if __name__ == "__main__":
    main()
