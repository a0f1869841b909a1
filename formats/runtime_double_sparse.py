"""Double Sparsity's channel file: a JSON of channel orders, as its evaluation scripts and SGLang read them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .calibration import Calibration
from .model import AttentionLayer
from .runtime import Brought, Runtime
from .safefile import read_json

KEY = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.self_attn\.(k|q|qk)_proj")
KINDS = ("k", "qk", "q")  # in the order in which they are preferred: k has a list per KV head
SIGNATURE = 0.9  # of the first channels that lists of different heads share: they are one list
LAYOUTS = ("hf", "interleaved")


class DoubleSparse(Runtime):
    """Per layer three kinds of lists, each list an order of all channels with the best one first.

    `k_proj` has a list per KV head, which is the calibrated order, and is what runtimes with grouped queries can use.
    `qk_proj` and `q_proj` have a list per query head: the first by the mean of |q · k|, which is what the official
    script means to compute, the second the order of the KV head that it reads. Channels are numbered as Hugging Face
    does, where c turns with c + D/2; the option `layout=interleaved` numbers them for kernels in which neighbours turn
    together.
    """

    options: ClassVar[Mapping[str, str]] = {"layout": "hf or interleaved"}

    @classmethod
    def write(cls, calibration: Calibration, options: Mapping[str, Any]) -> tuple[dict[str, bytes], list[str]]:
        of = calibration.of("channels")
        if not of:
            raise ValueError("the calibration has no channels pass; make one with: acc calibrate MODEL channels")
        layout = options.get("layout", "hf")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: there is no {layout!r}; there is {' and '.join(LAYOUTS)}")
        layers = calibration.facts["layers"]
        lists: dict[str, list[list[int]]] = {}
        for index, layer in enumerate(layers):
            if layer["refused"] is None:
                for kind, order in _orders(of, index, layer["heads"]).items():
                    order = interleaved(order.shape[-1])[order] if layout == "interleaved" else order
                    lists[f"model.layers.{index}.self_attn.{kind}_proj"] = order.tolist()
        name = re.sub(r"[^\w.-]+", "-", str(calibration.facts["model"]["name"]).rpartition("/")[2]) or "channels"
        return {f"{name}.json": json.dumps(lists).encode()}, _told_writing(of, layers, layout)

    @classmethod
    def read(cls, path: Path, layers: list[AttentionLayer]) -> Brought:
        file = _file(Path(path))
        lists, notes = _lists(file, layers)
        open_ = [layer for layer in layers if layer.refused is None]
        kv_heads, head_dim = open_[0].kv_heads, open_[0].head_dim
        order = torch.arange(head_dim).repeat(len(layers), kv_heads, 1)
        dense = torch.ones(len(layers), dtype=torch.bool)
        used: dict[str, list[int]] = {}
        for layer in open_:
            if kinds := lists.get(layer.index):
                kind = _preferred(kinds)
                used.setdefault(kind, []).append(layer.index)
                order[layer.index] = merged(kinds[kind], kv_heads)
                dense[layer.index] = False
        if not used:
            raise ValueError(f"{file}: has no channels for any layer that can be made sparse; is it of another model?")
        notes += _told_reading(lists, layers, dense, used)
        importance = torch.zeros(order.shape).scatter_(2, order, torch.linspace(1, 0, head_dim).expand(order.shape))
        importance[dense] = 0
        tensors = {"order": order.short(), "importance": importance, "dense": dense}
        about = {
            "settings": {"from": "double-sparse"},
            "summary": {"layers_by_kind": {kind: len(of) for kind, of in used.items()}, "dense": int(dense.sum())},
        }
        return Brought({f"channels.{name}": t for name, t in tensors.items()}, {"channels": about}, notes)


def interleaved(head_dim: int) -> Tensor:
    """Where channel c of Hugging Face's layout stands when channels that turn together are neighbours: int64 `[D]`, a
    permutation."""
    channel = torch.arange(head_dim)
    return 2 * channel % head_dim + 2 * channel // head_dim


def merged(order: Tensor, kv_heads: int) -> Tensor:
    """One order per KV head int64 `[Hkv, D]` from those of all query heads int64 `[H, D]`: by the mean rank that a
    channel has among the heads of its group; of equal ones the lower number first."""
    rank = order.argsort(-1).unflatten(0, (kv_heads, -1)).double().mean(1)
    return rank.argsort(dim=-1, stable=True)


def agreement(order: Tensor) -> float:
    """Mean share of the first eighth of channels that lists of two different heads have in common, `order [H, D]`."""
    heads, head_dim = order.shape
    first = max(head_dim // 8, 1)
    member = torch.zeros(heads, head_dim, dtype=torch.float64).scatter_(1, order[:, :first], 1.0)
    common = member @ member.T / first
    return float((common.sum() - common.trace()) / (heads * (heads - 1)))


def _orders(of: Mapping[str, Tensor], layer: int, heads: int) -> dict[str, Tensor]:
    """Channels of one layer by kind."""
    order = of["order"][layer].long()
    repeated = order.repeat_interleave(heads // len(order), 0)
    product = of.get("product")
    official = repeated if product is None else product[layer].argsort(dim=-1, descending=True, stable=True)
    return {"q": repeated, "k": order, "qk": official}


def _told_writing(of: Mapping[str, Tensor], layers: list[Mapping[str, Any]], layout: str) -> list[str]:
    """What the file cannot say."""
    notes = []
    if any(layer["heads"] != layer["kv_heads"] for layer in layers):
        notes.append(
            "query heads share keys: use k_proj (SGLang: --ds-heavy-channel-type k), which has a list per KV head"
        )
    if left := [i for i, layer in enumerate(layers) if layer["refused"] is not None]:
        notes.append(f"layers {_numbers(left)} are left alone and not in the file; SGLang expects every layer")
    dense = [i for i, layer in enumerate(layers) if layer["refused"] is None and of["dense"][i]]
    if dense:
        notes.append(f"layers {_numbers(dense)} are to stay dense, which the file cannot say: tell the runtime")
    if "scale4" in of:
        notes.append("label scales are left out: the file has no place for them")
    if layout == "interleaved":
        notes.append("channels are numbered for kernels in which neighbours turn together; SGLang expects layout=hf")
    return notes


def _file(path: Path) -> Path:
    """The JSON that `path` means: itself, with its suffix left out, or the only one in a folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        named = path.with_name(path.name + ".json")
        if named.is_file():
            return named
        raise ValueError(f"{path}: no such file")
    found = sorted(path.glob("*.json"))
    if len(found) != 1:
        raise ValueError(f"{path}: has {len(found)} JSON files; name the one with the channels")
    return found[0]


