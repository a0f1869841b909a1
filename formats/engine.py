"""Checkpoints of other engines: what each can hold exactly, how one is written, and how one is read."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.packing import pack_stream, unpack_stream
from ..registry import lookup, typed
from .base import Entry, PackedWeight
from .grouped import SCALE_DTYPES, GroupedWeight
from .safefile import Layout, Piece, write_shards
from .source import Rewritten, Source, TensorInfo, natural

PREFIX = "engine_"
ROWS = 1 << 22  # codes that are packed at once


class Engine(ABC):
    """How another engine stores packed weights, planned for one model.

    A subclass is one file `engine_<name>.py` of this folder, which `acc export --to <name>` finds. Numbers are repacked
    and never quantised anew: codes, zeros, scales and corrections are those of acc's file, bit for bit, or the weight
    is refused with the reason. What the engine then computes with is its own affair: most multiply in 16 bits where acc
    uses 32.
    """

    readable: ClassVar[str | None] = None  # the `quant_method` that `read` understands

    def __init__(self, source: Source):
        self.source = source
        self.notes: list[str] = []  # for the user

    @abstractmethod
    def refuses(self, name: str, entry: Entry) -> str | None:
        """Why a packed tensor cannot be stored, from its shape and scheme alone; None when it can."""

    @abstractmethod
    def plan(self, packed: Mapping[str, Entry], kept: list[str]) -> dict[str, Any]:
        """What config.json has to say about `packed` tensors and dense `kept` ones; comes before the next two."""

    @abstractmethod
    def layout(self, name: str, entry: Entry) -> Layout:
        """The tensors that stand for a packed one, before any data is read."""

    @abstractmethod
    def tensors(self, name: str, packed: PackedWeight) -> dict[str, Tensor]:
        """Those tensors. Raises ValueError for numbers that the format cannot hold."""

    def files(self, config: dict[str, Any]) -> dict[str, str]:
        """Further files, by name."""
        return {}

    @classmethod
    def read(cls, source: Source) -> dict[str, Stored]:
        """The packed weights of such a checkpoint, by the name that the dense tensor has.

        Raises ValueError for what cannot be read."""
        raise NotImplementedError


@dataclass(frozen=True)
class Stored:
    """A packed weight in another engine's checkpoint, and whether acc's grouped format can hold it: not where inputs
    lie in groups in an order of their own, or scales have too many digits."""

    shape: tuple[int, int]
    scheme: dict[str, Any]
    names: tuple[str, ...]  # on disk
    numbers: Callable[[], Numbers]
    packable: bool = True

    @property
    def entry(self) -> Entry:
        return Entry(GroupedWeight, self.shape, {"format": GroupedWeight.name, **self.scheme})


@dataclass(frozen=True)
class Numbers:
    """`W[o, i] = scale[g, o] · (code[o, i] - zero[g, o])`, `g = index[i]`."""

    codes: Tensor  # uint8 [O, I]
    scale: Tensor  # [G, O], as stored
    zero: Tensor | None  # uint8 [G, O]; None: 2^(bits - 1)
    index: Tensor | None = None  # int64 [I]; None: neighbours share a group


class Imported(Rewritten):
    """Another engine's checkpoint, as if acc had packed it: dense tensors by exact dequantisation, or packed ones."""

    def __init__(self, source: Source, stored: dict[str, Stored]):
        super().__init__(source)
        self.stored = stored
        self.config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "compression_config")}
        self.entries = {name: weight.entry for name, weight in stored.items() if weight.packable}
        self.quantized = True
        self._inside = {disk for weight in stored.values() for disk in weight.names}
        if clash := sorted(stored.keys() & set(source.names())):
            raise ValueError(f"{self.spec}: {clash[0]} stands there dense and packed")

    def names(self) -> list[str]:
        return sorted([*(n for n in self.before.names() if n not in self._inside), *self.stored], key=natural)

    def info(self, name: str) -> TensorInfo:
        if name not in self.stored:
            return self.before.info(name)
        weight = self.stored[name]
        extents = [self.shards.extents[disk] for disk in weight.names]
        return TensorInfo(
            weight.shape, self.dtype, sum(e.nbytes for e in extents), self.shards.weight_map[weight.names[0]]
        )

    def tensor(self, name: str) -> Tensor:
        if name not in self.stored:
            return self.before.tensor(name)
        weight = self.stored[name]
        numbers = self._numbers(name)
        if weight.packable:
            return self._packed(weight, numbers).dequantize(self.dtype)
        scale, bits, group = numbers.scale.float().T, weight.scheme["bits"], weight.scheme["group_size"]
        index = numbers.index
        if index is None:
            index = torch.arange(weight.shape[1]) // (weight.shape[1] if group == -1 else group)
        zero = torch.full_like(scale, 1 << bits - 1) if numbers.zero is None else numbers.zero.float().T
        return (scale[:, index] * (numbers.codes.float() - zero[:, index])).to(self.dtype)

    def packed(self, name: str) -> PackedWeight | None:
        """The grouped weight of a tensor; None where it is dense, or grouped integers cannot hold it."""
        self.info(name)
        weight = self.stored.get(name)
        return None if weight is None or not weight.packable else self._packed(weight, self._numbers(name))

    def _numbers(self, name: str) -> Numbers:
        try:
            return self.stored[name].numbers()
        except ValueError as error:
            raise ValueError(f"{self.spec}: {name}: {error}") from None

    def _packed(self, weight: Stored, numbers: Numbers) -> GroupedWeight:
        scale = exactly(numbers.scale, SCALE_DTYPES[weight.scheme["scale_dtype"]])
        return GroupedWeight.encode(numbers.codes, scale, numbers.zero, weight.scheme)


