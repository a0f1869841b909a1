"""What the project promises as a whole: a quick start, no torch before its time, a registry that is the directory."""

from __future__ import annotations

import ast
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import table
from acc.registry import ENTRY_BASES, listing, lookup

ROOT = Path(__file__).parents[1]
HELP = "import sys; sys.argv = ['acc', '--help']\nfrom acc.cli.main import main\n"
CHECK = """
try: main()
except SystemExit: pass
print('LOADED', [m for m in ('torch', 'transformers') if m in sys.modules])
"""


def test_help_is_quick_and_imports_no_torch():
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", HELP + CHECK], capture_output=True, text=True, cwd="/")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: whatever else runs beside it
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "LOADED []" in done.stdout, done.stderr
    assert "quantize" in done.stdout
    assert all(len(line) <= 95 for line in done.stdout.splitlines())
    assert min(seconds) < 0.4


def test_importing_acc_imports_nothing_heavy():
    script = "import sys, acc; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("folder", ENTRY_BASES)
def test_the_directory_is_the_registry(folder):
    for name, line in listing(folder).items():
        assert line.endswith("."), f"{folder}/{name}.py: its docstring's first line is what lists it"
        assert lookup(folder, name).__module__ == f"acc.{folder}.{name}"
    with pytest.raises(ValueError, match="there is no 'nothing'"):
        lookup(folder, "nothing")


def test_constraints_pin_every_dependency():
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    pinned = {name.lower().replace("_", "-") for name in pinned}
    wanted = re.findall(r'^  "([\w-]+)', (ROOT / "pyproject.toml").read_text(), re.M)
    assert {name.lower().replace("_", "-") for name in wanted if not name.startswith("acc")} <= pinned
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()


def test_no_code_is_loaded_from_data():
    """No pickle, no eval, no torch.load, and nothing that swallows every exception, in any file of the package."""
    files = [
        path
        for folder in ("kernels", "formats", "calibrate", "compress", "cli")
        for path in (ROOT / folder).glob("*.py")
    ]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load"), f"{path}:{node.lineno}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not {"pickle", "dill", "marshal"} & set(names), f"{path}:{node.lineno}"
            elif isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type is not None else "BaseException"
                undone = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
                assert caught not in ("Exception", "BaseException") or undone, f"{path}:{node.lineno}"


def test_the_readme_says_what_was_measured(tmp_path):
    """Its tables of the family are those that tests/bench/table.py makes of the results, as are those beside them."""
    results = ROOT / "tests" / "bench" / "results" / "family-smollm2.json"
    found = json.loads(results.read_text(encoding="utf-8"))
    rows = table.rows_of(found)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.cells(rows) in readme
    assert table.others(rows) in readme
    assert table.whole(found, rows) == results.with_suffix(".md").read_text(encoding="utf-8")
    for path in results.parent.glob("ablation-*.json"):
        measured = json.loads(path.read_text(encoding="utf-8"))
        assert table.ablation(measured) == path.with_suffix(".md").read_text(encoding="utf-8")
        assert path.stem != "ablation-smollm2" or table.choices(measured, table.SPQR, False) in readme
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    table.picture(found, rows, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
