"""Calibrations that nobody calibrated: tensors as the passes would store them, made up."""

from __future__ import annotations

import pytest
import torch
from acc.formats.calibration import Calibration, Journal, facts
from acc.formats.model import AttentionLayer

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def make(layers: int, heads: int, kv_heads: int, head_dim: int, refused: tuple[int, ...], domains: int) -> Calibration:
    drawn = torch.Generator().manual_seed(layers * heads)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=drawn)

    reason = "sliding attention over 512 tokens, sparse already"
    described = [
        AttentionLayer(i, f"model.layers.{i}.self_attn", heads, kv_heads, head_dim, reason if i in refused else None)
        for i in range(layers)
    ]
    opened = [i for i in range(layers) if i not in refused]
    kind = torch.randint(0, 4, (layers, heads), generator=drawn)
    kind[list(refused)] = 0
    rank = torch.full((layers, kv_heads), -1)
    rank[opened] = torch.randperm(len(opened) * kv_heads, generator=drawn).view(-1, kv_heads)
    order = torch.stack([torch.randperm(head_dim, generator=drawn) for _ in range(layers * kv_heads)])
    share, found = torch.tensor(SHARES), rand(layers, kv_heads, 3).sort().values
    tensors = {
        "heads.kind": kind.to(torch.uint8),
        "heads.length": torch.tensor([1024, 4096], dtype=torch.int32),
        "heads.budget": 0.3 * rand(layers, heads, 2, 2),
        "heads.recall": 0.8 + 0.2 * rand(layers, heads, 2),
        "heads.error": 0.01 * rand(layers, heads, 2),
        "heads.cost": 0.25 + 0.1 * rand(layers, heads, 2),
        "heads.margin": rand(layers, heads),
        "retrieval.gate": rand(layers, kv_heads),
        "retrieval.rank": rank.int(),
        "retrieval.sink": torch.full((layers, kv_heads), 16, dtype=torch.int32),
        "retrieval.recent": torch.full((layers, kv_heads), 128, dtype=torch.int32),
        "retrieval.pareto_sparsity": share,
        "retrieval.pareto_loss": share**3,
        "retrieval.pareto_random": share,
        "retrieval.pareto_accuracy": 1 - share**3,
        "retrieval.pareto_random_accuracy": 1 - share,
        "channels.order": order.view(layers, kv_heads, head_dim).to(torch.int16),
        "channels.importance": rand(layers, kv_heads, head_dim),
        "channels.scale8": 0.01 + rand(layers, kv_heads, head_dim),
        "channels.scale4": 0.01 + rand(layers, kv_heads, head_dim),
        "channels.dense": torch.arange(layers) == opened[0],
        "channels.count": torch.tensor([4, 8, 16], dtype=torch.int32),
        "channels.recall": found,
        "sinks.sink_mass": rand(domains, layers, heads),
        "sinks.class": torch.randint(0, 3, (domains, layers, heads), generator=drawn).to(torch.uint8),
        "sinks.flips": torch.rand(layers, heads, generator=drawn) < 0.5,
    }
    told = {
        "heads": {"settings": {"cost": 0.25}, "summary": {}, "events": ["two heads stay dense: " + "many words " * 12]},
        "retrieval": {"settings": {"sparsity": 0.5}, "summary": {}, "events": []},
        "channels": {
            "settings": {},
            "summary": {"recall": {"chosen": found.mean((0, 1)).tolist(), "random": [0.1, 0.2, 0.3]}},
            "events": [],
        },
        "sinks": {
            "settings": {},
            "summary": {
                "domains": [f"texts/{i}.txt" for i in range(domains)],
                "classes": ["active", "sink", "dormant"],
                "residual_of_token_0": {"times_the_median": 301.25, "layer": 2},
            },
            "events": [],
        },
    }
    texts = [{"data": f"texts/{i}.txt", "tokens": 7168, "sha256": "ab" * 32} for i in range(domains)]
    data = {"texts": texts, "lengths": [4096, 2048, 1024], "prompts": 24, "tokens": 57344, "seed": 0}
    return Calibration(tensors, facts({"name": "tiny", "family": "llama", "identity": {}}, described, told, data))


@pytest.fixture
def made_up():
    """`made_up(layers=4, heads=4, kv_heads=2, head_dim=16, refused=(1,), domains=2)` -> a calibration."""

    def call(layers=4, heads=4, kv_heads=2, head_dim=16, refused=(1,), domains=2):
        return make(layers, heads, kv_heads, head_dim, refused, domains)

    return call


@pytest.fixture
def stored(tmp_path):
    """`stored(calibration)` -> its folder."""

    def write(calibration, name="calibration"):
        return Journal(tmp_path / name, {}).close(calibration, {})

    return write
