"""The pack-quantized format of compressed-tensors, as vLLM and transformers with compressed-tensors load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Entry, PackedWeight
from .engine import (
    Engine,
    Numbers,
    Stored,
    codes_of,
    exactly,
    is_matrix,
    narrowest,
    patterns,
    reading_dtype,
    refuses_grouped,
    words,
)
from .safefile import Layout
from .source import FLOATS, Source

BITS = tuple(range(2, 9))
_EXPERT = re.compile(r"\.experts\.\d+\.")
Common = tuple[int, int, bool]  # bits, group size, symmetric
VERSION = "0.20.0"  # of compressed-tensors: the first that packs 3, 5, 6 and 7 bits without gaps


class CompressedTensors(Engine):
    """Grouped integers, packed along the inputs, with zeros packed along the outputs.

    Readers hold scales in the model's type, so config.json names a type that loses none of their digits, and a note
    says so where it is not the model's own. 3, 5, 6 and 7 bits need compressed-tensors 0.20 or newer, as older versions
    packed them otherwise; files of both are read.

    Two traps of transformers 5.23: it expects zeros unpacked in a model it keeps packed, so with zeros config.json asks
    it to unpack while loading (`dequantize`); and then it takes all linear layers for one group's, and experts for
    symmetric. What it would get wrong is refused.

    Layout: the compressed-tensors package, `compressors/pack_quantized`.
    """

    readable: ClassVar[str | None] = "compressed-tensors"

    def refuses(self, name: str, entry: Entry) -> str | None:
        reason = refuses_grouped(name, entry, BITS)
        if reason is None and _EXPERT.search(name) and not entry.scheme["symmetric"]:
            return (
                "it is an expert with zeros, and readers take experts for symmetric: pack it with --grid symmetric "
                "(gptq) or --symmetric true (rtn), or take --to gptq"
            )
        return reason

    def plan(self, packed: Mapping[str, Entry], kept: list[str]) -> dict[str, Any]:
        kinds: dict[Common, list[str]] = {}
        for name, entry in packed.items():
            scheme = entry.scheme
            key = scheme["bits"], scheme["group_size"], scheme["symmetric"]
            kinds.setdefault(key, []).append(name.removesuffix(".weight"))
        self._check(kinds)
        every = [module for members in kinds.values() for module in members]
        groups = {}
        for number, (key, members) in enumerate(kinds.items()):
            inside = set(members)
            others = [module for module in every if module not in inside]
            targets = ["Linear"] if len(kinds) == 1 else [f"re:{p}" for p in patterns(members, others)]
            groups[f"group_{number}"] = _group(*key, targets)
        dense = [n.removesuffix(".weight") for n in kept if is_matrix(n, self.source.info(n).shape)]
        head = [] if "lm_head.weight" in packed else ["lm_head"]  # a tied one is not stored
        dtype, own = reading_dtype((e.scheme for e in packed.values()), self.source.dtype), self.source.dtype
        if dtype != own:
            kind, own = (str(d).removeprefix("torch.") for d in (dtype, own))
            self.notes.append(f"config.json says {kind}, not {own}: readers give scales the model's type")
        self.dtype = dtype
        table = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(dict.fromkeys([*head, *(f"re:{pattern}" for pattern in patterns(dense, every))])),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": VERSION,
        }
        if any(not symmetric for _, _, symmetric in kinds):
            table["dequantize"] = True
        return {"quantization_config": table, "dtype": str(dtype).removeprefix("torch.")}

    def _check(self, kinds: Mapping[Common, list[str]]) -> None:
        """Raises ValueError for mixed settings where readers know of one only."""
        plain = [(key, m) for key, members in kinds.items() for m in members if not _EXPERT.search(m)]
        experts = [(key, m) for key, members in kinds.items() for m in members if _EXPERT.search(m)]
        zeros = any(not symmetric for (_, _, symmetric), _ in plain)
        for found, alike in ((plain, zeros), (experts, True)):
            other = next((m for key, m in found if key != found[0][0]), None)
            if alike and other is not None:
                raise ValueError(
                    f"{other}.weight: it has other bits, groups or symmetry than {found[0][1]}, and readers know one"
                    " setting for linear layers with zeros and one for experts; try --to gptq"
                )

    def layout(self, name: str, entry: Entry) -> Layout:
        (rows, columns), scheme = entry.shape, entry.scheme
        bits, groups = scheme["bits"], 1 if scheme["group_size"] == -1 else columns // scheme["group_size"]
        layout: Layout = {
            f"{name}_packed": ((rows, -(-columns * bits // 32)), torch.int32),
            f"{name}_scale": ((rows, groups), self.dtype),
            f"{name}_shape": ((2,), torch.int64),
        }
        if not scheme["symmetric"]:
            layout[f"{name}_zero_point"] = ((-(-rows * bits // 32), groups), torch.int32)
        return layout

    def tensors(self, name: str, packed: PackedWeight) -> dict[str, Tensor]:
        grid, bits = packed.grid(), packed.scheme["bits"]
        assert grid is not None
        made = {
            f"{name}_packed": words(grid.codes, bits),
            f"{name}_scale": exactly(packed.tensors()["_scale"].T, self.dtype),
            f"{name}_shape": torch.tensor(packed.shape),
        }
        if not packed.scheme["symmetric"]:
            made[f"{name}_zero_point"] = words(grid.zero.to(torch.uint8), bits).T.contiguous()
        return made

    @classmethod
    def read(cls, source: Source) -> dict[str, Stored]:
        table = source.config.get("quantization_config") or source.config["compression_config"]
        names = [n.removesuffix("_packed") for n in source.shards.extents if n.endswith(".weight_packed")]
        if not names:
            kind = table.get("format", "an unnamed format")
            raise ValueError(f"{source.spec}: compressed-tensors in {kind}; acc reads pack-quantized weights only")
        return {name: _stored(source, name, table) for name in names}


def _group(bits: int, group_size: int, symmetric: bool, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def _weights(table: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The settings of the group that a module is in: one that names it, else one for its class."""
    by_class = None
    for group in (table.get("config_groups") or {}).values():
        for target in group.get("targets", []):
            named = target.startswith("re:") and re.match(target.removeprefix("re:"), module)
            if named or target == module or module.endswith(f".{target}"):
                return _checked(table, group)
            if "." not in target and not target.startswith("re:"):
                by_class = by_class or group
    if by_class is None:
        raise ValueError("no group of config.json has it among its targets")
    return _checked(table, by_class)


