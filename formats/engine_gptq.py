"""GPTQ's checkpoints, as GPTQModel, vLLM, SGLang and transformers with optimum load them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import __version__
from .base import Entry, PackedWeight
from .engine import Engine, Numbers, Stored, codes_of, exactly, is_matrix, patterns, refuses_grouped, words
from .safefile import Layout
from .source import Source

BITS = (2, 3, 4, 8)
Common = tuple[int, int, bool]  # bits, group size, symmetric


class Gptq(Engine):
    """Grouped integers, packed along the inputs, with zeros packed along the outputs.

    Zeros of version 1 (`checkpoint_format` gptq) are stored less one, so it has no zero 0: it is written when all
    weights are symmetric, and version 2 (gptq_v2) otherwise. Scales are float16, which is what the model is said to
    compute in. No order of inputs is stored beyond the groups' own. What bits, groups and symmetry the fewer weights
    have, and which linear layers are dense, stands in `dynamic`.

    Layout: GPTQModel's documentation and loaders of version 7.
    """

    readable: ClassVar[str | None] = "gptq"

    def refuses(self, name: str, entry: Entry) -> str | None:
        rows, columns = entry.shape
        if rows % 32 or columns % 32:
            return f"it is {rows} x {columns}, and both have to be multiples of 32"
        return refuses_grouped(name, entry, BITS)

    def plan(self, packed: Mapping[str, Entry], kept: list[str]) -> dict[str, Any]:
        kinds = {name: _common(entry.scheme) for name, entry in packed.items()}
        (bits, group_size, symmetric), _ = Counter(kinds.values()).most_common(1)[0]
        modules = {name.removesuffix(".weight"): kind for name, kind in kinds.items()}
        dynamic: dict[str, dict[str, Any]] = {}
        for kind in dict.fromkeys(kinds.values()):
            if kind != (bits, group_size, symmetric):
                inside = [module for module, its in modules.items() if its == kind]
                others = [module for module, its in modules.items() if its != kind]
                for pattern in patterns(inside, others):
                    dynamic[f"+:^{pattern}"] = {"bits": kind[0], "group_size": kind[1], "sym": kind[2]}
        dense = [n.removesuffix(".weight") for n in kept if is_matrix(n, self.source.info(n).shape)]
        dynamic |= {f"-:^{pattern}": {} for pattern in patterns(dense, modules)}
        self.version = 1 if all(sym for _, _, sym in kinds.values()) else 2
        table = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "sym": symmetric,
            "lm_head": "lm_head.weight" in packed,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "true_sequential": True,
            "static_groups": False,
            "dynamic": dynamic,
            "meta": {"quantizer": [f"acc:{__version__}"]},
        }
        if self.source.dtype != torch.float16:
            self.notes.append("config.json says float16, which is what GPTQ's scales are")
        return {"quantization_config": table, "dtype": "float16"}

    def layout(self, name: str, entry: Entry) -> Layout:
        (rows, columns), (bits, group_size, _), stem = entry.shape, _common(entry.scheme), name.removesuffix("weight")
        groups = 1 if group_size == -1 else columns // group_size
        return {
            f"{stem}qweight": ((columns * bits // 32, rows), torch.int32),
            f"{stem}qzeros": ((groups, rows * bits // 32), torch.int32),
            f"{stem}scales": ((groups, rows), torch.float16),
            f"{stem}g_idx": ((columns,), torch.int32),
        }

    def tensors(self, name: str, packed: PackedWeight) -> dict[str, Tensor]:
        grid, bits, columns, stem = packed.grid(), packed.scheme["bits"], packed.shape[1], name.removesuffix("weight")
        assert grid is not None
        zero = grid.zero.to(torch.uint8) - (1 if self.version == 1 else 0)
        return {
            f"{stem}qweight": words(grid.codes, bits).T.contiguous(),
            f"{stem}qzeros": words(zero, bits),
            f"{stem}scales": exactly(packed.tensors()["_scale"], torch.float16),
            f"{stem}g_idx": torch.arange(columns, dtype=torch.int32) // grid.group_size,
        }

    def files(self, config: dict[str, Any]) -> dict[str, str]:
        return {"quantize_config.json": json.dumps(config["quantization_config"], indent=2) + "\n"}

    @classmethod
    def read(cls, source: Source) -> dict[str, Stored]:
        table = source.config["quantization_config"]
        kind = table.get("checkpoint_format") or table.get("format") or "gptq"
        if kind not in ("gptq", "gptq_v2"):
            raise ValueError(f"{source.spec}: GPTQ weights in the format {kind!r}; acc reads gptq and gptq_v2")
        stems = [n.removesuffix("qweight") for n in source.shards.extents if n.endswith(".qweight")]
        if not stems:
            raise ValueError(f"{source.spec}: config.json says GPTQ, but there is no tensor .qweight")
        return {f"{stem}weight": _stored(source, stem, table, 1 if kind == "gptq" else 2) for stem in stems}


def _common(scheme: Mapping[str, Any]) -> Common:
    return scheme["bits"], scheme["group_size"], scheme["symmetric"]


def _settings(table: Mapping[str, Any], module: str) -> Common:
    """What the table says of one module: its own override, else what all have."""
    found = dict(table)
    for key, override in (table.get("dynamic") or {}).items():
        if not key.startswith("-:") and re.match(key.removeprefix("+:"), module):
            found |= override
            break
    bits, group_size, symmetric = found.get("bits"), found.get("group_size", -1), found.get("sym", True)
    if bits not in BITS or type(group_size) is not int or type(symmetric) is not bool:
        raise ValueError(f"bits {bits!r}, group_size {group_size!r}, sym {symmetric!r} are none of GPTQ's")
    return bits, group_size, symmetric


def _stored(source: Source, stem: str, table: Mapping[str, Any], version: int) -> Stored:
    """The weight whose tensors begin with `stem`; shapes are compared with what the table says."""
    where, extents = f"{source.spec}: {stem}weight", source.shards.extents
    try:
        bits, group_size, symmetric = _settings(table, stem.removesuffix("."))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    names = [f"{stem}{leaf}" for leaf in ("qweight", "qzeros", "scales")]
    if lacking := [name for name in names if name not in extents]:
        raise ValueError(f"{where}: {lacking[0]} is missing")
    (packed_rows, rows), scales = extents[names[0]].shape, extents[names[2]]
    columns = packed_rows * 32 // bits
    group = columns if group_size == -1 else group_size
    expected = {
        names[0]: ((columns * bits // 32, rows), torch.int32),
        names[1]: ((-(-columns // group), -(-rows * bits // 32)), torch.int32),
        names[2]: ((-(-columns // group), rows), scales.dtype),
    }
    for name, (shape, dtype) in expected.items():
        found = extents[name]
        if (found.shape, found.dtype) != (shape, dtype):
            raise ValueError(f"{where}: {name} is {found.shape} {found.dtype}, expected {shape} {dtype}")
    if scales.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{where}: its scales are {scales.dtype}, expected float16 or bfloat16")
    index = None
    if f"{stem}g_idx" in extents:
        names.append(f"{stem}g_idx")
        index = source.shards.read(names[-1]).long()
        if index.shape != (columns,) or index.min() < 0 or index.max() >= -(-columns // group):
            raise ValueError(f"{where}: g_idx does not name a group for each of {columns} inputs")
        if torch.equal(index, torch.arange(columns) // group):
            index = None
    scheme = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric and index is None,
        "scale_dtype": str(scales.dtype).removeprefix("torch."),
    }
    read = partial(_numbers, source, stem, (rows, columns), bits, symmetric, version, index)
    return Stored((rows, columns), scheme, tuple(names), read, index is None)


def _numbers(
    source: Source,
    stem: str,
    shape: tuple[int, int],
    bits: int,
    symmetric: bool,
    version: int,
    index: Tensor | None,
) -> Numbers:
    (rows, columns), read = shape, source.shards.read
    zero, top = codes_of(read(f"{stem}qzeros"), bits, rows), (1 << bits) - 1
    if version == 1:
        if (zero == top).any():
            raise ValueError("version 1 stores a zero of -1, which its readers take for different numbers")
        zero += 1
    if symmetric and (zero != 1 << bits - 1).any():
        raise ValueError(f"config.json says sym, but a zero is not {1 << bits - 1}")
    return Numbers(
        codes_of(read(f"{stem}qweight").T, bits, columns), read(f"{stem}scales"), None if symmetric else zero, index
    )
