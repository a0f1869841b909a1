"""The output folder: whole or absent, the same bytes whatever happened on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from acc.formats import store as store_module
from acc.formats.manifest import differences
from acc.formats.source import open_source
from acc.formats.store import Ledger, Store, verify_folder
from safetensors import SafetensorError
from safetensors.torch import load_file

IDENTITY = {"recipe": {"bits": 3, "ignore": ["lm_head"]}, "source": {"revision": None}, "data": {"sha256": "ab"}}
UNITS = ["outer", "block 0", "block 1"]
CONFIG = {"model_type": "llama", "dtype": "float32"}


def content(unit: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(UNITS.index(unit))
    return {f"{unit}.{name}".replace(" ", "."): torch.randn(5, 3, generator=generator) for name in "ba"}


CONTENT = {unit: content(unit) for unit in UNITS}  # made before any fork


SIDE: list[Path] = []  # the folder that the side files come from


@pytest.fixture(scope="module", autouse=True)
def _side(tmp_path_factory):
    folder = tmp_path_factory.mktemp("side")
    (folder / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "additional_chat_templates/rag.jinja"):
        (folder / name).write_bytes(b"\xff{}\r\n")
    SIDE[:] = [folder]


def records(unit: str) -> list[dict[str, Any]]:
    return [{"tensor": name, "error": 0.1, "seconds": float(os.getpid())} for name in CONTENT[unit]]


def run(out: Path, **options: Any) -> Store:
    """A whole run, as the loop would do it; says what is already there and does the rest."""
    made = Store.create(out, IDENTITY, UNITS, **options)
    for unit in UNITS:
        if not made.done(unit):
            made.write(unit, CONTENT[unit], records(unit))
    made.close(
        CONFIG,
        [SIDE[0] / "tokenizer.json", SIDE[0] / "additional_chat_templates" / "rag.jinja"],
        {"recipe.yaml": "bits: 3\n", "README.md": "# card\n"},
        expected={name for unit in UNITS for name in CONTENT[unit]},
        fingerprint={"logits": [1.5, -2.25]},
        root=SIDE[0],
    )
    return made


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Everything that must not differ between equal runs."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "timing.jsonl"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """A killed process loses nothing that it gave to the kernel, so only the test of the order needs a real fsync."""
    if "synced" not in request.fixturenames:
        monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def synced(monkeypatch) -> list[tuple[str, str]]:
    """What happens on disk: `("fsync" or "rename" or "append", name)`, in order."""
    seen: list[tuple[str, str]] = []
    real_sync, real_replace, real_rename, real_append = os.fsync, Path.replace, Path.rename, Store._append

    def sync(handle: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        real_sync(handle)

    def append(self: Store, line: dict) -> None:
        seen.append(("append", str(line.get("unit", "start"))))
        real_append(self, line)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", lambda p, to: (seen.append(("rename", Path(to).name)), real_replace(p, to))[1])
    monkeypatch.setattr(Path, "rename", lambda p, to: (seen.append(("rename", Path(to).name)), real_rename(p, to))[1])
    monkeypatch.setattr(Store, "_append", append)
    return seen


@pytest.fixture
def reference(tmp_path) -> dict[str, bytes]:
    run(tmp_path / "reference" / "out")
    return bytes_of(tmp_path / "reference" / "out")


def in_child(work: Callable[[], Any]) -> int:
    """Runs `work` in a forked process and returns how it ended: 0, an exit code, or minus a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CHANGES = {"open", *(f"os.{call}" for call in ("rename", "remove", "mkdir", "rmdir", "truncate", "chmod"))}


def killed_at(step: int, work: Callable[[], Any]) -> int:
    """`work` in a child that is killed with SIGKILL at its `step`-th operation on the file system.

    Before every change of a file or folder, at every fsync, and with half a shard on disk.
    """

    def child() -> None:
        left = [step]

        def tick(event: Any = "", arguments: tuple = ()) -> None:
            if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            if event not in CHANGES and not isinstance(event, int):
                return
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        real_save = store_module.save_file

        def save(tensors: Any, path: Path, metadata: Any) -> None:
            real_save(tensors, path, metadata=metadata)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            tick(0)
            real_save(tensors, path, metadata=metadata)

        os.fsync, store_module.save_file = tick, save
        sys.addaudithook(tick)
        work()

    return in_child(child)


