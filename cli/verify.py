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
    fingerprint that was taken when it was written. Exit code 3 when anything is wrong.
    """
    from ..formats.manifest import read_manifest, verify_folder
    from ..formats.source import open_source
    from .ui import Missed, Screen

    screen = Screen(as_json)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    problems, warnings = verify_folder(Path(folder))
    checks: dict[str, list[str]] = {"files": problems}
    if read_manifest(Path(folder)) is None:
        raise ValueError(problems[0])
    try:
        source = open_source(folder)
        checks["structure"] = []
    except ValueError as error:
        source, checks["structure"] = None, [str(error)]
    if source is not None:
        checks["values"] = _values(source)
        checks["fingerprint"] = _fingerprint(source, Path(folder))
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
