"""The folder in the making, `<out>.partial`: who may write there, and how it becomes `out`, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import IO, Any

from .manifest import read_manifest

try:
    import fcntl
except ImportError:  # not a POSIX system: there two runs on one folder are not told apart
    fcntl = None

LOCK = "lock"


def partial_of(out: Path) -> Path:
    """Where what is to be `out` is made."""
    return out.with_name(out.name + ".partial")


def check_out(out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raises ValueError when `out` or its work folder is there and neither `resume` nor `overwrite` covers it."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        if not out.is_dir() or read_manifest(out) is None:
            raise ValueError(f"{out}: exists and was not made by acc; choose another name or move it away")
        if not overwrite:
            raise ValueError(f"{out}: exists; choose another name, or replace it with --overwrite")
    if partial_of(out).exists() and not (resume or overwrite):
        raise ValueError(
            f"{partial_of(out)}: an unfinished run; continue it with --resume, or start anew with --overwrite"
        )


def lock(partial: Path) -> IO[Any]:
    """Makes the work folder this process' own: one run at a time; the lock goes with the process, however it ends.

    Raises ValueError when another process has it."""
    partial.mkdir(parents=True, exist_ok=True)
    held = (partial / LOCK).open("wb")
    if fcntl is not None:
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held.close()
            raise ValueError(f"{partial}: another run is writing there; wait for it or end it") from None
    return held


def publish(folder: Path, out: Path, held: IO[Any] | None) -> None:
    """`folder`, which is inside the work folder, becomes `out`; what is overwritten is moved aside first and removed
    last, with the work folder."""
    partial = partial_of(out)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(inner)
    sync_folder(folder)
    if out.exists():
        old = partial / "old"
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    folder.rename(out)
    sync_folder(out.parent)
    if held is not None:
        held.close()
    shutil.rmtree(partial)


def clear(folder: Path, keep: set[str | None]) -> None:
    """Removes what is in a folder, but for the names to keep."""
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync(path: Path) -> None:
    """What a file holds is on the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """The same of the names in a folder."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