def test_what_is_written(tmp_path):
    out = tmp_path / "new" / "out"
    run(out)
    assert sorted(path.name for path in tmp_path.joinpath("new").iterdir()) == ["out"]
    assert not list(out.rglob("*journal*"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {}
    for name, file in index["weight_map"].items():
        stored[name] = load_file(out / file)[name]
    expected = {name: tensor for unit in UNITS for name, tensor in CONTENT[unit].items()}
    assert list(index["weight_map"]) == sorted(expected)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in expected.values())
    assert {"model-00001-of-00003.safetensors"} == {index["weight_map"][name] for name in CONTENT["outer"]}
    assert json.loads((out / "config.json").read_text()) == CONFIG
    for name in ("tokenizer.json", "additional_chat_templates/rag.jinja"):
        assert (out / name).read_bytes() == b"\xff{}\r\n"
    report = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert [line["tensor"] for line in report] == [name for unit in UNITS for name in CONTENT[unit]]
    assert all("seconds" not in line for line in report)
    timing = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in timing] == [float(os.getpid())] * 6
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["identity"] == IDENTITY
    assert manifest["fingerprint"] == {"logits": [1.5, -2.25]}
    assert set(manifest["files"]) == set(bytes_of(out)) - {"manifest.json"}
    assert verify_folder(out) == ([], [])
    assert open_source(out).names() == sorted(expected)
    readable = (out / "config.json").stat().st_mode
    assert all(path.stat().st_mode == readable for path in out.iterdir() if path.is_file())


def test_same_inputs_give_same_bytes(tmp_path, reference):
    run(tmp_path / "again" / "out")
    assert bytes_of(tmp_path / "again" / "out") == reference
    half = tmp_path / "half" / "out"
    made = Store.create(half, IDENTITY, UNITS)
    made.write("block 1", CONTENT["block 1"], records("block 1"))  # another order of writing
    run(half, resume=True)
    assert bytes_of(half) == reference


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_everything_is_synced_in_order(tmp_path, synced):
    """A power cut loses nothing that the journal names, and `out` never appears before its files are safe."""
    run(tmp_path / "out")
    position = {event: i for i, event in enumerate(synced)}
    for number, unit in enumerate(UNITS, 1):
        shard = f"model-{number:05d}-of-00003.safetensors"
        start = position["fsync", f"{shard}.tmp"]
        assert synced[start : start + 5] == [
            ("fsync", f"{shard}.tmp"),
            ("rename", shard),
            ("fsync", "folder"),
            ("append", unit),
            ("fsync", "journal.jsonl"),
        ]
    names = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file() and "model-" not in path.name]
    published = position["rename", "out"]
    assert all(position["fsync", name] < published for name in names)
    assert max(names, key=lambda name: position["fsync", name]) == "config.json"
    assert synced[published - 1 :] == [("fsync", "folder"), ("rename", "out"), ("fsync", tmp_path.name)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_then_resumed(tmp_path, reference):
    """The law of the journal: wherever a run dies, a resumed one ends in the same bytes; nothing half passes before."""
    for step in range(1000):
        home = tmp_path / str(step)
        home.mkdir()
        out = home / "out"
        ended = killed_at(step, lambda out=out: run(out))
        if out.exists():
            assert verify_folder(out) == ([], []), f"killed at step {step}"
        half = out.with_name("out.partial") / "folder"
        if (half / "config.json").exists():
            assert verify_folder(half) == ([], []) or not (half / "manifest.json").exists(), f"killed at step {step}"
        run(out, resume=True)
        assert bytes_of(out) == reference, f"killed at step {step}"
        assert not out.with_name("out.partial").exists()
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        shutil.rmtree(home)
    assert 50 < step < 999


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again(tmp_path, reference):
    out = tmp_path / "new" / "out"
    out.parent.mkdir()
    for step in range(5, 500, 5):
        if killed_at(step, lambda: run(out, resume=True)) == 0:
            break
    assert 20 < step < 495
    assert bytes_of(out) == reference


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_overwriting(tmp_path, reference):
    """The earlier result stands until the new one takes its place; between two renames it waits in the work folder."""
    out = tmp_path / "new" / "out"
    for step in range(0, 1000, 2):
        shutil.rmtree(out.parent, ignore_errors=True)
        old = Store.create(out, {"recipe": "old"}, ["only"])
        old.write("only", {"w": torch.zeros(2)}, [])
        old.close(CONFIG)
        ended = killed_at(step, lambda: run(out, overwrite=True))
        kept = out if out.exists() else out.with_name("out.partial") / "old"
        assert verify_folder(kept) == ([], [])
        run(out, resume=True, overwrite=True)
        assert bytes_of(out) == reference
        if ended == 0:
            break


def test_unfinished_folder_is_no_model(tmp_path):
    made = Store.create(tmp_path / "out", IDENTITY, UNITS)
    made.write("outer", CONTENT["outer"], [])
    for folder in (made.partial, made.folder):
        with pytest.raises(ValueError, match=r"no config.json"):
            open_source(folder)
    with pytest.raises(ValueError, match="block 0 and 1 other units"):
        made.close(CONFIG)


def test_torn_journal(tmp_path, reference):
    start = tmp_path / "start" / "out"
    made = Store.create(start, IDENTITY, UNITS)
    for unit in UNITS[:2]:
        made.write(unit, CONTENT[unit], records(unit))
    whole = made.journal.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == 10]
    for cut in (0, 5, ends[0] - 1, ends[0], ends[0] + 1, ends[1] - 1, ends[1], ends[1] + 20, ends[2] - 1):
        home = tmp_path / f"cut{cut}"
        shutil.copytree(start.parent, home)
        (home / "out.partial" / "journal.jsonl").write_bytes(whole[:cut])
        resumed = Store.create(home / "out", IDENTITY, UNITS, resume=True)
        assert [resumed.done(unit) for unit in UNITS] == [cut >= ends[1], cut >= ends[2], False]
        run(home / "out", resume=True)
        assert bytes_of(home / "out") == reference


