"""The waist: what every packed weight can do, so that methods, writer, loader and runtime need know no format."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..kernels.base import ExpertsProduct, SharedProduct, experts_product, shared_product
from ..registry import lookup

Scheme = dict[str, Any]


class Grid(NamedTuple):
    """The values that a weight may take: `scale · (code - zero) + extra`, columns in packed order.

    codes uint8 `[O, I]`, 0 to `top`; scale and zero fp32 `[G, O]`, each for `group_size` columns; extra `[O, I]` or
    None; perm int64 `[I]` or None: packed column j is input perm[j].
    """

    codes: Tensor
    top: int
    scale: Tensor
    zero: Tensor
    group_size: int
    extra: Tensor | None = None
    perm: Tensor | None = None

    def weights(self, codes: Tensor) -> Tensor:
        """Codes `[O, I]`, floats, in packed order -> weights `[O, I]`, inputs in their own order."""
        weight = (codes - self._wide(self.zero)).mul_(self._wide(self.scale))
        if self.extra is not None:
            weight += self.extra
        return weight if self.perm is None else torch.empty_like(weight).index_copy_(1, self.perm, weight)

    def places(self, weight: Tensor) -> Tensor:
        """The inverse as real numbers, `[O, I]` in packed order; where all codes mean the same, the one that is."""
        weight = weight if self.perm is None else weight[:, self.perm]
        weight = weight if self.extra is None else weight - self.extra
        scale = self._wide(self.scale)
        return torch.where(scale != 0, weight / scale + self._wide(self.zero), self.codes)

    def slopes(self, gradient: Tensor) -> Tensor:
        """The signs of a gradient `[O, I]` by the weights, inputs in their order -> by the codes, in packed order."""
        gradient = gradient if self.perm is None else gradient[:, self.perm]
        return gradient.sign() * self._wide(self.scale.sign())

    def _wide(self, statistic: Tensor) -> Tensor:
        """`[G, O]`, one for each group -> `[O, I]`, one for each weight."""
        return statistic.T.repeat_interleave(self.group_size, 1)[:, : self.codes.shape[1]]


class Levels(NamedTuple):
    """The values that a weight may take where they are not evenly spaced.

    codes uint8 `[O, I]`, 0 to `top`, count the levels fp32 `[G, top + 1, O]` of `group_size` columns, which rise.
    """

    codes: Tensor
    top: int
    levels: Tensor
    group_size: int

    def weights(self, codes: Tensor) -> Tensor:
        """Codes `[O, I]`, floats -> weights `[O, I]`."""
        return look_up(self.levels, codes, self.group_size)

    def places(self, weight: Tensor) -> Tensor:
        """The inverse as real numbers: in proportion between two levels, so that the nearest integer is the nearest
        level; where all levels are one, the code that is."""
        found = []
        parts = zip(self.levels, weight.split(self.group_size, 1), self.codes.split(self.group_size, 1), strict=True)
        for levels, own, codes in parts:
            above = torch.searchsorted(levels.T.contiguous(), own.contiguous(), right=True).clamp_(1, self.top).T
            low, high = levels.gather(0, above - 1), levels.gather(0, above)
            place = above - 1 + (own.T - low) / (high - low)
            found.append(torch.where(high > low, place, codes.T.float()))
        return torch.cat(found).T

    def slopes(self, gradient: Tensor) -> Tensor:
        """The sign of a gradient `[O, I]` by the weights: as levels rise, it is that by the codes."""
        return gradient.sign()


def look_up(table: Tensor, codes: Tensor, group_size: int) -> Tensor:
    """What codes `[O, I]` mean in the table `[G, n, O]` of their group and row, `[O, I]`."""
    parts = codes.split(group_size, 1)
    return torch.cat([of.gather(0, own.T.long()) for of, own in zip(table, parts, strict=True)]).T


@dataclass(frozen=True)
class PackedWeight(ABC):
    """One matrix `W [O, I]` as it lies on disk.

    A subclass is one file of this folder: a frozen dataclass with one field per stored tensor after `shape` and
    `scheme`. `scheme` holds JSON-simple values (numbers, strings, booleans): all that is needed, with `shape`, to
    decode the tensors.
    """

    shape: tuple[int, int]
    scheme: Scheme

    name: ClassVar[str]  # the file's name, written as `format` beside the scheme
    planes: ClassVar[bool] = False  # whether the first of its bits are a weight of fewer, see `first_planes`
    suffixes: ClassVar[dict[str, str]]  # field -> what is added to the dense tensor's name; the codes' suffix is ""

    @classmethod
    @abstractmethod
    def layout(cls, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int | None, ...], torch.dtype]]:
        """`{suffix: (shape, dtype)}` before any data exists; None stands for a size that only the data decides."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`W [O, I]`: computed in fp32, rounded once to `dtype`; the same bits on every call and after any reload."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """`x [..., I]` -> `x Wᵀ [..., O]` in `x.dtype`, through the format's kernel."""

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """The numbers of the scheme that the format's kernels take beside its tensors."""

    def operands(self) -> dict[str, Any]:
        """The tensors that the format's kernels take: all of them, by field."""
        return {field: getattr(self, field) for field in self.suffixes}

    @classmethod
    def shared_product(cls, parts: Sequence[PackedWeight]) -> SharedProduct | None:
        """`x [..., I]` -> `x Wᵀ [..., O]` per matrix, for matrices of one scheme and `I`.

        None without a kernel for it.
        """
        return shared_product(cls.name, [part.operands() for part in parts], **parts[0].numbers())

    @classmethod
    def experts_product(
        cls, tensors: dict[str, Tensor], shape: tuple[int, int], scheme: Scheme
    ) -> ExpertsProduct | None:
        """`x [N, I]` sorted by expert, `ends [E]` -> `[N, O]`, for what `stack` gives of `E` matrices of `shape`.

        None without a kernel for it.
        """
        whole = cls(shape=shape, scheme=scheme, **{f: tensors.get(s) for f, s in cls.suffixes.items()})
        return experts_product(cls.name, whole.operands(), **whole.numbers())

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError for an impossible value: a code or index out of range, a statistic that is not finite."""

    @classmethod
    @abstractmethod
    def nominal_bits(cls, shape: tuple[int, int], scheme: Scheme, **counts: int) -> float:
        """Bits per weight as the method's paper counts them, before padding and bookkeeping."""

    def grid(self) -> Grid | None:
        """What the weight is rounded to; None where its values are not evenly spaced."""
        return None

    def levels(self) -> Grid | Levels | None:
        """The values that codes can choose among, evenly spaced or not; None where there are no such codes."""
        return self.grid()

    def with_codes(self, codes: Tensor) -> PackedWeight:
        """The same with other codes `[O, I]`, in packed order, that count what `levels` says."""
        raise NotImplementedError

    def first_planes(self, planes: int) -> PackedWeight:
        """The weight that the first `planes` bits of each code are, all of them if there are fewer. Only with
        `planes`."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """`{suffix: tensor}`; the suffix is appended to the dense tensor's own name. A field that is None has none."""
        stored = {suffix: getattr(self, field) for field, suffix in self.suffixes.items()}
        return {suffix: tensor for suffix, tensor in stored.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], shape: tuple[int, int], scheme: Scheme) -> PackedWeight:
        """The inverse of `tensors`. Raises ValueError when a tensor is missing, unexpected, or not as `layout` says."""
        layout = cls.layout(shape, scheme)
        if tensors.keys() != layout.keys():
            odd = sorted(tensors.keys() ^ layout.keys())
            raise ValueError(f"{cls.name}: expected tensors {sorted(layout)}, difference {odd}")
        for suffix, (size, dtype) in layout.items():
            have = tensors[suffix]
            fits = len(size) == have.dim() and all(n in (None, m) for n, m in zip(size, have.shape))
            if not fits or have.dtype != dtype:
                raise ValueError(
                    f"{cls.name}: tensor {suffix or 'codes'!r} is {tuple(have.shape)} {have.dtype}, "
                    f"expected {size} {dtype}"
                )
        return cls(shape=(shape[0], shape[1]), scheme=scheme, **{f: tensors.get(s) for f, s in cls.suffixes.items()})

    @classmethod
    def stack(cls, parts: Sequence[PackedWeight]) -> dict[str, Tensor]:
        """`{suffix: tensor}` of several matrices that stand under one name on disk: concatenated on dim 0, in order."""
        tensors = [part.tensors() for part in parts]
        return {suffix: torch.cat([t[suffix] for t in tensors]) for suffix in tensors[0]}

    @classmethod
    def unstack(
        cls, tensors: dict[str, Tensor], parts: int, shape: tuple[int, int], scheme: Scheme
    ) -> list[PackedWeight]:
        """The inverse of `stack`. A format whose parts may differ in size overrides this."""
        for suffix, tensor in tensors.items():
            if tensor.dim() == 0 or tensor.shape[0] % parts:
                raise ValueError(
                    f"{cls.name}: {suffix or 'codes'!r} {tuple(tensor.shape)} does not split in {parts} parts"
                )
        split = {suffix: tensor.tensor_split(parts) for suffix, tensor in tensors.items()}
        return [cls.from_tensors({s: split[s][part] for s in split}, shape, scheme) for part in range(parts)]

    def counts(self) -> dict[str, int]:
        """What `nominal_bits` needs to know of the data, e.g. the number of outliers."""
        return {}

    @classmethod
    def nbytes(cls, shape: tuple[int, int], scheme: Scheme, **counts: int) -> int:
        """Bytes of the tensors of a matrix of this shape, before any data exists.

        `counts` are as `counts()` gives them; their sum is the size of what only the data decides. A format with
        several such sizes overrides this. Raises ValueError for a shape or scheme that the format cannot hold.
        """
        open_size = sum(counts.values())
        layout = cls.layout(shape, scheme).values()
        return sum(dtype.itemsize * math.prod(open_size if n is None else n for n in size) for size, dtype in layout)

    @property
    def nominal(self) -> float:
        """Bits per weight as the paper counts them, for this matrix."""
        return self.nominal_bits(self.shape, self.scheme, **self.counts())

    @property
    def stored_bits(self) -> float:
        """Bits per weight, counted from the tensors' bytes."""
        bytes_ = sum(t.numel() * t.element_size() for t in self.tensors().values())
        return 8 * bytes_ / (self.shape[0] * self.shape[1])


