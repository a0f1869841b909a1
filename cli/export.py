"""acc export: a packed folder in another form."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from .base import Json


def export(
    folder: Annotated[str, typer.Argument(help="a packed model, of acc or GPTQ", show_default=False)],
    out: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
    to: Annotated[str, typer.Option(help="dense, or an engine's format: see acc show", show_default=False)],
    dense_rest: Annotated[bool, typer.Option("--dense-rest", help="unpack what the format cannot hold")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output folder")] = False,
    as_json: Json = False,
) -> None:
    """Write a packed model for other engines, or as a dense one.

    Numbers are repacked, never quantised anew; a weight that the format cannot hold is an error.
    """
    from ..formats.engine import engine
    from ..formats.engine import export as write
    from ..formats.source import open_source
    from .ui import Screen, size

    if to != "dense":
        engine(to)
    screen = Screen(as_json)
    source = open_source(folder)
    _check_out(out, source.folder, overwrite)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        made = write(source, partial, to, dense_rest=dense_rest)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    screen.line(f"{out}: {size(made.nbytes)} of weights")
    for note in made.notes:
        screen.field("", f"note: {note}")
    for name, reason in list(made.dense.items())[:3]:
        screen.field("dense", f"{name}: {reason}")
    if len(made.dense) > 3:
        screen.field("", f"and {len(made.dense) - 3} more")
    if to == "dense" or engine(to).readable is not None:
        screen.next(f"acc eval {out} --base {folder} --data TEXT.txt")
    screen.result({"folder": str(out), "bytes": made.nbytes, "format": to, "dense": made.dense, "notes": made.notes})


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
