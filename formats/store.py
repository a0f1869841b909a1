"""The output folder in the making: one shard per unit of work, a journal, and a rename at the very end."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .ledger import Ledger
from .manifest import FORMAT_VERSION, MANIFEST, TIMING, differences, read_manifest, sha256, verify_folder, write_down
from .partial import LOCK, check_out, clear, lock, partial_of, publish, sync, sync_folder
from .safefile import INDEX, Shards, read_header

__all__ = ["Ledger", "Store", "verify_folder"]

REPORT = "report.jsonl"
TIMED = ("seconds", "timing")  # keys of a record that differ between equal runs: they go to timing.jsonl

Record = dict[str, Any]


class Store:
    """Writes a checkpoint folder so that it is whole or absent, whenever the process dies.

    Work goes to `<out>.partial/`: the folder to be (`folder/`) and `journal.jsonl`, to which a line is added once a
    shard is safely on disk. `close` adds everything else, config.json last, and renames the folder to `out`. The same
    inputs give the same bytes, resumed or not; only `timing.jsonl` differs.
    """

    def __init__(self, out: Path, identity: dict[str, Any], units: list[str]):
        self.out, self.identity, self.units = out, identity, units
        self.partial = partial_of(out)
        self.folder, self.journal = self.partial / "folder", self.partial / "journal.jsonl"
        self.lines: dict[str, dict[str, Any]] = {}  # unit -> its line of the journal
        self.events: list[str] = []  # what resuming found, for the user
        self.lock: IO[Any] | None = None  # held while the work folder is this run's
        self.complete = False  # `out` is already what this run would make

    @classmethod
    def create(
        cls,
        out: Path | str,
        identity: dict[str, Any],
        units: list[str],
        *,
        resume: bool = False,
        overwrite: bool = False,
        needed_bytes: int = 0,
    ) -> Store:
        """Prepares `<out>.partial`. `identity` says what the result depends on; `needed_bytes` estimates its size.

        Raises ValueError when `out` or its work folder exists and neither `resume` nor `overwrite` covers it, when a
        resumed run differs (naming the differing keys); OSError when the disk is too small.
        """
        assert len(set(units)) == len(units), "units are not distinct"
        store = cls(Path(os.path.abspath(Path(out).expanduser())), _plain(identity), units)
        if resume and store._already_made():
            store.complete = True
            return store
        check_out(store.out, resume=resume, overwrite=overwrite)
        store._check_space(needed_bytes, resume)
        store.lock = lock(store.partial)
        if not (resume and store._resume()):
            store._start()
        return store

    def done(self, unit: str) -> bool:
        """Whether `unit` is safely on disk."""
        return self.complete or unit in self.lines

    def write(
        self, unit: str, tensors: dict[str, Tensor], records: list[Record], phases: dict[str, float] | None = None
    ) -> None:
        """Writes the tensors of `unit` as one shard, then notes it and its report lines in the journal; `phases` are
        the seconds that each part of the work took before.

        Raises ValueError for a unit unknown or done, or a name another unit has; OSError, with the way to go on, when
        the disk is full.
        """
        if unit not in self.units or self.done(unit):
            raise ValueError(f"{self.out}: {unit!r} is not a unit that remains to be written")
        taken = {name for line in self.lines.values() for name in line["tensors"]}
        if twice := sorted(taken & tensors.keys()):
            raise ValueError(f"{self.out}: {twice[0]} is written twice, the second time by {unit}")
        line: dict[str, Any] = {"unit": unit, "file": None, "tensors": sorted(tensors), "records": _plain(records)}
        if phases:
            line["phases"] = {phase: round(seconds, 3) for phase, seconds in phases.items()}
        if tensors:
            name = f"model-{self.units.index(unit) + 1:05d}-of-{len(self.units):05d}.safetensors"
            line |= {"file": name, **self._write_shard(name, tensors)}
        with self._resumable(unit, 0):
            self._append(line)
        self.lines[unit] = line

    def read(self, unit: str) -> dict[str, Tensor]:
        """The tensors of a unit that is done."""
        shards = self.shards([unit])
        return {name: shards.read(name) for name in shards.extents}

    def shards(self, units: Iterable[str]) -> Shards:
        """What the units that are done have on disk, tensor by tensor."""
        files = [line["file"] for line in map(self.lines.__getitem__, units) if line["file"]]
        headers = {file: read_header(self.folder / file) for file in files}
        return Shards(
            folder=self.folder,
            files=tuple(sorted(headers)),
            extents={name: extent for header in headers.values() for name, extent in header.items()},
            weight_map={name: file for file, header in headers.items() for name in header},
        )

    def keep(self, name: str, text: str) -> None:
        """Writes a text into the work folder, whole or not at all, where it is while the run is `unfinished`."""
        path, work = self.partial / name, self.partial / f"{name}.tmp"
        with self._resumable(name, len(text), work):
            work.write_text(text, encoding="utf-8")
            sync(work)
            work.replace(path)
            sync_folder(self.partial)

    def records(self) -> Iterator[Record]:
        """The report so far, in the order of the units, timing included."""
        for unit in self.units:
            yield from self.lines[unit]["records"] if unit in self.lines else ()

    def close(
        self,
        config: dict[str, Any],
        side_files: Iterable[Path] = (),
        texts: dict[str, str | bytes] | None = None,
        expected: set[str] | None = None,
        fingerprint: Any = None,
        root: Path | None = None,
    ) -> Path:
        """Adds everything that is not a shard, makes the folder appear as `out`, and returns `out`.

        `side_files` keep their name, or their place below `root`. `expected` are the tensors that must be there, no
        more and no fewer. Raises ValueError when a unit or a tensor is missing, or a file would be written twice.
        """
        if self.complete:
            return self.out
        if missing := [unit for unit in self.units if unit not in self.lines]:
            raise ValueError(f"{self.out}: not finished: {missing[0]} and {len(missing) - 1} other units are missing")
        weight_map = {name: line["file"] for line in self.lines.values() for name in line["tensors"]}
        if expected is not None and (odd := sorted(expected ^ weight_map.keys())):
            raise ValueError(f"{self.out}: {len(odd)} tensors are missing or unexpected, the first is {odd[0]}")
        every = {name: _bytes(text) for name, text in {**self._texts(config, weight_map), **(texts or {})}.items()}
        for path in side_files:
            name = path.relative_to(root).as_posix() if root is not None else path.name
            assert name not in every, f"{name} is both a side file and written by acc"
            every[name] = path.read_bytes()
        with self._resumable("the closing files", sum(map(len, every.values()))):
            last = {"config.json": every.pop("config.json")}  # only with it does the folder pass for a model
            for name, raw in every.items():
                self._put(name, raw)
            manifest = write_down(self.folder, last, self.identity, _plain(fingerprint))
            self._put(MANIFEST, _bytes(_pretty(manifest)))
            self._put("config.json", last["config.json"])
            publish(self.folder, self.out, self.lock)
        return self.out

    def _texts(self, config: dict[str, Any], weight_map: dict[str, str]) -> dict[str, str | bytes]:
        timing, report = [], []
        for unit in self.units:
            for record in self.lines[unit]["records"]:
                report.append({key: value for key, value in record.items() if key not in TIMED})
                timed = {key: record[key] for key in TIMED if key in record}
                if timed:
                    timing.append({"unit": unit, **{k: record[k] for k in ("name", "tensor") if k in record}, **timed})
            if "phases" in self.lines[unit]:
                timing.append({"unit": unit, "phases": self.lines[unit]["phases"]})
        index = {
            "metadata": {"total_size": sum(line.get("bytes", 0) for line in self.lines.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        return {
            "config.json": _pretty(config),
            INDEX: _pretty(index),
            REPORT: "".join(f"{_line(record)}\n" for record in report),
            TIMING: "".join(f"{_line(record)}\n" for record in timing),
        }

    def _write_shard(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        whole, seen = {}, set()
        for key, tensor in sorted(tensors.items()):
            tensor = tensor.detach().cpu().contiguous()
            storage = tensor.untyped_storage().data_ptr()
            whole[key] = tensor.clone() if storage in seen else tensor  # the file format knows no shared memory
            seen.add(storage)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
        path, work = self.folder / name, self.folder / f"{name}.tmp"
        with self._resumable(name, nbytes, work):
            work.touch()
            mode = work.stat().st_mode  # as the user's umask has it; the library would write 0600
            try:
                save_file(whole, work, metadata={"format": "pt"})
            except SafetensorError as error:
                full = "os error 28" in str(error) or "No space left" in str(error)
                raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from None
            work.chmod(mode & 0o777)
            sync(work)
            work.replace(path)
            sync_folder(self.folder)
        return {"sha256": sha256(path), "size": path.stat().st_size, "bytes": nbytes}

    def _put(self, name: str, raw: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw)
        sync(path)

    def _append(self, line: dict[str, Any]) -> None:
        """Adds a line to the journal; what does not fit is cut off again, so that the next line starts clean."""
        raw = _line(line).encode() + b"\n"
        with self.journal.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                if file.write(raw) != len(raw):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.journal, start)
                raise

    @contextlib.contextmanager
    def _resumable(self, what: str, nbytes: int, work: Path | None = None) -> Iterator[None]:
        """A full disk inside leaves no half-written file and one line that says how to go on."""
        try:
            yield
        except OSError as error:
            if work is not None:
                work.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(self.partial).free
            raise OSError(
                f"disk full while writing {what} to {self.partial} ({_size(nbytes)} needed, {_size(free)} free); "
                f"make room and run the same command with --resume"
            ) from None

    def _already_made(self) -> bool:
        """A run that was killed after its rename has nothing left to do."""
        manifest = read_manifest(self.out)
        if manifest is None or manifest.get("identity") != self.identity:
            return False
        shutil.rmtree(self.partial, ignore_errors=True)
        return True

    @staticmethod
    def check(out: Path | str, *, resume: bool = False, overwrite: bool = False) -> None:
        """Raises what `create` would raise about what is there already, before any work is done; touches nothing."""
        folder = Path(os.path.abspath(Path(out).expanduser()))
        if not (resume and read_manifest(folder) is not None):
            check_out(folder, resume=resume, overwrite=overwrite)

    @staticmethod
    def unfinished(out: Path | str) -> dict[str, Any] | None:
        """The identity of the run that left a work folder for `out` behind; None where there is none. Errors as in
        `create`."""
        lines = Store(Path(os.path.abspath(Path(out).expanduser())), {}, [])._read_journal()
        return lines[0]["identity"] if lines else None

    def _check_space(self, needed: int, resume: bool) -> None:
        have = sum(path.stat().st_size for path in self.folder.glob("*.safetensors")) if resume else 0
        home = self.out.parent
        while not home.exists():
            home = home.parent
        free = shutil.disk_usage(home).free
        if needed - have > free:
            raise OSError(f"{home}: {self.out.name} needs about {_size(needed - have)}, {_size(free)} are free")

    def _start(self) -> None:
        clear(self.partial, keep={LOCK})
        with self._resumable("the journal", 0):
            self.folder.mkdir()
            self._append({"version": FORMAT_VERSION, "identity": self.identity, "units": self.units})
        sync_folder(self.partial)
        sync_folder(self.partial.parent)

    def _resume(self) -> bool:
        """Keeps the shards of an earlier run that are as its journal says; False when it did not get so far."""
        lines = self._read_journal()
        if not lines:
            return False
        then = {key: lines[0].get(key) for key in ("version", "identity", "units")}
        now = {"version": FORMAT_VERSION, "identity": self.identity, "units": self.units}
        if changed := differences(then["identity"], self.identity) or differences(then, now):
            raise ValueError(
                f"{self.partial}: cannot resume, this run differs from the one that was started: {'; '.join(changed)}; "
                f"undo the change, or start anew with --overwrite"
            )
        self.folder.mkdir(exist_ok=True)
        for line in lines[1:]:
            path = self.folder / line["file"] if line["file"] else None
            if path is None or (path.is_file() and sha256(path) == line["sha256"]):
                self.lines[line["unit"]] = line
            else:
                self.lines.pop(line["unit"], None)
                self.events.append(f"{line['file']} is not as the journal says: {line['unit']} is done again")
        clear(self.folder, keep={line["file"] for line in self.lines.values()})
        self.keep(self.journal.name, "".join(f"{_line(line)}\n" for line in [lines[0], *self.lines.values()]))
        return True

    def _read_journal(self) -> list[dict[str, Any]]:
        """The journal's lines; an unfinished last one, from a process that died while writing it, is dropped."""
        if not self.journal.exists():
            return []
        *whole, torn = self.journal.read_bytes().split(b"\n")
        if torn:
            self.events.append("the journal's last line was torn off and is dropped")
        lines = []
        for number, raw in enumerate(whole, 1):
            try:
                lines.append(json.loads(raw))
            except ValueError:
                raise ValueError(f"{self.journal}: line {number} is damaged; start anew with --overwrite") from None
        return lines


def _plain(value: Any) -> Any:
    """What JSON makes of a value, so that a run and its resumed twin hold equal objects; NaN and Inf become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8") if isinstance(text, str) else text


def _size(nbytes: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 2**power:
            return f"{nbytes / 2**power:.1f} {unit}"
    return f"{nbytes} bytes"