def format_of(scheme: Scheme) -> type[PackedWeight]:
    """The format class that a scheme read from disk names under `format`. Raises ValueError for an unknown one."""
    return _format(scheme["format"])


@functools.cache
def _format(name: str) -> type[PackedWeight]:
    return lookup("formats", name)


def stack(parts: Sequence[PackedWeight]) -> dict[str, Tensor]:
    """`{suffix: tensor}` of several matrices of one format that stand under one name on disk."""
    return type(parts[0]).stack(parts)


def unstack(
    cls: type[PackedWeight], tensors: dict[str, Tensor], parts: int, shape: tuple[int, int], scheme: Scheme
) -> list[PackedWeight]:
    """The inverse of `stack`: `parts` matrices of `shape`."""
    return cls.unstack(tensors, parts, shape, scheme)


def one_tensor(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other on dim 0; not copied where they already lie so in one memory, without gaps."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not same or part.storage_offset() != place or not part.is_contiguous():
            return torch.cat(list(parts))
        place += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride(), first.storage_offset())


VERSION = 1  # of the table in `config.json`; a reader refuses any other


def quantization_config(entries: dict[str, tuple[tuple[int, int], Scheme]]) -> dict[str, Any]:
    """What `config.json` says about packed weights: `{disk name: (shape of one matrix, scheme)}`, equal schemes once.

    A scheme may carry `stack` (the disk tensor holds so many matrices, one after the other on dim 0) and `transposed`
    (each dense matrix on disk is `[I, O]`).
    """
    schemes: list[dict[str, Any]] = []
    weights: dict[str, int] = {}
    for name, (shape, scheme) in sorted(entries.items()):
        item = {"format": scheme["format"], "shape": list(shape), **scheme}
        if item not in schemes:
            schemes.append(item)
        weights[name] = schemes.index(item)
    return {"quant_method": "acc", "version": VERSION, "schemes": schemes, "weights": weights}


