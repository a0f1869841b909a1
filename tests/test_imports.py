"""The one-way order of the folders: kernels <- formats <- calibrate <- compress <- cli; entries stand alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["kernels", "formats", "calibrate", "compress", "cli"]
FILES = [path for folder in ORDER for path in sorted((ROOT / folder).glob("*.py"))]


def relative_imports(path: Path) -> list[tuple[str, str]]:
    """(folder, file) of every import of another file of the package, `""` for the root."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = node.module or ""
            if node.level == 1:
                found += [(path.parent.name, module or alias.name) for alias in node.names]
            else:
                folder, _, file = module.partition(".")
                found += [(folder if folder in ORDER else "", file or folder) for _ in node.names]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            absolute = [name for name in names if name.split(".")[0] in ("acc", *ORDER)]
            assert not absolute, f"{path}: {absolute}: use a relative import"
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_point_to_the_left(path):
    own = ORDER.index(path.parent.name)
    for folder, file in relative_imports(path):
        assert folder == "" or ORDER.index(folder) <= own, f"{path.name} imports {folder}/{file}"


def test_entries_do_not_import_their_siblings():
    from acc.registry import ENTRY_BASES, listing

    for folder in ENTRY_BASES:
        entries = listing(folder)
        assert entries
        for name in entries:
            siblings = {file for home, file in relative_imports(ROOT / folder / f"{name}.py") if home == folder}
            assert not siblings & entries.keys(), f"{folder}/{name}.py imports {siblings & entries.keys()}"


def test_only_three_files_know_the_internals_of_transformers():
    # attention.py: a cache that holds less than all keys is a layer class of transformers' own cache module
    allowed = {"formats/model.py", "formats/hf.py", "formats/attention.py"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                assert f"{path.parent.name}/{path.name}" in allowed, f"{path}: {node.module}"