def _checked(table: Mapping[str, Any], group: Mapping[str, Any]) -> Mapping[str, Any]:
    weights = group.get("weights") or {}
    kind = group.get("format") or table.get("format")
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if kind != "pack-quantized" or weights.get("type") != "int" or weights.get("num_bits") not in BITS:
        number, type_ = weights.get("num_bits"), weights.get("type")
        raise ValueError(f"{number} bits of {type_} as {kind}: acc reads packed integers")
    if strategy not in ("group", "channel") or (strategy == "group" and type(group_size) is not int):
        raise ValueError(f"strategy {strategy} with group_size {group_size}: acc reads group and channel")
    if type(weights.get("symmetric")) is not bool:
        raise ValueError("config.json does not say whether it is symmetric")
    return weights


def _stored(source: Source, name: str, table: Mapping[str, Any]) -> Stored:
    where, extents = f"{source.spec}: {name}", source.shards.extents
    try:
        weights = _weights(table, name.removesuffix(".weight"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    bits, symmetric = weights["num_bits"], weights["symmetric"]
    names = [f"{name}_packed", f"{name}_scale", f"{name}_shape", *([] if symmetric else [f"{name}_zero_point"])]
    if lacking := [each for each in names if each not in extents]:
        raise ValueError(f"{where}: {lacking[0]} is missing")
    shape = source.shards.read(names[2]).tolist()
    if extents[names[0]].dtype != torch.int32 or len(shape) != 2 or extents[names[0]].shape[:-1] != (shape[0],):
        raise ValueError(f"{where}: weight_packed is {extents[names[0]].shape}, weight_shape says {shape}")
    rows, columns = shape
    group = columns if weights["strategy"] == "channel" else weights["group_size"]
    width = extents[names[0]].shape[1]
    gaps = width != -(-columns * bits // 32)  # as versions before 0.20 packed
    if gaps and width != -(-columns // (32 // bits)):
        raise ValueError(f"{where}: {width} words a row do not hold {columns} codes of {bits} bits")
    scales = extents[names[1]]
    if scales.shape != (rows, -(-columns // group)) or scales.dtype not in FLOATS:
        expected = rows, -(-columns // group)
        raise ValueError(f"{where}: weight_scale is {scales.shape} {scales.dtype}, expected {expected}")
    kind = scales.dtype if scales.dtype.itemsize == 2 else narrowest(source.shards.read(names[1]))
    index = None
    if f"{name}_g_idx" in extents:
        names.append(f"{name}_g_idx")
        index = source.shards.read(names[-1]).long()
        if index.shape != (columns,) or index.max() >= -(-columns // group):
            raise ValueError(f"{where}: weight_g_idx does not name a group for each of {columns} inputs")
        index = None if index.min() < 0 or torch.equal(index, torch.arange(columns) // group) else index
    scheme = {
        "bits": bits,
        "group_size": -1 if weights["strategy"] == "channel" else group,
        "symmetric": symmetric,
        "scale_dtype": str(kind).removeprefix("torch."),
    }
    read = partial(_numbers, source, name, (rows, columns), bits, symmetric, gaps, index)
    return Stored((rows, columns), scheme, tuple(names), read, index is None and kind.itemsize == 2)


def _numbers(
    source: Source, name: str, shape: tuple[int, int], bits: int, symmetric: bool, gaps: bool, index: Tensor | None
) -> Numbers:
    (rows, columns), read = shape, source.shards.read
    unpack = _with_gaps if gaps else codes_of
    zero = None
    if not symmetric:
        packed = read(f"{name}_zero_point").T
        dense = packed.shape[1] == -(-rows * bits // 32)
        if not dense and packed.shape[1] != -(-rows // (32 // bits)):
            raise ValueError(f"weight_zero_point has {packed.shape[1]} words for {rows} zeros of {bits} bits")
        zero = (codes_of if dense else _with_gaps)(packed, bits, rows)
    return Numbers(unpack(read(f"{name}_packed"), bits, columns), read(f"{name}_scale").T.contiguous(), zero, index)


def _with_gaps(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 `[R, W]` of as many whole codes as fit a word -> uint8 `[R, columns]`."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = packed[:, :, None] >> shifts & (1 << bits) - 1
    return codes.flatten(1)[:, :columns].to(torch.uint8)
