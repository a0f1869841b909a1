"""acc verify: is this artifact whole, and does it compute what it should?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .base import Json


def verify(
    folder: Annotated[str, typer.Argument(help="a folder that acc wrote", show_default=False)],
    as_json: Json = False,
) -> None:
    """Check hashes, shapes, values and what the model computes.

    Files against the manifest, tensors against their formats, then one short text through the model against the
    fingerprint that was taken when it was written; a calibration's tensors against what they mean. Exit code 3 when
    anything is wrong.
    """
    from ..formats.manifest import read_manifest, verify_folder
    from .base import calibration_at
    from .ui import Missed, Screen

    screen = Screen(as_json)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    problems, warnings = verify_folder(Path(folder))
    checks: dict[str, list[str]] = {"files": problems}
    if read_manifest(Path(folder)) is None:
        raise ValueError(problems[0])
    checks |= _calibration_checks(folder) if calibration_at(folder) is not None else _model_checks(folder)
    for name, found in checks.items():
        screen.line(f"{'fail' if found else 'ok':<6}{name}" + (f": {found[0]}" if found else ""))
        for problem in found[1:20]:
            screen.line(f"      {problem}")
    for warning in warnings:
        screen.line(f"note  {warning}")
    screen.result({"checks": checks, "warnings": warnings, "ok": not any(checks.values())})
    wrong = [name for name, found in checks.items() if found]
    if wrong:
        raise Missed(f"{folder}: {', '.join(wrong)} failed")


def _model_checks(folder: str) -> dict[str, list[str]]:
    from ..formats.source import open_source

    try:
        source = open_source(folder)
    except ValueError as error:
        return {"structure": [str(error)]}
    return {"structure": [], "values": _values(source), "fingerprint": _fingerprint(source, Path(folder))}


def _calibration_checks(folder: str) -> dict[str, list[str]]:
    from ..formats.calibration import Calibration

    try:
        calibration = Calibration.load(folder)
    except ValueError as error:
        return {"structure": [str(error)]}
    return {"structure": _shapes(calibration), "values": [] if _shapes(calibration) else _sense(calibration)}


# shapes of the tensors that runtimes go by: L layers, H query heads, K KV heads, D head_dim, N lengths, C counts
SHAPES = {
    "heads.kind": "LH",
    "heads.length": "N",
    "heads.budget": "LHN2",
    "retrieval.gate": "LK",
    "retrieval.rank": "LK",
    "retrieval.sink": "LK",
    "retrieval.recent": "LK",
    "channels.order": "LKD",
    "channels.importance": "LKD",
    "channels.scale8": "LKD",
    "channels.scale4": "LKD",
    "channels.dense": "L",
}


def _shapes(calibration: Any) -> list[str]:
    """Tensors that are not of the shape that the model's layers ask for."""
    layers = calibration.facts["layers"]
    sizes = {"L": len(layers), "2": 2}
    for letter, key in (("H", "heads"), ("K", "kv_heads"), ("D", "head_dim")):
        sizes[letter] = max((layer[key] for layer in layers if layer["refused"] is None), default=0)
    lengths = calibration.tensors.get("heads.length")
    sizes["N"] = 0 if lengths is None else lengths.numel()
    problems = []
    for name, letters in SHAPES.items():
        tensor = calibration.tensors.get(name)
        expected = [sizes[letter] for letter in letters]
        if tensor is not None and list(tensor.shape) != expected:
            problems.append(f"{name}: has shape {list(tensor.shape)}, not {expected}")
    return problems


def _sense(calibration: Any) -> list[str]:
    """Values that no pass gives: each rule with the tensors that break it."""
    import torch

    tensors = calibration.tensors
    opened = torch.tensor([layer["refused"] is None for layer in calibration.facts["layers"]])
    rules: dict[str, tuple[str, Any]] = {
        "heads.kind": ("is one of 0 to 3", lambda t: t <= 3),
        "heads.budget": ("is a share", lambda t: (t >= 0) & (t <= 1)),
        "heads.recall": ("is a share", lambda t: (t >= 0) & (t <= 1 + 1e-4)),
        "heads.length": ("is ascending", lambda t: t.diff() > 0),
        "retrieval.gate": ("is from 0 to 1", lambda t: (t >= 0) & (t <= 1)),
        "retrieval.sink": ("is not negative", lambda t: t >= 0),
        "retrieval.recent": ("is not negative", lambda t: t >= 0),
        "channels.scale8": ("is positive or 0", lambda t: t[opened] >= 0),
        "channels.scale4": ("is positive or 0", lambda t: t[opened] >= 0),
    }
    problems = [
        f"{name}: not every value {said}"
        for name, (said, rule) in rules.items()
        if name in tensors and not bool(rule(tensors[name]).all())
    ]
    if "retrieval.rank" in tensors:
        rank = tensors["retrieval.rank"].long()
        inside = rank[opened].flatten()
        if sorted(inside.tolist()) != list(range(inside.numel())) or not bool((rank[~opened] == -1).all()):
            problems.append("retrieval.rank: not each of the KV heads has its own rank, from 0 on, and others -1")
    if "channels.order" in tensors:
        order = tensors["channels.order"].long()[opened]
        wrong = (order.sort(-1).values != torch.arange(order.shape[-1])).any(-1).nonzero().tolist()
        numbers = opened.nonzero().flatten().tolist()
        problems += [
            f"channels.order: layer {numbers[layer]}, KV head {head}: not a permutation" for layer, head in wrong
        ]
    return problems


def _values(source: Any) -> list[str]:
    """Tensors that hold NaN, Inf or impossible codes."""
    from ..formats.source import finite

    problems = []
    for name in source.names():
        try:
            packed = source.packed(name)
            for part in packed if isinstance(packed, list) else [packed]:
                if part is None:
                    finite(source.tensor(name), name)
                else:
                    part.check()
        except ValueError as error:
            problems.append(f"{name}: {error}" if name not in str(error) else str(error))
    return problems


def _fingerprint(source: Any, folder: Path) -> list[str]:
    from ..calibrate.evaluate import fingerprint_of, same_fingerprint
    from ..formats.manifest import read_manifest

    manifest = read_manifest(folder)
    expected = manifest.get("fingerprint") if manifest is not None else None
    if not isinstance(expected, dict):
        return ["the manifest has no fingerprint"]
    try:
        difference = same_fingerprint(expected, fingerprint_of(source))
    except ValueError as error:
        difference = str(error)
    return [difference] if difference else []
