"""What a finished folder says of itself, and whether it is still true."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from .safefile import is_plain, read_json

MANIFEST, TIMING = "manifest.json", "timing.jsonl"
FORMAT_VERSION = 1
LIBRARIES = ("acc-toolkit", "torch", "transformers", "safetensors", "numpy")


def write_down(folder: Path, last: dict[str, bytes], identity: dict[str, Any], fingerprint: Any) -> dict[str, Any]:
    """The manifest of `folder`: size and sha256 of every file, and of those in `last` that are yet to be written."""
    files = {name: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for name, raw in last.items()}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (MANIFEST, TIMING, *last):
            files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return {
        "made_by": "acc",
        "version": FORMAT_VERSION,
        "libraries": libraries(),
        "identity": identity,
        "fingerprint": fingerprint,
        "files": dict(sorted(files.items())),
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that acc made; None for any other folder."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    return manifest if manifest.get("made_by") == "acc" else None


def verify_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Compares a finished folder with its manifest -> (problems, warnings); README.md may be edited: a warning."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder}: no {MANIFEST}: not a finished folder of acc"], []
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return [f"{MANIFEST}: no list of files"], []
    problems, warnings = [], []
    for name, entry in sorted(files.items()):
        path = folder / name
        if not all(is_plain(part) for part in name.split("/")):
            problems.append(f"{MANIFEST}: {name!r} is not a name inside the folder")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry.get("size"):
            problems.append(f"{name}: has {path.stat().st_size} bytes, had {entry.get('size')}")
        elif sha256(path) != entry.get("sha256"):
            problems.append(f"{name}: its content has changed (sha256)")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    problems += [f"{name}: not in the manifest" for name in sorted(there - files.keys() - {MANIFEST, TIMING})]
    edited = [problem for problem in problems if problem.startswith("README.md:")]
    warnings += edited
    return [problem for problem in problems if problem not in edited], warnings


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`dotted.key: old -> new` for every leaf in which two JSON-simple values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted(old.keys() | new.keys()):
            found += differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        return found
    return [] if old == new else [f"{key}: {_short(old)} -> {_short(new)}"]


def libraries() -> dict[str, str]:
    """Versions of what decides the bytes of a result."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
