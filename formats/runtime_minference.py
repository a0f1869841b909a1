"""MInference's best-pattern file: for each layer an object from query head to [kind, vertical, slash, score]."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .calibration import Calibration
from .model import AttentionLayer
from .patterns import BLOCKS, DENSE, STREAMING, VERTICAL_SLASH, budget_at
from .runtime import Brought, Runtime
from .safefile import JSON_LIMIT

FILE = "best_pattern.json"
NAMES = {"stream_llm": STREAMING, "vertical_and_slash": VERTICAL_SLASH, "block_sparse": BLOCKS}
ABSENT = ["vertical_and_slash", 1000, 6096, 1]  # what its runtime gives a head that a file does not name
SEARCHED = 30000  # tokens of the prompt that its files' budgets were found with
LEAST_SLASH = 100  # diagonals that its runtime always takes: with a smaller budget it may drop the nearest
TOP_BLOCKS = 100  # blocks of 64 keys that its block-sparse heads read, whatever a file says
Entry = tuple[int, int, int, float]  # kind, vertical, slash, score


class Minference(Runtime):
    """One kind and two numbers of tokens per query head, found at one length and used at all.

    Budgets are written for prompts of `length` tokens, by default the longest that was calibrated. Block-sparse heads
    have no budget of their own there, and dense heads no name: they become columns and diagonals without a gap."""

    options: ClassVar[Mapping[str, str]] = {"length": "tokens of the prompts that budgets are written for"}

    @classmethod
    def write(cls, calibration: Calibration, options: Mapping[str, Any]) -> tuple[dict[str, bytes], list[str]]:
        of = calibration.of("heads")
        if not of:
            raise ValueError("the calibration has no heads pass; make one with: acc calibrate MODEL heads")
        lengths = of["length"]
        tokens = options.get("length", int(lengths[-1]))
        if not isinstance(tokens, int):
            raise ValueError(f"length: give a number of tokens, not {tokens!r}")
        if tokens < LEAST_SLASH:
            raise ValueError(f"length {tokens}: a prompt of fewer than {LEAST_SLASH} tokens has no pattern")
        budgets = budget_at(lengths, of["budget"], tokens).tolist()
        scores = of["recall"] if "recall" in of else torch.ones_like(of["budget"][..., 0])
        nearest = int((lengths.double().log2() - math.log2(tokens)).abs().argmin())
        document, counted = [], Counter()
        for layer, described in enumerate(calibration.facts["layers"]):
            entries = {}
            for head in range(described["heads"]):
                refused = described["refused"] is not None
                kind = DENSE if refused else int(of["kind"][layer, head])
                budget = [0, 0] if refused else budgets[layer][head]
                score = 1.0 if kind == DENSE else float(scores[layer, head, nearest])
                entries[str(head)] = [*_entry(kind, budget, tokens), score]
                counted[kind] += 1
            document.append(entries)
        return {FILE: (json.dumps(document, indent=2) + "\n").encode()}, _told_writing(counted, tokens)

    @classmethod
    def read(cls, path: Path, layers: list[AttentionLayer], *, length: int = SEARCHED) -> Brought:
        """Budgets become shares of `length` tokens."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        document = _document(path)
        if len(document) != len(layers):
            raise ValueError(f"{path}: has {len(document)} layers, the model {len(layers)}")
        heads = max(layer.heads for layer in layers if layer.refused is None)
        kind = torch.zeros(len(layers), heads, dtype=torch.uint8)
        budget = torch.ones(len(layers), heads, 1, 2)
        notes: Counter[str] = Counter()
        found = []
        for layer, entries in zip(layers, document, strict=True):
            listed = _layer(path, layer, entries, notes)
            if layer.refused is not None:
                notes["heads of layers that acc leaves alone are not taken over"] += len(listed)
                continue
            found += [entry[:3] for entry in listed]
            for head, (one, vertical, slash, _) in enumerate(listed):
                if one == VERTICAL_SLASH and vertical + slash >= length:
                    continue
                kind[layer.index, head] = one
                both = [TOP_BLOCKS * 64, 0] if one == BLOCKS else [vertical, slash]
                budget[layer.index, head, 0] = (torch.tensor(both) / length).clamp(max=1.0)
        told = [f"{count} heads: {what}" for what, count in notes.items()]
        if len(found) > 1 and len(set(found)) == 1:
            told.append("all heads have one pattern: the file was written by hand, not found by a search")
        tensors: dict[str, Tensor] = {
            "heads.kind": kind,
            "heads.length": torch.tensor([length], dtype=torch.int32),
            "heads.budget": budget,
        }
        return Brought(tensors, {"heads": {"settings": {"from": "minference", "length": length}}}, told)


