"""Safetensors folders, checked before anyone reads them: headers, index, and where the files really lie."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

JSON_LIMIT = 100 * 2**20  # bytes of a header, an index or a config; the largest index in public use has about 15 MB
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes of a file of weights; what hubs like best

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # tensors to be, by name

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Extent:
    """One tensor of a file: `begin` and `end` count bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Shards:
    """The weights of a folder: every header was read and agrees with its file and with the index."""

    folder: Path
    files: tuple[str, ...]  # sorted
    extents: dict[str, Extent]
    weight_map: dict[str, str]

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own.

        Not through a memory map: mapped pages would stay resident until the file is closed (measured: a pass over
        400 MB of tensors left 400 MB), and a caller's in-place operation would be seen by the next reader.
        """
        extent = self.extents[name]
        if extent.nbytes == 0:
            return torch.empty(extent.shape, dtype=extent.dtype)
        path = self.folder / self.weight_map[name]
        raw = np.fromfile(path, dtype=np.uint8, count=extent.nbytes, offset=extent.begin)
        if raw.size != extent.nbytes:
            raise ValueError(f"{path}: truncated while reading {name}: {extent.nbytes - raw.size} bytes are missing")
        return torch.from_numpy(raw).view(extent.dtype).reshape(extent.shape)


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together: what they will be, and how they are made."""

    layout: Layout
    make: Callable[[], dict[str, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout.values())


def write_shards(folder: Path, pieces: Sequence[Piece], limit: int = SHARD) -> int:
    """Writes all pieces as safetensors of at most `limit` bytes, and an index if there are several; returns the bytes.

    One piece is in memory at a time: shapes and types are known before, so the header is written first. A piece larger
    than `limit` gets a file of its own."""
    shards: list[list[Piece]] = [[]]
    used = 0
    for piece in pieces:
        if shards[-1] and used + piece.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(piece)
        used += piece.nbytes
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, members)
        weight_map |= {name: file for piece in members for name in piece.layout}
    total = sum(piece.nbytes for piece in pieces)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _write_shard(path: Path, pieces: Sequence[Piece]) -> None:
    layout = {name: spec for piece in pieces for name, spec in piece.layout.items()}
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # wide elements first, as the library does: readers view the bytes as they lie, and need them aligned
    for name in sorted(layout, key=lambda n: (-layout[n][1].itemsize, n)):
        (shape, dtype), begin = layout[name], end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for piece in pieces:
            _fill(file, 8 + len(raw), header, piece)
        file.truncate(8 + len(raw) + end)
        file.flush()
        os.fsync(file.fileno())


def _fill(file: BufferedWriter, start: int, header: dict[str, Any], piece: Piece) -> None:
    """Writes a piece at its place; what was made is gone on return, before the next is made."""
    made = piece.make()
    assert made.keys() == piece.layout.keys(), f"{made.keys()} is not what was declared"
    for name, tensor in made.items():
        declared = piece.layout[name]
        assert (tuple(tensor.shape), tensor.dtype) == declared, f"{name}: {tensor.shape} is not {declared}"
        file.seek(start + header[name]["data_offsets"][0])
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def open_shards(folder: Path) -> Shards:
    """The safetensors of `folder`, as transformers would choose them: one `model.safetensors`, else the index's files.

    Raises ValueError, naming the file or tensor, for anything that does not add up: a name in the index that is not
    a plain file name, a file that leads out of the folder, a header that is too large or contradicts its file, a
    tensor that is not in the file the index names, or one that the index does not know.
    """
    if (folder / SINGLE).exists():
        headers = {SINGLE: read_header(confined(folder, SINGLE))}
        index = None
    elif (folder / INDEX).exists():
        index = read_index(confined(folder, INDEX))
        headers = {file: read_header(confined(folder, file)) for file in sorted(set(index.values()))}
    else:
        raise ValueError(_no_weights(folder))
    found: dict[str, str] = {}
    for file, header in headers.items():
        for name in header:
            if name in found:
                raise ValueError(f"{folder}: {name} stands in both {found[name]} and {file}")
            found[name] = file
    if index is not None and index != found:
        raise ValueError(_index_mismatch(folder, index, found))
    if not found:
        raise ValueError(f"{folder}: the safetensors files hold no tensors")
    extents = {name: headers[file][name] for name, file in found.items()}
    return Shards(folder=folder, files=tuple(sorted(headers)), extents=extents, weight_map=found)


