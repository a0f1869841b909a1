"""acc export: a packed folder, or a calibration, in another form."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from .base import Json

if TYPE_CHECKING:
    from .ui import Screen


class ExportCommand(typer.core.TyperCommand):
    """What the runtime that a calibration is written for wants to know are options too; `context.obj` has them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from .base import parsed

        own = {name for parameter in self.params for name in parameter.opts} | set(ctx.help_option_names)
        rest, ctx.obj = [], {}
        words = iter(args)
        for word in words:
            name, equals, value = word.partition("=")
            if not name.startswith("--") or name == "--" or name in own:
                rest.append(word)
                continue
            value = value if equals else next(words, "--")
            if value.startswith("--"):
                raise ValueError(f"{name} needs a value, or is no option of acc export")
            ctx.obj[name] = parsed(value)
        return super().parse_args(ctx, rest)


COMMAND = ExportCommand


def export(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(help="a packed model, of acc or GPTQ, or a calibration", show_default=False)],
    out: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
    to: Annotated[
        str, typer.Option(help="dense, an engine's format, or a runtime's: see acc show", show_default=False)
    ],
    dense_rest: Annotated[bool, typer.Option("--dense-rest", help="unpack what the format cannot hold")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output folder")] = False,
    as_json: Json = False,
) -> None:
    """Write a packed model, or a calibration, for other engines.

    Numbers of a model are repacked, never quantised anew, and a weight that the format cannot hold is an error. A
    calibration is written as the runtime's own files; its settings, e.g. --sparsity 0.5 or --length 32768, are options.
    """
    from ..formats.engine import engine, engines
    from ..formats.engine import export as write
    from ..formats.runtime import runtimes
    from ..formats.source import open_source
    from .base import calibration_at
    from .ui import Screen, size

    calibrated = calibration_at(folder) is not None
    _check_target(to, calibrated, list(engines()), list(runtimes()))
    if calibrated:
        if dense_rest:
            raise ValueError("--dense-rest is of packed models, and this is a calibration")
        _export_calibration(Screen(as_json), Path(folder), out, to, context.obj, overwrite)
        return
    if context.obj:
        raise ValueError(f"{next(iter(context.obj))}: no option of acc export for a packed model, see --help")
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


def _check_target(to: str, calibrated: bool, engines: list[str], runtimes: list[str]) -> None:
    """Raises ValueError for a form that there is not, or that such a folder cannot take."""
    models = ["dense", *engines]
    spelled = to.replace("_", "-")
    if spelled not in models + runtimes:
        here = runtimes if calibrated else models
        near = difflib.get_close_matches(spelled, models + runtimes, n=3) or here
        raise ValueError(f"--to {to}: there is {', '.join(near)}")
    if calibrated and spelled in models:
        raise ValueError(f"--to {to} is for packed models; a calibration can be written for {', '.join(runtimes)}")
    if not calibrated and spelled in runtimes:
        raise ValueError(f"--to {to} is for calibrations; a model can be written as {', '.join(models)}")


def _export_calibration(
    screen: Screen, folder: Path, out: Path, to: str, given: dict[str, Any], overwrite: bool
) -> None:
    """Writes the files of another runtime. Raises ValueError for a setting that it does not have, and before anything
    of another making would be replaced."""
    from ..formats.calibration import Calibration
    from ..formats.runtime import runtime

    writer = runtime(to)
    options = {name.lstrip("-").replace("-", "_"): value for name, value in given.items()}
    if odd := [name for name in given if name.lstrip("-").replace("-", "_") not in writer.options]:
        known = ", ".join(f"--{one.replace('_', '-')}" for one in writer.options) or "no options"
        raise ValueError(f"{odd[0]}: {to} has no such option; it has {known}")
    files, notes = writer.write(Calibration.load(folder), options)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: exists and is no folder; choose another name or move it away")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    if there and not overwrite:
        raise ValueError(f"{out}: exists; choose another name, or replace it with --overwrite")
    if strange := sorted(there - files.keys()):
        raise ValueError(f"{out}: has {strange[0]}, which is no file of {to}; choose another name or move it away")
    out.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        work = out / f"{name}.tmp"
        work.write_bytes(raw)
        work.replace(out / name)
    screen.line(f"{out}: {', '.join(files)}")
    for note in notes:
        screen.field("", f"note: {note}")
    screen.next(f"acc calibrate MODEL --from {to} {out}")
    screen.result(
        {"folder": str(out), "format": to, "files": {n: len(raw) for n, raw in files.items()}, "notes": notes}
    )


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