class Entry(NamedTuple):
    """How one packed tensor of a folder is to be read; `scheme` is the format's own, the other keys apart."""

    cls: type[PackedWeight]
    shape: tuple[int, int]
    scheme: Scheme
    stack: int | None = None
    transposed: bool = False

    @property
    def dense_shape(self) -> tuple[int, ...]:
        matrix = self.shape[::-1] if self.transposed else self.shape
        return matrix if self.stack is None else (self.stack, *matrix)

    def layout(self) -> dict[str, tuple[tuple[int | None, ...], torch.dtype]]:
        """`{suffix: (shape, dtype)}` on disk: the format's layout, dim 0 times `stack`."""
        parts = 1 if self.stack is None else self.stack
        whole = {}
        for suffix, (size, dtype) in self.cls.layout(self.shape, self.scheme).items():
            first = None if size[0] is None else size[0] * parts
            whole[suffix] = ((first, *size[1:]), dtype)
        return whole

    def full_scheme(self) -> Scheme:
        """The scheme as `quantization_config` takes it."""
        extra: Scheme = {} if self.stack is None else {"stack": self.stack}
        return self.scheme | extra | ({"transposed": True} if self.transposed else {})

    def pack(self, parts: Sequence[PackedWeight]) -> dict[str, Tensor]:
        """The inverse of `unpack`. Raises ValueError when matrices of one stack came out with different schemes."""
        if any(part.scheme != self.scheme or part.shape != self.shape for part in parts):
            raise ValueError("the matrices of one stored tensor need one scheme; they came out with different ones")
        return parts[0].tensors() if self.stack is None else stack(parts)

    def unpack(self, tensors: dict[str, Tensor]) -> list[PackedWeight]:
        """`{suffix: tensor}` as read from disk -> the matrices, one unless stacked."""
        if self.stack is None:
            return [self.cls.from_tensors(tensors, self.shape, self.scheme)]
        return unstack(self.cls, tensors, self.stack, self.shape, self.scheme)

    def first_planes(self, planes: int) -> Entry:
        """How the same is described when only so many planes are read; itself where the format has none."""
        if not self.cls.planes or self.scheme["bits"] <= planes:
            return self
        return self._replace(scheme=self.scheme | {"bits": planes})

    def dense(self, packed: Sequence[PackedWeight], dtype: torch.dtype) -> Tensor:
        """The tensor that the source model had under this name, up to the loss of packing."""
        parts = [p.dequantize(dtype).T if self.transposed else p.dequantize(dtype) for p in packed]
        return parts[0].contiguous() if self.stack is None else torch.stack(parts)