def test_damaged_journal_is_not_guessed_at(tmp_path):
    made = Store.create(tmp_path / "out", IDENTITY, UNITS)
    made.write("outer", CONTENT["outer"], [])
    lines = made.journal.read_bytes().splitlines(keepends=True)
    made.journal.write_bytes(lines[0] + b"{\n" + lines[1])
    with pytest.raises(ValueError, match=r"line 2 is damaged.*--overwrite"):
        Store.create(tmp_path / "out", IDENTITY, UNITS, resume=True)
    run(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_shard_is_done_again(tmp_path, reference, damage):
    out = tmp_path / "new" / "out"
    made = Store.create(out, IDENTITY, UNITS)
    for unit in UNITS[:2]:
        made.write(unit, CONTENT[unit], records(unit))
    shard = made.folder / "model-00001-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(raw if damage == "flip" else raw[:-3])
    (made.folder / "model-00003-of-00003.safetensors.tmp").write_bytes(b"half")
    resumed = Store.create(out, IDENTITY, UNITS, resume=True)
    assert [resumed.done(unit) for unit in UNITS] == [False, True, False]
    assert len(resumed.events) == 1
    assert "outer is done again" in resumed.events[0]
    assert sorted(path.name for path in resumed.folder.iterdir()) == ["model-00002-of-00003.safetensors"]
    run(out, resume=True)
    assert bytes_of(out) == reference


def test_what_was_written_reads_back(tmp_path):
    made = Store.create(tmp_path / "out", IDENTITY, UNITS)
    made.write("outer", CONTENT["outer"], records("outer"))
    resumed = Store.create(tmp_path / "out", IDENTITY, UNITS, resume=True)
    for name, tensor in resumed.read("outer").items():
        assert torch.equal(tensor, CONTENT["outer"][name])
    assert list(resumed.records()) == list(made.records()) == records("outer")


@pytest.mark.parametrize(
    ("identity", "units", "message"),
    [
        ({**IDENTITY, "recipe": {"bits": 4, "ignore": ["lm_head"]}}, UNITS, r"recipe\.bits: 3 -> 4;"),
        ({**IDENTITY, "recipe": {"bits": 3, "ignore": []}}, UNITS, r'recipe\.ignore: \["lm_head"\] -> \[\]'),
        ({**IDENTITY, "source": {"revision": "abc"}}, UNITS, r'source\.revision: null -> "abc"'),
        ({**IDENTITY, "acc": "9"}, UNITS, r'acc: null -> "9"'),
        (IDENTITY, UNITS[:2], r"units: "),
    ],
)
def test_resume_with_something_changed(tmp_path, identity, units, message):
    made = Store.create(tmp_path / "out", IDENTITY, UNITS)
    made.write("outer", CONTENT["outer"], [])
    before = bytes_of(made.partial)
    with pytest.raises(ValueError, match=message) as caught:
        Store.create(tmp_path / "out", identity, units, resume=True)
    assert "\n" not in str(caught.value)
    assert bytes_of(made.partial) == before, "a refused resume changes nothing"


def test_differences_are_leaves():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    new = {"a": {"b": 2, "c": [1, 2]}, "d": 5, "f": True}
    assert differences(old, new) == ["a.b: 1 -> 2", 'd: {"e": 1} -> 5', "f: null -> true"]
    assert differences(old, old) == []


def test_unfinished_run_needs_a_word(tmp_path):
    Store.create(tmp_path / "out", IDENTITY, UNITS)
    with pytest.raises(ValueError, match=r"unfinished run; continue it with --resume"):
        Store.create(tmp_path / "out", IDENTITY, UNITS)
    run(tmp_path / "out", overwrite=True)


def test_out_that_exists(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for out in (foreign, tmp_path / "file"):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="was not made by acc"):
                Store.create(out, IDENTITY, UNITS, overwrite=overwrite)
    assert (foreign / "thesis.tex").exists()
    run(tmp_path / "empty")
    with pytest.raises(ValueError, match="--overwrite"):
        Store.create(tmp_path / "empty", IDENTITY, UNITS)
    (tmp_path / "empty" / "stale").write_text("x")
    run(tmp_path / "empty", overwrite=True)
    assert verify_folder(tmp_path / "empty") == ([], [])


def test_resuming_what_is_finished(tmp_path):
    run(tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    again = Store.create(tmp_path / "out", IDENTITY, UNITS, resume=True)
    assert again.complete
    assert all(again.done(unit) for unit in UNITS)
    assert again.close({}) == tmp_path / "out"
    assert bytes_of(tmp_path / "out") == before
    with pytest.raises(ValueError, match="exists"):
        Store.create(tmp_path / "out", {**IDENTITY, "acc": "9"}, UNITS, resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_runs_at_once(tmp_path):
    made = Store.create(tmp_path / "out", IDENTITY, UNITS)
    assert not made.complete

    def second() -> None:
        with pytest.raises(ValueError, match="another run"):
            Store.create(tmp_path / "out", IDENTITY, UNITS, resume=True)

    assert in_child(second) == 0


# Tensors.


def test_shared_and_strided_tensors(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"a": base, "b": base, "t": base.T, "row": base[1], "empty": torch.zeros(0, 3), "one": torch.tensor(3)}
    made = Store.create(tmp_path / "out", IDENTITY, ["only"])
    made.write("only", tensors, [])
    for name, tensor in made.read("only").items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype


def test_what_may_not_be_written(tmp_path):
    made = Store.create(tmp_path / "out", IDENTITY, UNITS)
    made.write("outer", {"w": torch.zeros(1)}, [])
    with pytest.raises(ValueError, match="not a unit that remains"):
        made.write("outer", {"v": torch.zeros(1)}, [])
    with pytest.raises(ValueError, match="not a unit that remains"):
        made.write("block 7", {"v": torch.zeros(1)}, [])
    with pytest.raises(ValueError, match="w is written twice"):
        made.write("block 0", {"w": torch.zeros(1)}, [])
    made.write("block 0", {}, [])
    made.write("block 1", {"v": torch.zeros(1)}, [])
    with pytest.raises(ValueError, match="2 tensors are missing or unexpected, the first is u"):
        made.close(CONFIG, expected={"u", "w"})
    made.close(CONFIG, expected={"v", "w"})
    assert not (tmp_path / "out" / "model-00002-of-00003.safetensors").exists()
    assert open_source(tmp_path / "out").names() == ["v", "w"]


def test_report_is_json_everywhere(tmp_path):
    made = Store.create(tmp_path / "out", IDENTITY, ["only"])
    made.write("only", {"w": torch.zeros(1)}, [{"error": float("nan"), "shape": (2, 3), "text": "ä\n"}])
    made.close(CONFIG)
    report = (tmp_path / "out" / "report.jsonl").read_text(encoding="utf-8")
    assert json.loads(report) == {"error": None, "shape": [2, 3], "text": "ä\n"}


# A disk that is too small.


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_disk_full_in_a_shard(tmp_path, reference, monkeypatch):
    out = tmp_path / "new" / "out"
    made = Store.create(out, IDENTITY, UNITS)
    made.write("outer", CONTENT["outer"], records("outer"))
    monkeypatch.setattr(store_module, "save_file", full_disk)
    with pytest.raises(OSError, match=r"disk full while writing model-00002.*120 bytes needed.*--resume") as caught:
        made.write("block 0", CONTENT["block 0"], [])
    assert "\n" not in str(caught.value)
    assert not made.done("block 0")
    assert [path.name for path in made.folder.iterdir()] == ["model-00001-of-00003.safetensors"]
    monkeypatch.undo()
    run(out, resume=True)
    assert bytes_of(out) == reference


@pytest.mark.parametrize("where", ["journal", "closing"])
def test_disk_full_elsewhere(tmp_path, reference, monkeypatch, where):
    out = tmp_path / "new" / "out"

    def no_room(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = Store.create(out, IDENTITY, UNITS)
    if where == "journal":
        monkeypatch.setattr(made, "_write_shard", lambda name, tensors: {"sha256": "", "size": 0, "bytes": 0})
        monkeypatch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError, match="disk full while writing outer"):
            made.write("outer", CONTENT["outer"], [])
        assert len(made.journal.read_bytes().splitlines()) == 1, "the line that did not fit is cut off"
    else:
        for unit in UNITS:
            made.write(unit, CONTENT[unit], records(unit))
        monkeypatch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError, match="disk full while writing the closing files"):
            made.close(CONFIG)
        with pytest.raises(ValueError, match=r"no config.json"):
            open_source(made.folder)
    assert not out.exists()
    monkeypatch.undo()
    run(out, resume=True)
    assert bytes_of(out) == reference


def test_disk_really_full(tmp_path, reference):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(44 * 1024))
        big = Store.create(disk / "big", IDENTITY, ["only"])
        with pytest.raises(OSError, match="disk full while writing model-0000"):
            big.write("only", {"w": torch.zeros(16, 1024)}, [])
        shutil.rmtree(disk / "big.partial")
        with pytest.raises(OSError, match=r"needs about 1.0 MiB, .* are free"):
            Store.create(disk / "out", IDENTITY, UNITS, needed_bytes=2**20)
        assert sorted(path.name for path in disk.iterdir()) == ["ballast"]
        with pytest.raises(OSError, match="disk full"):
            run(disk / "out")
        ballast.unlink()
        run(disk / "out", resume=True)
        assert bytes_of(disk / "out") == reference
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_too_little_space_is_said_first(tmp_path):
    with pytest.raises(OSError, match=r"out needs about 1048576\.0 GiB, .* are free"):
        Store.create(tmp_path / "out", IDENTITY, UNITS, needed_bytes=2**50)
    assert not list(tmp_path.iterdir())


# The ledger and the manifest.


def test_ledger():
    ledger = Ledger(["a", "b"], ["tokenizer.json"])
    ledger.fate("a", "packed", "spqr")
    ledger.fate("tokenizer.json", "copied")
    with pytest.raises(ValueError, match="1 have no fate: b"):
        ledger.settle()
    ledger.fate("b", "left_out", "never used")
    assert ledger.settle() == {
        "a": ("packed", "spqr"),
        "b": ("left_out", "never used"),
        "tokenizer.json": ("copied", ""),
    }
    ledger.fate("a", "copied")
    ledger.fate("z", "pruned")
    with pytest.raises(ValueError, match="1 have more than one: a; 1 are not in the source: z"):
        ledger.settle()


def test_verify_notices_every_change(tmp_path):
    out = tmp_path / "out"
    run(out)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name, before = path.relative_to(out).as_posix(), path.read_bytes()
        if name in ("manifest.json", "timing.jsonl"):
            continue
        flipped = bytes([before[0] ^ 1]) + before[1:]
        for after in (flipped, before[:-1], None):
            path.unlink()
            if after is not None:
                path.write_bytes(after)
            problems, warnings = verify_folder(out)
            found, other = (warnings, problems) if name == "README.md" else (problems, warnings)
            assert len(found) == 1
            assert found[0].startswith(f"{name}: ")
            assert other == []
            path.write_bytes(before)
    (out / "extra.bin").write_text("x")
    assert verify_folder(out) == (["extra.bin: not in the manifest"], [])
    assert verify_folder(tmp_path)[0]


def test_manifest_may_not_point_elsewhere(tmp_path):
    run(tmp_path / "out")
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"size": 1, "sha256": ""}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert verify_folder(tmp_path / "out")[0] == ["manifest.json: '../secret' is not a name inside the folder"]


def test_what_is_kept_is_there_for_who_goes_on_and_goes_with_the_work_folder(tmp_path):
    out = tmp_path / "out"
    assert Store.unfinished(out) is None
    begun = Store.create(out, IDENTITY, UNITS)
    begun.keep("found.json", "1\n")
    begun.keep("found.json", "2\n")
    begun.lock.close()
    assert Store.unfinished(out) == IDENTITY
    assert (begun.partial / "found.json").read_text() == "2\n"
    assert not list(begun.partial.glob("*.tmp"))
    run(out, resume=True)
    assert not begun.partial.exists()
    assert "found.json" not in bytes_of(out)
    assert Store.unfinished(out) is None
