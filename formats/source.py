"""Where a model comes from: a hub id, a folder, a .gguf file or the bundled demo; read lazily, checked first."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Entry, PackedWeight, entries, has_planes
from .fetch import TEMPLATES, WEIGHT_SUFFIXES, fetch, unpack_gguf
from .safefile import Extent, Shards, confined, is_plain, open_shards, read_json

DEMO = Path(__file__).parents[1] / "recipes" / "demo"
OWN_FILES = {"recipe.yaml", "budget.json", "report.jsonl", "timing.jsonl", "manifest.json", "README.md", "config.json"}
OTHER_QUANTISERS = {"quantize_config.json", "hf_quant_config.json", "quant_config.json"}
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the model as a dense one; `nbytes` is what it takes on disk, companions included."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: str


def open_source(spec: str | Path, *, trust_remote_code: bool = False) -> Source:
    """The model that `spec` means: `demo`, a local folder, a .gguf file, or a hub id `org/name[@revision]`.

    A folder of that name wins over a hub id. Whatever is returned has passed all checks, so that its folder may be
    handed to transformers. Raises ValueError or OSError in one line that says what is wrong and what to do.
    """
    from .engine import imported  # which knows sources

    return imported(_open(str(spec), trust_remote_code))


def _open(text: str, trust_remote_code: bool) -> Source:
    path = Path(text).expanduser()
    if text == "demo":
        return Source(text, DEMO, kind="demo", trust_remote_code=trust_remote_code)
    if path.is_dir():
        return Source(text, path, kind="folder", trust_remote_code=trust_remote_code)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{text}: there is no such file")
        folder, digest = unpack_gguf(path)
        return Source(text, folder, kind="gguf", revision=digest)
    repo, _, revision = text.partition("@")
    if path.exists():
        raise ValueError(f"{text}: expected a model's folder, a .gguf file or a hub id, found a file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo.startswith((".", "/")):
        raise ValueError(f"{text}: there is no such folder, and it cannot be a hub id (org/name[@revision])")
    folder, commit = fetch(repo, revision or None, trust_remote_code)
    return Source(text, folder, kind="hub", revision=commit, trust_remote_code=trust_remote_code)


class Source:
    """A model's configuration, tensors and side files, as they lie in a local folder.

    `names()`, `info`, `tensor` speak of the dense model; in a folder that acc packed, `tensor` dequantises and `packed`
    gives the packed form. `raw_names()` and `raw` are exactly what is on disk.
    """

    def __init__(
        self, spec: str, folder: Path, *, kind: str, revision: str | None = None, trust_remote_code: bool = False
    ):
        self.spec, self.folder, self.kind, self.revision = spec, folder, kind, revision
        self.trust_remote_code = trust_remote_code
        if not (folder / "config.json").exists():
            raise ValueError(f"{spec}: no config.json in {folder}; a model's folder has one beside its weights")
        self.config: dict[str, Any] = read_json(confined(folder, "config.json"))
        self.changes: dict[str, Any] = {}  # in which `config` differs from the file: see Rewritten
        self.remarks: dict[str, list[dict[str, Any]]] = {}
        self.notes: list[str] = []
        self.foreign: str | None = None  # who packed it, if not acc
        table = _quantization(spec, self.config)
        if table is not None and table.get("quant_method") != "acc":
            self.foreign, table = table["quant_method"], None
        self.quantized = table is not None
        self.shards: Shards = open_shards(folder)
        self.entries: dict[str, Entry] = entries(table) if table is not None else {}
        self.planes: int | None = None  # how many planes are read of weights that have more, see `read_planes`
        self._owner = _companions(self.shards, self.entries)
        for name, extent in self.shards.extents.items():
            if name not in self._owner and extent.dtype.itemsize == 1 and extent.dtype.is_floating_point:
                raise ValueError(
                    f"{spec}: {name} is stored as {extent.dtype}; acc starts from 16 or 32-bit weights: name those"
                )

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the config calls the model's type; where it is silent, the commonest float type of the weights."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            name = config.get("dtype") or config.get("torch_dtype")
            found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
            if found in FLOATS:
                return found
        kinds = Counter(e.dtype for n, e in self.shards.extents.items() if n not in self._owner and e.dtype in FLOATS)
        return kinds.most_common(1)[0][0] if kinds else torch.float32

    def names(self) -> list[str]:
        """The dense model's tensors, layer 2 before layer 10."""
        owner = self._owner
        return sorted((n for n in self.shards.extents if owner.get(n, n) == n), key=natural)

    def info(self, name: str) -> TensorInfo:
        """Shape, type and bytes of a tensor of `names()`. Raises ValueError for any other name."""
        extent = self._extent(name)
        entry = self.entries.get(name)
        file = self.shards.weight_map[name]
        if entry is None:
            return TensorInfo(extent.shape, extent.dtype, extent.nbytes, file)
        nbytes = sum(self.shards.extents[name + suffix].nbytes for suffix in entry.layout())
        if self.planes is not None and (first := entry.first_planes(self.planes)) is not entry:
            sizes = first.layout().values()
            nbytes = sum(math.prod(n or 0 for n in size) * dtype.itemsize for size, dtype in sizes)
        return TensorInfo(entry.dense_shape, self.dtype, nbytes, file)

    def read_planes(self, planes: int) -> None:
        """From now on weights of bit planes are but their first `planes`. Raises ValueError where none has as many."""
        has_planes(self.entries.values(), planes)
        self.planes = planes

    def tensor(self, name: str) -> Tensor:
        """A dense tensor in memory of its own; a packed one is dequantised to the config's type."""
        packed = self.packed(name)
        if packed is None:
            return self.shards.read(name)
        return self.entries[name].dense(packed if isinstance(packed, list) else [packed], self.dtype)

    def packed(self, name: str) -> PackedWeight | list[PackedWeight] | None:
        """The packed form of a tensor: a list where one name stands for a stack of matrices, None where it is dense."""
        self._extent(name)
        entry = self.entries.get(name)
        if entry is None:
            return None
        try:
            parts = entry.unpack({suffix: self.shards.read(name + suffix) for suffix in entry.layout()})
        except ValueError as error:
            raise ValueError(f"{self.spec}: {name}: {error}") from None
        if self.planes is not None and entry.cls.planes:
            parts = [part.first_planes(self.planes) for part in parts]
        return parts[0] if entry.stack is None else parts

    def raw_names(self) -> list[str]:
        """Every tensor on disk."""
        return sorted(self.shards.extents, key=natural)

    def raw(self, name: str) -> Tensor:
        """A tensor as it is on disk."""
        if name not in self.shards.extents:
            raise ValueError(f"{self.spec}: there is no tensor {name}")
        return self.shards.read(name)

    def side_files(self) -> list[Path]:
        """Files to be copied byte for byte: tokenizer, chat templates, generation and processor settings, licence."""
        return [self.folder / name for name, reason in self._files().items() if reason is None]

    def left_out(self) -> dict[str, str]:
        """`{name: reason}` of everything else in the folder, weights and config aside."""
        return {name: reason for name, reason in self._files().items() if reason is not None}

    def identity(self) -> dict[str, Any]:
        """A JSON-simple fingerprint of configuration, weights and side files, for refusing to resume on another model.

        Of a weight file it takes the size, the whole header and 64 pieces of 64 KiB spread evenly (files up to 4 MiB
        whole), so it does not notice an edit that keeps the size and falls between the pieces.
        """
        weights = {file: _sample(self.folder / file) for file in self.shards.files}
        side = hashlib.sha256()
        for path in self.side_files():
            side.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        config = hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()
        return {
            "kind": self.kind,
            "revision": self.revision,
            "config": config,
            "weights": weights,
            "side_files": side.hexdigest(),
        }

    def _extent(self, name: str) -> Extent:
        if self._owner.get(name, name) != name or name not in self.shards.extents:
            raise ValueError(f"{self.spec}: the model has no tensor {name}")
        return self.shards.extents[name]

    def _files(self) -> dict[str, str | None]:
        """`{name: why it is not copied, or None}`; names are relative to the folder."""
        found: dict[str, str | None] = {}
        for path in sorted(self.folder.iterdir()):
            name = path.name
            if name in self.shards.files or name in ("config.json", "model.safetensors.index.json"):
                continue
            if path.is_dir():
                if name == TEMPLATES:
                    found.update({f"{name}/{child.name}": None for child in sorted(path.glob("*.jinja"))})
                else:
                    found[f"{name}/"] = "a folder"
            else:
                found[name] = _why_not(name)
        for name, reason in found.items():
            if reason is None:
                confined(self.folder, name)
        return found