def read_index(path: Path) -> dict[str, str]:
    """`{tensor: file}` of an index; the file names are plain (`metadata`, which old tools leave out, is not needed)."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: weight_map sends {name} to {file!r}, which is no safetensors file")
        if not is_plain(file):
            raise ValueError(f"{path}: weight_map sends {name} to {file!r}; only a file name inside the folder is read")
    return weight_map


def is_plain(name: str) -> bool:
    """Whether `name` is a bare file name: no separator, no drive, no parent, nothing that a terminal would act on."""
    return bool(name) and name not in (".", "..") and name.isprintable() and not re.search(r"[/\\:]", name)


def confined(folder: Path, name: str) -> Path:
    """The path of `name` (plain, or plain names below each other), once it is sure that it is a file of `folder`.

    A link may stay inside the folder; in a snapshot of the hub's cache it may also lead to that cache's blobs.
    Raises ValueError otherwise.
    """
    path = folder / name
    if not all(is_plain(part) for part in name.split("/")):
        raise ValueError(f"{folder}: {name!r} is not a name inside the folder")
    if not path.exists():
        raise ValueError(f"{folder}: {name} is missing")
    real, root = path.resolve(), folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        homes += [root.parents[1] / "blobs", root.parents[2] / "blobs"]  # of this repository, or shared in the cache
    if not any(real.is_relative_to(home) for home in homes):
        raise ValueError(f"{path}: is a link that leaves the folder (to {real}); copy the file into the folder")
    if not real.is_file():
        raise ValueError(f"{path}: is not a regular file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of bounded size. Raises ValueError when it is none, or when a key occurs twice."""
    if path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for a JSON file of a model")
    return _parse(path.read_bytes(), str(path))


def read_header(path: Path) -> dict[str, Extent]:
    """`{tensor: extent}` of one safetensors file, where every extent lies inside the file and all fill it exactly.

    Raises ValueError naming the file and, where one is at fault, the tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, JSON_LIMIT):
            raise ValueError(
                f"{path}: not a whole safetensors file: its header claims {length} bytes, the file has {size}"
            )
        header = _parse(file.read(length), f"header of {path}")
    header.pop("__metadata__", None)
    start = 8 + length
    extents = {name: _extent(path, name, entry, start) for name, entry in header.items()}
    end = start
    for name, extent in sorted(extents.items(), key=lambda item: (item[1].begin, item[1].end)):
        if extent.begin != end:
            raise ValueError(
                f"{path}: {name} begins at byte {extent.begin}, expected {end}: tensors overlap or leave a gap"
            )
        end = extent.end
    if size < end:
        raise ValueError(f"{path}: truncated: its header describes {end} bytes, the file has {size}; fetch it again")
    if size > end:
        raise ValueError(f"{path}: {size - end} bytes follow the last tensor; the file is not what its header says")
    return extents


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"the key {max(keys, key=keys.count)!r} occurs twice")
        return dict(pairs)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _extent(path: Path, name: str, entry: Any, start: int) -> Extent:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {name}: expected dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {name} has the element type {dtype!r}, which torch does not know")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {name}: shape {shape} or data_offsets {offsets} is not a list of natural numbers")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{path}: {name}: {shape} of {dtype} does not fill data_offsets {offsets}")
    return Extent(DTYPES[dtype], tuple(shape), start + begin, start + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _index_mismatch(folder: Path, index: dict[str, str], found: dict[str, str]) -> str:
    for name, file in index.items():
        if name not in found:
            return f"{folder}: {file} lacks {name}, which the index promises"
        if found[name] != file:
            return f"{folder}: the index sends {name} to {file}, but it stands in {found[name]}"
    extra = sorted(found.keys() - index.keys())
    return f"{folder}: {found[extra[0]]} holds {extra[0]}, which is not in the index ({len(extra)} such tensors)"


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    gguf = [name for name in names if name.endswith(".gguf")]
    if shards:
        return f"{folder}: {shards[0]} but neither {SINGLE} nor {INDEX}: fetch the index, or rename a single file"
    if gguf:
        return f"{folder}: no safetensors; name the file itself: {folder / gguf[0]}"
    if pickles:
        return (
            f"{folder}: only pickled weights ({pickles[0]}), which can run code when read; convert them to safetensors"
        )
    return f"{folder}: no {SINGLE} and no {INDEX}"
