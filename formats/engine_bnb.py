"""bitsandbytes' checkpoints of 4 and 8 bits, as stock transformers loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.nf4 import BLOCK, NESTED, dynamic_map, levels
from .base import Entry, PackedWeight
from .engine import Engine, patterns
from .int8 import Int8Weight
from .model import linear_modules
from .nf4 import Nf4Weight
from .safefile import Layout
from .source import Source

STATE = "quant_state.bitsandbytes__nf4"


class Bnb(Engine):
    """The codes and scales of `nf4` or `int8` under bitsandbytes' names, with its tables beside them.

    Transformers replaces linear layers alone: what else is packed, fused experts above all, is refused. In 8 bits
    bitsandbytes rounds inputs too when it multiplies, so that logits are not acc's; the weights are.

    Layout: bitsandbytes 0.50, `QuantState.as_dict` and `Linear8bitLt`.
    """

    def __init__(self, source: Source):
        super().__init__(source)
        shapes = {name: source.info(name).shape for name in source.names()}
        self.linears = linear_modules(str(source.folder), shapes, source.dtype)  # stored name -> module

    def refuses(self, name: str, entry: Entry) -> str | None:
        if entry.cls not in (Nf4Weight, Int8Weight):
            return f"it is packed as {entry.cls.name}, and bitsandbytes has nf4 and int8"
        if name not in self.linears or entry.stack is not None or entry.transposed:
            return "transformers gives bitsandbytes linear layers only, and this is none of them"
        if entry.cls is Nf4Weight and entry.shape[1] % BLOCK:
            # bitsandbytes 0.50.2 on a CPU: 64 x 96 comes back with other numbers than those it packed
            return (
                f"its {entry.shape[1]} inputs are no multiple of {BLOCK}, and not every kernel has blocks across rows"
            )
        return None

    def plan(self, packed: Mapping[str, Entry], kept: list[str]) -> dict[str, Any]:
        first = next(iter(packed))
        cls, double = packed[first].cls, packed[first].scheme.get("double_quant", False)
        for name, entry in packed.items():
            if (entry.cls, entry.scheme.get("double_quant", False)) != (cls, double):
                raise ValueError(f"{name}: it is packed otherwise than {first}, and bitsandbytes has one way for all")
        inside = {self.linears[name] for name in packed}
        dense = [module for module in self.linears.values() if module not in inside]
        dtype = str(self.source.dtype).removeprefix("torch.")
        four = cls is Nf4Weight
        table = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": patterns(dense, inside),
            "llm_int8_threshold": 6.0,
        }
        if not four:
            self.notes.append("in 8 bits bitsandbytes rounds inputs too: expect other logits than acc's")
        return {"quantization_config": table, "dtype": dtype}

    def layout(self, name: str, entry: Entry) -> Layout:
        rows, weights = entry.shape[0], entry.shape[0] * entry.shape[1]
        if entry.cls is Int8Weight:
            stem = name.removesuffix("weight")
            return {
                name: (entry.shape, torch.int8),
                f"{stem}SCB": ((rows,), torch.float32),
                f"{stem}weight_format": ((), torch.uint8),
            }
        blocks, double = -(-weights // BLOCK), entry.scheme["double_quant"]
        layout: Layout = {
            name: ((-(-weights // 2), 1), torch.uint8),
            f"{name}.absmax": ((blocks,), torch.uint8 if double else torch.float32),
            f"{name}.quant_map": ((16,), torch.float32),
            f"{name}.{STATE}": ((len(self._state(name, entry.shape, double)),), torch.uint8),
        }
        if double:
            layout[f"{name}.nested_absmax"] = ((-(-blocks // NESTED),), torch.float32)
            layout[f"{name}.nested_quant_map"] = ((256,), torch.float32)
        return layout

    def tensors(self, name: str, packed: PackedWeight) -> dict[str, Tensor]:
        if isinstance(packed, Int8Weight):
            stem = name.removesuffix("weight")
            scales = {f"{stem}SCB": packed.absmax, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}
            return {name: packed.codes, **scales}
        assert isinstance(packed, Nf4Weight)
        state = self._state(name, packed.shape, packed.offset is not None)
        made = {
            name: packed.codes[:, None],
            f"{name}.absmax": packed.absmax,
            f"{name}.quant_map": levels(),
            f"{name}.{STATE}": torch.frombuffer(bytearray(state), dtype=torch.uint8),
        }
        if packed.nested_absmax is not None:
            made |= {f"{name}.nested_absmax": packed.nested_absmax, f"{name}.nested_quant_map": dynamic_map()}
        return made

    def _state(self, name: str, shape: tuple[int, int], double: bool) -> bytes:
        """What is no tensor, as JSON."""
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "shape": list(shape),
        }
        if double:
            offset = float(self.source.shards.read(f"{name}_offset"))
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(state).encode()