class Rewritten(Source):
    """A model whose tensors are computed from another's, one at a time, when they are asked for.

    It computes what the other does, so whatever streams a model streams this one. A subclass adds to `changes` the keys
    of config.json that it replaces, to `remarks` a tensor's events for the report, to `notes` lines for the user.
    """

    def __init__(self, source: Source):
        vars(self).update(vars(source))
        self.before = source
        self.entries, self.quantized = {}, False
        self.changes, self.remarks, self.notes = dict(source.changes), dict(source.remarks), list(source.notes)

    def names(self) -> list[str]:
        return self.before.names()

    def info(self, name: str) -> TensorInfo:
        info = self.before.info(name)
        return replace(info, nbytes=math.prod(info.shape) * info.dtype.itemsize)

    def tensor(self, name: str) -> Tensor:
        raise NotImplementedError

    def packed(self, name: str) -> None:
        self.info(name)


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself, once it is sure that all its values are finite.

    Raises ValueError naming the tensor and counting its NaN and Inf values, 4M elements at a time."""
    if not all_finite(tensor):
        bad = sum(int((~torch.isfinite(piece)).sum()) for piece in tensor.detach().reshape(-1).split(2**22))
        raise ValueError(f"{name}: {bad} of {tensor.numel()} values are NaN or Inf; the weights are damaged")
    return tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf: the least and the greatest are both NaN if one value is.

    Unlike `isfinite` it makes no copies, and of bf16 it is 60 times as fast.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all())


def _quantization(spec: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """The table of a packed model, None for a dense one. Raises ValueError for a tool whose files acc cannot read."""
    from .engine import readers

    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        table = holder.get("quantization_config") or holder.get("compression_config")
        if not table:
            continue
        method = table.get("quant_method", "unknown") if isinstance(table, dict) else "unknown"
        if method == "acc" or (holder is config and method in readers()):
            return table
        raise ValueError(
            f"{spec}: already quantised ({method}); acc starts from 16 or 32-bit weights: name the original model, or "
            f"load this one dequantised in transformers and save it"
        )
    return None


def _companions(shards: Shards, packed: dict[str, Entry]) -> dict[str, str]:
    """`{disk name: packed name it belongs to}`; every layout is compared with the headers, so it fails closed."""
    owner: dict[str, str] = {}
    for name, entry in packed.items():
        for suffix, (size, dtype) in entry.layout().items():
            disk = name + suffix
            if disk not in shards.extents:
                raise ValueError(f"{shards.folder}: {disk} is missing ({name} is packed as {entry.cls.name})")
            have = shards.extents[disk]
            fits = len(size) == len(have.shape) and all(n in (None, m) for n, m in zip(size, have.shape))
            if not fits or have.dtype != dtype:
                raise ValueError(
                    f"{shards.folder}: {disk} is {have.shape} {have.dtype}, {entry.cls.name} expects {size} {dtype}"
                )
            if disk in owner or (suffix and disk in packed):
                raise ValueError(f"{shards.folder}: {disk} belongs to two packed tensors")
            owner[disk] = name
    suffixes = {suffix for entry in packed.values() for suffix in entry.cls.suffixes.values()}
    for name in packed:
        for disk in (name + suffix for suffix in sorted(suffixes)):
            if disk in shards.extents and owner.get(disk) != name:
                raise ValueError(f"{shards.folder}: {disk} is unexpected ({name} is packed as {packed[name].cls.name})")
    return owner


def _why_not(name: str) -> str | None:
    if name.startswith(".") or not is_plain(name):
        return "hidden"
    if name.endswith(WEIGHT_SUFFIXES):
        return "weights that the model's index does not name"
    if name in OWN_FILES:
        return "written anew"
    if name in OTHER_QUANTISERS:
        return "describes another quantisation"
    return None


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _sample(path: Path, pieces: int = 64, piece: int = 2**16) -> dict[str, Any]:
    """Size and a hash over the header and evenly spaced pieces of a safetensors file."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= pieces * piece:
            digest.update(file.read())
        else:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
            for number in range(pieces):
                file.seek(number * (size - piece) // (pieces - 1))
                digest.update(file.read(piece))
    return {"size": size, "sha256": digest.hexdigest()}
