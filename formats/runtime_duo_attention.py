"""DuoAttention's folder: full_attention_heads.tsv and config.json, as its loader, LServe's and kvpress' read them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .calibration import Calibration
from .model import AttentionLayer
from .runtime import Brought, Runtime
from .safefile import read_json
from .streaming import ranks, streams

GATES, CONFIG = "full_attention_heads.tsv", "config.json"
SINK, RECENT = 64, 256  # what its evaluation scripts keep
TRAINED = 128  # first tokens that its published gates were trained with
SPARSITY = 0.5


class DuoAttention(Runtime):
    """One gate per layer and KV head, a line per layer, cells between tabs; beside it how many tokens a streaming head
    keeps. The share of streaming heads is chosen where the files are used."""

    options: ClassVar[Mapping[str, str]] = {
        "sparsity": "share of the heads that stream, of which config.json speaks",
        "sink": "first tokens that a streaming head keeps",
        "recent": "latest tokens that a streaming head keeps",
    }

    @classmethod
    def write(cls, calibration: Calibration, options: Mapping[str, Any]) -> tuple[dict[str, bytes], list[str]]:
        of = calibration.of("retrieval")
        if not of:
            raise ValueError("the calibration has no retrieval pass; make one with: acc calibrate MODEL retrieval")
        settings = {**calibration.facts["passes"]["retrieval"]["settings"], **options}
        sparsity = settings.get("sparsity", SPARSITY)
        if not isinstance(sparsity, int | float):
            raise ValueError(f"sparsity: give a share of the KV heads, from 0 to 1, not {sparsity!r}")
        sparsity = float(sparsity)
        sizes = {"sink_size": _size(settings, "sink", SINK), "recent_size": _size(settings, "recent", RECENT)}
        gate = of["gate"].double()
        lines = ("\t".join(f"{value:.18e}" for value in row) for row in gate.tolist())
        files = {
            GATES: "".join(f"{line}\n" for line in lines).encode(),
            CONFIG: (json.dumps(sizes | {"sparsity": sparsity}, indent=1) + "\n").encode(),
        }
        return files, _told_writing(of, gate, sparsity)

    @classmethod
    def read(cls, path: Path, layers: list[AttentionLayer]) -> Brought:
        path = Path(path)
        table = path / GATES if path.is_dir() else path
        if not table.is_file():
            raise ValueError(f"{path}: no {GATES} there")
        raw = _table(table, layers)
        gate, notes = raw.clamp(0, 1), []
        if outside := int((raw != gate).sum()):
            notes.append(f"{outside} gates outside [0, 1] were clipped, as DuoAttention's loader does")
        config, told = _config(table.parent / CONFIG)
        notes += told
        sparsity = config["sparsity"]
        open_ = torch.tensor([layer.refused is None for layer in layers])
        if lost := int((gate[~open_] < 1).sum()):
            notes.append(f"{lost} gates of layers that stay as they are were left out")
        gate = gate.float()
        gate[~open_] = 1.0
        rank = ranks(gate, gate, open_)
        notes += _ties(gate, rank, raw, sparsity)

        def every(size: int) -> Tensor:
            return torch.where(open_[:, None], size, torch.zeros_like(rank)).int()

        tensors = {"gate": gate, "rank": rank, "sink": every(config["sink"]), "recent": every(config["recent"])}
        summary = {"heads": int((rank >= 0).sum()), "streaming": int(streams(rank, sparsity).sum())}
        about = {"settings": {**config, "from": "duo-attention"}, "summary": summary | {"sparsity": sparsity}}
        return Brought({f"retrieval.{name}": t for name, t in tensors.items()}, {"retrieval": about}, notes)


def _size(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: give a number of tokens, not {value!r}")
    return value


def _told_writing(of: Mapping[str, Tensor], gate: Tensor, sparsity: float) -> list[str]:
    """What the files cannot say."""
    notes = []
    rank = of["rank"]
    if (alone := (rank < 0).all(1)).any():
        notes.append(
            f"{int(alone.sum())} layers are left alone and have gate 1; DuoAttention's quantile counts their heads too"
        )
    wanted, taken = int(streams(rank, sparsity).sum()), _quantile_streams(gate, sparsity)
    if wanted != taken:
        notes.append(f"at sparsity {sparsity} DuoAttention's quantile makes {taken} heads stream, acc {wanted}")
    open_ = rank >= 0
    if any(of[name][open_].unique().numel() > 1 for name in ("sink", "recent")):
        notes.append("sizes per head are left out: DuoAttention has one for all, and the full ones were written")
    return notes


def _quantile_streams(gate: Tensor, sparsity: float) -> int:
    """How many heads stream by its rule: those below the quantile, interpolated linearly, of all gates."""
    if sparsity >= 1:
        return gate.numel()
    return 0 if sparsity <= 0 else int((gate < gate.flatten().quantile(sparsity)).sum())


def _table(path: Path, layers: list[AttentionLayer]) -> Tensor:
    """Gates fp64 `[L, Hkv]`. Raises ValueError naming layer and head."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: holds no table of numbers") from None
    rows = [line.split("\t") for line in lines if line.strip()]
    if len(rows) != len(layers):
        raise ValueError(f"{path}: has {len(rows)} layers, the model {len(layers)}; is it of another model?")
    heads = max(layer.kv_heads for layer in layers)
    for index, row in enumerate(rows):
        if len(row) != heads:
            raise ValueError(f"{path}: layer {index} has {len(row)} KV heads, the model's {heads}")
    gates = [[_number(path, i, h, cell) for h, cell in enumerate(row)] for i, row in enumerate(rows)]
    return torch.tensor(gates, dtype=torch.float64)


def _number(path: Path, layer: int, head: int, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: layer {layer}, KV head {head}: {cell.strip()[:20]!r} is no gate")
    return value


def _config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What config.json says, in acc's names, and what is odd about it."""
    if not path.is_file():
        told = f"no {CONFIG} beside the gates: {SINK} first and {RECENT} latest tokens are taken for a streaming head"
        return {"sink": SINK, "recent": RECENT, "sparsity": SPARSITY}, [told]
    said = read_json(path)
    notes = []
    found: dict[str, Any] = {}
    for name, key in (("sink", "sink_size"), ("recent", "recent_size")):
        if key not in said:
            raise ValueError(f"{path}: lacks {key}")
        value = said[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {key} is {value!r}, not a number of tokens")
        found[name] = value
    if found["sink"] == TRAINED:
        notes.append(f"the gates were trained with {TRAINED} first tokens; DuoAttention's own scripts run with {SINK}")
    sparsity = said.get("sparsity")
    if not isinstance(sparsity, int | float) or isinstance(sparsity, bool) or not 0 <= sparsity <= 1:
        sparsity = SPARSITY
    return found | {"sparsity": float(sparsity)}, notes


def _ties(gate: Tensor, rank: Tensor, raw: Tensor, sparsity: float) -> list[str]:
    """Whether heads on either side of the choice have the same gate."""
    count = int(streams(rank, sparsity).sum())
    order = gate[rank >= 0][rank[rank >= 0].long().argsort()]
    if not 0 < count < len(order) or order[count - 1] != order[count]:
        return []
    equal = int((order == order[count]).sum())
    grid = ", of gates kept in bf16" if torch.equal(raw, raw.bfloat16().double()) else ""
    return [
        f"{equal} heads share the gate at which {count} stream{grid}: DuoAttention chooses by noise, acc takes"
        " the earlier ones"
    ]