def imported(source: Source) -> Source:
    """The same source, or what it holds as packed weights where another engine's format that acc reads packed it."""
    if source.foreign is None:
        return source
    return Imported(source, readers()[source.foreign].read(source))


def engines() -> dict[str, str]:
    """Every engine's name, as `--to` takes it, and its one line."""
    return typed("formats", Engine.__name__, PREFIX)


def engine(name: str) -> type[Engine]:
    """Raises ValueError, naming those there are, for an unknown engine."""
    if name not in engines():
        raise ValueError(f"--to {name}: there is dense, {', '.join(engines())}")
    return lookup("formats", PREFIX + name, Engine.__name__)


def readers() -> dict[str, type[Engine]]:
    """`{quant_method: engine}` of those whose checkpoints acc reads."""
    found = [engine(name) for name in engines()]
    return {cls.readable: cls for cls in found if cls.readable is not None}


# Writing


@dataclass(frozen=True)
class Exported:
    """What an export wrote: bytes of all tensors, why packed weights were written dense, and lines for the user."""

    nbytes: int
    dense: dict[str, str]
    notes: list[str]


def export(source: Source, folder: Path, to: str, *, dense_rest: bool = False) -> Exported:
    """Writes a packed model into the empty `folder`, for another engine (or `dense`), one weight in memory at a time.

    Raises ValueError, naming the tensor and the reason, for the first weight that the engine cannot hold exactly,
    unless `dense_rest` has such weights written unpacked.
    """
    chosen = None if to == "dense" else engine(to)(source)
    refused: dict[str, str] = {}
    packed: dict[str, Entry] = {}
    for name in source.names() if chosen is not None else []:
        entry = source.entries.get(name)
        if entry is None:
            continue
        reason = chosen.refuses(name, entry) if chosen is not None else None
        if reason is None:
            packed[name] = entry
        elif dense_rest:
            refused[name] = reason
        else:
            raise ValueError(f"{name}: {reason}; --dense-rest writes such weights unpacked")
    if chosen is not None and not packed:
        reason = next(iter(refused.values()), "the model is not packed")
        raise ValueError(f"{source.spec}: nothing to be written for {to}: {reason}")
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    files = {}
    if chosen is not None:
        config |= chosen.plan(packed, [name for name in source.names() if name not in packed])
        config.pop("torch_dtype", None)  # the older name of what the plan has set
        files = chosen.files(config)
    pieces = [
        _packed_piece(chosen, source, name, packed[name])
        if chosen is not None and name in packed
        else _dense_piece(source, name)
        for name in source.names()
    ]
    nbytes = write_shards(folder, pieces)
    for path in source.side_files():
        target = folder / path.relative_to(source.folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    for name, text in {**files, "config.json": json.dumps(config, indent=2) + "\n"}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return Exported(nbytes, refused, chosen.notes if chosen is not None else [])


def _dense_piece(source: Source, name: str) -> Piece:
    info = source.info(name)
    return Piece({name: (info.shape, info.dtype)}, lambda: {name: source.tensor(name)})


def _packed_piece(chosen: Engine, source: Source, name: str, entry: Entry) -> Piece:
    return Piece(chosen.layout(name, entry), partial(_repack, chosen, source, name))


def _repack(chosen: Engine, source: Source, name: str) -> dict[str, Tensor]:
    packed = source.packed(name)
    assert isinstance(packed, PackedWeight), f"{name} is a stack"
    try:
        return chosen.tensors(name, packed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


# What several engines share


def refuses_grouped(name: str, entry: Entry, bits: Iterable[int]) -> str | None:
    """Why an engine that holds grouped integers of some widths, a matrix at a time, cannot hold this; None: it can."""
    columns, scheme = entry.shape[1], entry.scheme
    if entry.cls is not GroupedWeight:
        return f"it is packed as {entry.cls.name}, and only grouped integers can be stored"
    if entry.stack is not None or entry.transposed:
        return f"it is a stack of {entry.stack} matrices, and each needs a name of its own"
    if not name.endswith(".weight"):
        return "its name does not end in .weight"
    if scheme["bits"] not in bits:
        return f"it has {scheme['bits']} bits, and {', '.join(map(str, bits))} can be stored"
    if scheme["group_size"] != -1 and columns % scheme["group_size"]:
        return f"its {columns} inputs are no multiple of its group of {scheme['group_size']}"
    return None


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a dense tensor may be a linear layer's weight, which an engine has to be told to leave alone."""
    return len(shape) == 2 and name.endswith(".weight")


def exactly(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales in another type. Raises ValueError when one of them would be rounded."""
    other = scale.to(dtype)
    if not torch.equal(other.to(torch.float64), scale.to(torch.float64)):
        names = (str(d).removeprefix("torch.") for d in (scale.dtype, dtype))
        raise ValueError("its scales are {}, and {} does not hold all of them".format(*names))
    return other


def narrowest(scale: Tensor) -> torch.dtype:
    """The type, of those that acc stores scales in, that holds all of these; float32 when there is none."""
    for dtype in (scale.dtype, *SCALE_DTYPES.values()):
        if dtype in SCALE_DTYPES.values() and torch.equal(scale.to(dtype).double(), scale.double()):
            return dtype
    return torch.float32


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes `[R, N]` -> int32 `[R, ceil(N · bits / 32)]`: each row a dense stream of bits, the lowest first."""
    rows, columns = codes.shape
    width = 4 * -(-columns * bits // 32)
    found = codes.new_zeros(rows, width, dtype=torch.uint8)
    step = max(1, ROWS // columns)
    for first in range(0, rows, step):
        stream = pack_stream(codes[first : first + step], bits)[:, :width]
        found[first : first + step, : stream.shape[1]] = stream
    return found.view(torch.int32)


def codes_of(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `words`: uint8 `[R, columns]`."""
    rows, width = len(packed), -(-columns // 8) * bits
    stream = packed.contiguous().view(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, max(0, width - stream.shape[1])))[:, :width]
    step = max(1, ROWS // columns)
    return torch.cat([unpack_stream(stream[first : first + step], bits, columns) for first in range(0, rows, step)])


def patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions, to be matched from the start, that fit the modules `names` and none of the `others`.

    Modules that differ in a number, as those of all layers do, get one expression if no other module fits it."""
    others = list(others)
    exact = [re.escape(name) + "$" for name in names]
    general = [re.sub(r"\d+", lambda _: r"\d+", pattern) for pattern in exact]
    free = {g for g in set(general) if not any(re.match(g, other) for other in others)}
    return list(dict.fromkeys(g if g in free else e for e, g in zip(exact, general, strict=True)))


def reading_dtype(schemes: Iterable[Mapping[str, Any]], dtype: torch.dtype) -> torch.dtype:
    """The type in which a reader that casts scales to the model's type loses none of their digits: `dtype` if so."""
    kinds = {SCALE_DTYPES[scheme["scale_dtype"]] for scheme in schemes}
    if dtype == torch.float32 or kinds == {dtype}:
        return dtype
    return kinds.pop() if len(kinds) == 1 else torch.float32
