"""acc export: a packed folder in another form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from .base import Json

SHARD = 5 * 10**9  # bytes; what hubs like best


def export(
    folder: Annotated[str, typer.Argument(help="a folder that acc wrote", show_default=False)],
    out: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
    to: Annotated[str, typer.Option(help="dense", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output folder")] = False,
    as_json: Json = False,
) -> None:
    """Write a packed model as a plain checkpoint that needs no acc."""
    from ..formats.source import open_source
    from .ui import Screen, size

    if to not in EXPORTS:
        raise ValueError(f"--to {to}: there is {', '.join(EXPORTS)}")
    screen = Screen(as_json)
    source = open_source(folder)
    _check_out(out, source.folder, overwrite)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        total = EXPORTS[to](source, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    screen.line(f"{out}: {size(total)} of weights, loads in stock transformers")
    screen.next(f"acc eval {out} --base {folder} --data TEXT.txt")
    screen.result({"folder": str(out), "bytes": total, "format": to})


def _check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Raises ValueError when `out` must not be written, or replaced."""
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"{out}: choose a folder beside {source}, not the same one and none inside or around it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{out}: exists; choose another name, or replace it with --overwrite")
    if not (out / "config.json").is_file():
        raise ValueError(f"{out}: exists and is no model's folder; choose another name or move it away")


def to_dense(source: Any, folder: Path) -> int:
    """Every tensor dequantised to the model's own type, in shards; returns the bytes of all tensors."""
    import math

    from safetensors.torch import save_file

    sizes = {n: math.prod(source.info(n).shape) * source.info(n).dtype.itemsize for n in source.names()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, nbytes in sizes.items():
        if shards[-1] and used + nbytes > SHARD:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: source.tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in source.side_files():
        target = folder / path.relative_to(source.folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return sum(sizes.values())


EXPORTS = {"dense": to_dense}