def _entry(kind: int, budget: list[int], tokens: int) -> list[Any]:
    """kind, vertical and slash as the runtime wants them for a prompt of so many tokens."""
    first, second = budget
    if kind == STREAMING:
        return ["stream_llm", first, second]
    if kind == VERTICAL_SLASH:
        return ["vertical_and_slash", first, max(second, LEAST_SLASH)]
    if kind == BLOCKS:
        return ["block_sparse", first, 0]
    return ["vertical_and_slash", tokens, tokens]


def _told_writing(counted: Mapping[int, int], tokens: int) -> list[str]:
    notes = [f"budgets are those for prompts of {tokens} tokens; its runtime uses the same at every length"]
    if counted[DENSE]:
        notes.append(f"{counted[DENSE]} dense heads are written as all columns and diagonals up to {tokens} tokens")
    if counted[VERTICAL_SLASH]:
        notes.append("acc chooses diagonals as whole bands of 64; its runtime chooses them one by one, and reads more")
    if counted[BLOCKS]:
        notes.append(f"{counted[BLOCKS]} block-sparse heads: its runtime reads {TOP_BLOCKS} blocks, not their budget")
    return notes


def _document(path: Path) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; a folder must have {FILE}")
    if path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for a file of patterns")
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(document, list):
        raise ValueError(f"{path}: holds no list of layers; MInference's files are one")
    return document


def _layer(path: Path, layer: AttentionLayer, entries: Any, notes: Counter[str]) -> list[Entry]:
    """The entries of all heads of a layer. Raises ValueError, naming layer and head, for what is no entry."""
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: layer {layer.index} is no object from head to pattern")
    names = {str(head) for head in range(layer.heads)}
    if odd := sorted(entries.keys() - names):
        raise ValueError(f"{path}: layer {layer.index} has a head {odd[0]}; the model's are 0 to {layer.heads - 1}")
    if absent := len(names - entries.keys()):
        notes["not in the file; they get what its runtime would give them"] += absent
    return [
        _pattern(f"{path}: layer {layer.index}, head {head}", entries.get(str(head), ABSENT), notes)
        for head in range(layer.heads)
    ]


def _pattern(where: str, entry: Any, notes: Counter[str]) -> Entry:
    if not isinstance(entry, list) or len(entry) != 4:
        raise ValueError(f"{where}: {entry!r} is not [kind, vertical, slash, score]")
    name, vertical, slash, score = entry
    sound = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    if name == "" or not sound:
        notes["an empty kind or a score that is no number: its search had too few rows; left dense"] += 1
        return DENSE, 0, 0, 1.0
    if name not in NAMES:
        raise ValueError(f"{where}: kind {name!r}; its files have {', '.join(NAMES)}")
    if any(not isinstance(x, int) or isinstance(x, bool) or x < 0 for x in (vertical, slash)):
        raise ValueError(f"{where}: budgets {vertical!r} and {slash!r} are not numbers of tokens")
    if name == "vertical_and_slash" and slash < LEAST_SLASH:
        notes[f"fewer than {LEAST_SLASH} diagonals, of which its runtime may drop the nearest; acc keeps those"] += 1
    return NAMES[name], vertical, slash, float(score)