def has_planes(entries: Iterable[Entry], planes: int) -> None:
    """Raises ValueError unless one of the weights has so many planes, and may be read without the rest."""
    most = max((entry.scheme["bits"] for entry in entries if entry.cls.planes), default=0)
    if not 1 <= planes <= most:
        there = f"1 to {most}" if most else "none of its weights has planes (lut_gemm makes them)"
        raise ValueError(f"planes {planes}: this model takes {there}")


def entry(config: dict[str, Any], name: str) -> Entry | None:
    """What a `quantization_config` says of one disk name; None when it stands there dense. Errors as in `entries`."""
    number = _table(config)[1].get(name)
    return None if number is None else _entry(config["schemes"], name, number)


def entries(config: dict[str, Any]) -> dict[str, Entry]:
    """`{disk name: Entry}` of a `quantization_config` that acc wrote.

    Raises ValueError, saying which item is at fault, for another version, an unknown format or a malformed table.
    """
    schemes, weights = _table(config)
    return {name: _entry(schemes, name, number) for name, number in weights.items()}


def _table(config: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    if config.get("version") != VERSION:
        raise ValueError(
            f"quantization_config has version {config.get('version')!r}; this acc reads version {VERSION}: update acc"
        )
    schemes, weights = config.get("schemes"), config.get("weights")
    if not isinstance(schemes, list) or not isinstance(weights, dict):
        raise ValueError("quantization_config: expected a list `schemes` and a table `weights`")
    return schemes, weights


def _entry(schemes: list[Any], name: str, number: Any) -> Entry:
    if type(number) is not int or not 0 <= number < len(schemes):
        raise ValueError(f"quantization_config: {name} refers to scheme {number!r}, there are {len(schemes)}")
    where, item = f"quantization_config: scheme {number}", schemes[number]
    if not isinstance(item, dict) or not isinstance(item.get("format"), str):
        raise ValueError(f"{where} names no format")
    scheme = {key: value for key, value in item.items() if key not in ("shape", "stack", "transposed")}
    shape, stack, transposed = item.get("shape"), item.get("stack"), item.get("transposed", False)
    if not isinstance(shape, list) or [type(n) is int and n > 0 for n in shape] != [True, True]:
        raise ValueError(f"{where}: shape is {shape!r}, expected [O, I]")
    if type(transposed) is not bool or not (stack is None or (type(stack) is int and stack > 0)):
        raise ValueError(f"{where}: stack {stack!r}, transposed {transposed!r}: expected a number and a boolean")
    found = Entry(format_of(scheme), (shape[0], shape[1]), scheme, stack, transposed)
    try:
        found.layout()
    except (AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{where} ({scheme['format']}) is incomplete: {type(error).__name__} {error}") from None
    return found
