"""What a calibration learned, on disk: one safetensors file, and a JSON file that says of which model, and from what.

A calibration's folder has `calibration.safetensors` (tensors named `pass.tensor`), `calibration.json`, a manifest, and
whatever pictures and pages were made of it. While it is being made, `<out>.partial` has one file per layer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .manifest import MANIFEST, differences, libraries, write_down
from .partial import LOCK, check_out, clear, lock, partial_of, publish, sync_folder
from .safefile import Shards, confined, read_header, read_json

TENSORS, FACTS = "calibration.safetensors", "calibration.json"
VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """The tensors of every pass, by `pass.tensor`, and the facts of `calibration.json`:

    `model` (name, family, identity), `layers` (a list: heads, kv_heads, head_dim, refused), `passes` (settings,
    summary, events of each), `data`, `libraries`.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def of(self, name: str) -> dict[str, Tensor]:
        """The tensors of one pass; none where it was not run."""
        return {key.partition(".")[2]: t for key, t in self.tensors.items() if key.partition(".")[0] == name}

    @property
    def passes(self) -> list[str]:
        return list(self.facts["passes"])

    @classmethod
    def load(cls, folder: Path | str) -> Calibration:
        """Reads a finished folder. Raises ValueError when it is none, is damaged, or is of another version."""
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise ValueError(f"{folder}: no {FACTS} there; make a calibration with: acc calibrate MODEL {folder}")
        facts = read_json(confined(folder, FACTS))
        if facts.get("format") != "acc-calibration" or facts.get("version") != VERSION:
            raise ValueError(f"{folder}: {FACTS} is of version {facts.get('version')}, this acc reads {VERSION}")
        _check_facts(folder, facts)
        extents = read_header(confined(folder, TENSORS))
        shards = Shards(folder, (TENSORS,), extents, dict.fromkeys(extents, TENSORS))
        tensors = {name: shards.read(name) for name in sorted(extents)}
        if list(tensors) != facts.get("tensors"):
            odd = sorted(set(tensors) ^ set(facts.get("tensors") or ()))[:1]
            raise ValueError(f"{folder}: {TENSORS} and {FACTS} do not agree on {odd}")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{folder}: {name} holds values that are not finite")
        return cls(tensors, facts)

    def texts(self) -> dict[str, bytes]:
        """The two files."""
        facts = self.facts | {"format": "acc-calibration", "version": VERSION, "tensors": sorted(self.tensors)}
        whole = {name: self.tensors[name].detach().cpu().contiguous().clone() for name in sorted(self.tensors)}
        return {TENSORS: save(whole, {"format": "pt"}), FACTS: (json.dumps(facts, indent=1) + "\n").encode()}


class Journal:
    """The folder in the making: a file per layer, then everything at once under the name that was asked for."""

    def __init__(self, out: Path, identity: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False):
        """Raises ValueError when `out` or its work folder is there and neither `resume` nor `overwrite` covers it, or
        when a resumed run differs, naming the differing keys."""
        self.out, self.identity = out, json.loads(json.dumps(identity))
        self.partial, self.folder = partial_of(out), partial_of(out) / "folder"
        check_out(out, resume=resume, overwrite=overwrite)
        self.lock = lock(self.partial)
        told = self.partial / "identity.json"
        if resume and told.exists():
            if keys := differences(read_json(told), self.identity):
                raise ValueError(f"{self.partial}: cannot go on, the run differs: {'; '.join(keys[:3])}")
        else:
            clear(self.partial, keep={LOCK})
            self._put(told, json.dumps(self.identity, indent=1).encode())

    def done(self, layer: int) -> bool:
        return self._file(layer).exists()

    def write(self, layer: int, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keeps what the passes found in a layer: `{pass: {name: tensor}}`."""
        flat = {f"{one}.{k}": t.detach().cpu().contiguous().clone() for one, of in found.items() for k, t in of.items()}
        self._put(self._file(layer), save(flat))

    def read(self, layer: int) -> dict[str, dict[str, Tensor]]:
        path = self._file(layer)
        extents = read_header(path)
        shards = Shards(path.parent, (path.name,), extents, dict.fromkeys(extents, path.name))
        found: dict[str, dict[str, Tensor]] = {}
        for name in extents:
            one, _, key = name.partition(".")
            found.setdefault(one, {})[key] = shards.read(name)
        return found

    def close(self, calibration: Calibration, papers: Mapping[str, bytes]) -> Path:
        """Writes everything and makes it appear as `out`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, raw in {**calibration.texts(), **papers}.items():
            self._put(self.folder / name, raw)
        manifest = write_down(self.folder, {}, self.identity, None)
        self._put(self.folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        publish(self.folder, self.out, self.lock)
        return self.out

    def _file(self, layer: int) -> Path:
        return self.partial / f"layer-{layer:05d}.safetensors"

    @staticmethod
    def _put(path: Path, raw: bytes) -> None:
        work = path.with_name(path.name + ".tmp")
        try:
            with work.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            work.unlink(missing_ok=True)
            raise OSError(f"{path}: {error.strerror}; make room and run the same command with --resume") from None
        work.replace(path)
        sync_folder(path.parent)


def _check_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises ValueError where `calibration.json` lacks what everything that reads it goes by."""
    for key, kind in (("model", dict), ("layers", list), ("passes", dict), ("tensors", list)):
        if not isinstance(facts.get(key), kind):
            raise ValueError(f"{folder}: {FACTS} has no {key}; it is damaged, make it again")
    for index, layer in enumerate(facts["layers"]):
        if not isinstance(layer, dict) or not {"heads", "kv_heads", "head_dim", "refused"} <= layer.keys():
            raise ValueError(f"{folder}: {FACTS} does not say what layer {index} has; it is damaged, make it again")


def facts(model: Mapping[str, Any], layers: list[Any], passes: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """What `calibration.json` says."""
    described = [
        {"heads": x.heads, "kv_heads": x.kv_heads, "head_dim": x.head_dim, "refused": x.refused} for x in layers
    ]
    return {"model": dict(model), "layers": described, "passes": dict(passes), "data": data, "libraries": libraries()}