def _lists(path: Path, layers: list[AttentionLayer]) -> tuple[dict[int, dict[str, Tensor]], list[str]]:
    """Orders int64 `[rows, D]` by layer and kind, and notes. Raises ValueError naming layer and head."""
    found: dict[int, dict[str, Tensor]] = {}
    others, closed = set(), set()
    for key, rows in read_json(path).items():
        match = KEY.fullmatch(key)
        if match is None:
            others.add(key.rpartition(".")[2])
            continue
        index, kind = int(match[1]), match[2]
        if index >= len(layers):
            raise ValueError(f"{path}: has a layer {index}, the model {len(layers)} layers; is it of another model?")
        if layers[index].refused is not None:
            closed.add(index)
            continue
        found.setdefault(index, {})[kind] = _order(f"{path}: layer {index}, {kind}_proj", rows, layers[index])
    notes = [f"left out, of no use here: lists for {', '.join(sorted(others)[:4])}"] if others else []
    if closed:
        notes.append(f"left out, the model's own attention stays there: layers {_numbers(sorted(closed))}")
    return found, notes


def _order(where: str, rows: Any, layer: AttentionLayer) -> Tensor:
    if not isinstance(rows, list) or len(rows) not in (layer.heads, layer.kv_heads):
        count = len(rows) if isinstance(rows, list) else "no"
        raise ValueError(
            f"{where}: {count} lists, the model has {layer.heads} query heads on {layer.kv_heads} KV heads"
        )
    channels = list(range(layer.head_dim))
    for head, row in enumerate(rows):
        whole = isinstance(row, list) and all(type(c) is int for c in row)
        if not whole or sorted(row) != channels:
            raise ValueError(f"{where}, head {head}: not an order of the {layer.head_dim} channels")
    return torch.tensor(rows)


def _preferred(kinds: Mapping[str, Tensor]) -> str:
    """The kind that is used: the first of `KINDS` that is there, but qk not before q where it mixes heads."""
    there = [kind for kind in KINDS if kind in kinds]
    if there == ["qk", "q"] and _mixes(kinds["qk"]):
        return "q"
    return there[0]


def _mixes(order: Tensor) -> bool:
    return len(order) > 1 and agreement(order) > SIGNATURE


def _told_reading(
    lists: Mapping[int, Mapping[str, Tensor]],
    layers: list[AttentionLayer],
    dense: Tensor,
    used: Mapping[str, list[int]],
) -> list[str]:
    """What is odd about the file, and what it does not say."""
    notes = []
    for kind in KINDS:
        mixed = [index for index, kinds in sorted(lists.items()) if kind in kinds and _mixes(kinds[kind])]
        if mixed:
            notes.append(
                f"{kind}_proj of layers {_numbers(mixed)}: lists of different heads agree, as the official script makes"
                " them by mixing heads; calibrate anew, or use another kind"
            )
    grouped = [i for kind, of in used.items() for i in of if len(lists[i][kind]) != layers[i].kv_heads]
    if grouped:
        notes.append("lists of query heads were merged to one per KV head by the mean rank of each channel")
    missing = [layer.index for layer in layers if layer.refused is None and dense[layer.index]]
    if missing:
        notes.append(f"layers {_numbers(missing)} are not in the file and stay dense")
    notes.append("the file has no label scales and names no dense layers (the official runtime keeps 0 and 1 dense)")
    return notes


def _numbers(found: list[int]) -> str:
    """Numbers as text, those in a row as a span."""
    spans: list[list[int]] = []
    for number in found:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
