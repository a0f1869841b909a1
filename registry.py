"""The directory is the registry: an entry is a file whose one public class derives from the folder's base.

Adding a method, a format, a statistic or a pass is adding a file. Listing reads source text and imports nothing.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from functools import cache
from pathlib import Path
from typing import Any

ENTRY_BASES = {
    "formats": {"PackedWeight"},
    "calibrate": {"Statistic", "Pass"},
    "compress": {"Method", "Rewrite"},
}


@cache
def listing(folder: str, base: str | None = None) -> dict[str, str]:
    """Names of the entries of `folder` (one of `ENTRY_BASES`) with the first line of their module docstring; those that
    derive from `base` alone, where it is named."""
    found = {}
    for path in sorted((Path(__file__).parent / folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if _entry_class(tree, ENTRY_BASES[folder] if base is None else {base}):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def typed(folder: str, base: str, prefix: str) -> dict[str, str]:
    """`listing` of the files `<prefix><name>.py`, by their names as they are typed in a shell."""
    return {name.removeprefix(prefix).replace("_", "-"): line for name, line in listing(folder, base).items()}


def spelled(name: str) -> str:
    """An entry's name as its file has it: `-` stands for `_`, as in every option."""
    return str(name).replace("-", "_")


@cache
def lookup(folder: str, name: str, base: str | None = None) -> Any:
    """The one public class of `folder/name.py`, or of the file that `spelled` makes of the name; one that derives from
    `base` where it is named.

    Raises ValueError with the nearest names when there is no such entry."""
    entries, name = listing(folder, base), spelled(name)
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=3) or sorted(entries)
        raise ValueError(f"{folder}: there is no {name!r}; there is {', '.join(near)}")
    path = Path(__file__).parent / folder / f"{name}.py"
    bases = ENTRY_BASES[folder] if base is None else {base}
    class_name = _entry_class(ast.parse(path.read_text(encoding="utf-8")), bases)
    assert class_name is not None
    return getattr(importlib.import_module(f"{__package__}.{folder}.{name}"), class_name)


RECIPES = Path(__file__).parent / "recipes"


def recipes() -> dict[str, str]:
    """Names of the recipes that come with acc, and what each is for: the comment in the first line of its file."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        for path in sorted(RECIPES.glob("*.yaml"))
    }


def _entry_class(tree: ast.Module, bases: set[str]) -> str | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            names = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if names & bases:
                return node.name
    return None
