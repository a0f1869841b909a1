"""The plug-in by which stock transformers loads and saves acc's checkpoints.

Packed tensors keep their names on disk. In the model they lie as buffers under the very same names, so transformers
loads
and saves them without conversion; the conversions that would fuse dense experts are taken out for packed ones.
Whatever is
missing or unexpected in the files raises before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..kernels.base import ExpertsProduct
from .base import VERSION, Entry, PackedWeight, entries, has_planes, one_tensor
from .safefile import DTYPES
from .shared import SharedInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config("acc")
class AccConfig(QuantizationConfigMixin):
    """What `config.json` says of a checkpoint's packed tensors."""

    def __init__(self, quant_method: str = "acc", version: int = VERSION, schemes: Any = None, weights: Any = None):
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]
        self.version = version
        self.schemes = schemes or []
        self.weights = weights or {}

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": "acc",
            "version": self.version,
            "schemes": self.schemes,
            "weights": self.weights,
        }


class Packed(nn.Module):
    """Holds packed tensors as buffers under their names on disk, and gives them back as packed weights."""

    def __init__(self) -> None:
        super().__init__()
        self._specs: dict[str, tuple[Entry, list[str]]] = {}
        self._parts: dict[str, list[PackedWeight]] = {}

    def hold(self, leaf: str, spec: Entry, tensors: dict[str, Tensor]) -> None:
        """Takes the tensors of one stored weight, `{suffix: tensor}`, under the name `leaf`."""
        self._specs[leaf] = (spec, [leaf + suffix for suffix in tensors])
        for suffix, tensor in tensors.items():
            self.register_buffer(leaf + suffix, tensor)

    def stored(self, leaf: str = "weight") -> dict[str, Tensor]:
        """The tensors of a stored weight, `{suffix: tensor}`."""
        return {name.removeprefix(leaf): self.get_buffer(name) for name in self._specs[leaf][1]}

    def parts(self, leaf: str = "weight") -> list[PackedWeight]:
        """The matrices of a stored weight: one, unless it is a stack."""
        if leaf not in self._parts:
            self._parts[leaf] = self._specs[leaf][0].unpack(self.stored(leaf))
        return self._parts[leaf]

    def forget(self) -> None:
        """Drops what was made of the buffers, to be made anew at the next use."""
        self._parts.clear()

    def _apply(self, fn: Callable, recurse: bool = True) -> Packed:
        """Moves like any module, but packed tensors never change their type: `model.half()` must not round them."""
        names = [name for _, names in self._specs.values() for name in names]
        packed = {name: self._buffers.pop(name) for name in names}
        super()._apply(fn, recurse)
        for name, buffer in packed.items():
            assert buffer is not None
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what is derived from the buffers is made anew there."""
        return self.__dict__ | {"_parts": {}}


class PackedLinear(Packed):
    """`nn.Linear` whose weight stays packed."""

    def __init__(self, linear: nn.Linear, spec: Entry, tensors: dict[str, Tensor]):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._shared: SharedInput | None = None
        self._key = 0
        self.hold("weight", spec, tensors)

    def share(self, shared: SharedInput, key: int) -> None:
        """From now on this may be multiplied together with its siblings, among which it goes by `key`."""
        self._shared, self._key = shared, key

    def forget(self) -> None:
        super().forget()
        if self._shared is not None:
            self._shared.forget()

    def forward(self, x: Tensor) -> Tensor:
        y = None if self._shared is None else self._shared.product(self._key, x)
        y = self.parts()[0].matmul(x) if y is None else y
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        spec = self._specs["weight"][0]
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {spec.scheme}"


class PackedPiece(Packed):
    """One expert's stored weight, by its own name; dense when it was left as it is."""

    def __init__(self, weight: Tensor | None):
        super().__init__()
        if weight is not None:
            self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts()[0].matmul(x) if self._specs else nn.functional.linear(x, self.get_buffer("weight"))


class PackedExperts(Packed):
    """Stands in for a fused experts module of which at least one projection is packed."""

    def __init__(self, experts: Any):
        super().__init__()
        self.num_experts = experts.num_experts
        self._original = (experts,)  # in a tuple: no submodule, kept for its gate and activation
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        if experts.has_post_expert_norm:
            self.post_expert_norm = experts.post_expert_norm
        # (leaf, expert) -> the stored weights that, one above the other, are its matrix
        self._pieces: dict[tuple[str, int], list[PackedPiece]] = {}
        self._at_once: dict[str, list[ExpertsProduct] | None] = {}

    def forget(self) -> None:
        super().forget()
        self._at_once.clear()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_at_once": {}}

    def project(self, leaf: str, expert: int, x: Tensor) -> Tensor:
        """`x [N, I]` through one expert's matrix -> `[N, O]`, with its bias."""
        original = self._original[0]
        if leaf in self._specs:
            y = self.parts(leaf)[expert].matmul(x)
        elif (leaf, expert) in self._pieces:
            y = torch.cat([piece(x) for piece in self._pieces[leaf, expert]], dim=-1)
        else:
            weight = getattr(self, leaf)[expert]
            y = nn.functional.linear(x, weight.T if original.is_transposed else weight)
        return y + getattr(self, f"{leaf}_bias")[expert] if original.has_bias else y

    def project_at_once(self, leaf: str, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """`x [N, I]` sorted by expert, `expert [N]`, `ends [E]` -> `[N, O]`, each row through its expert's matrix."""
        products = self._products(leaf)
        assert products is not None
        y = torch.cat([product(x, ends) for product in products], dim=-1) if len(products) > 1 else products[0](x, ends)
        return y + getattr(self, f"{leaf}_bias")[expert] if self._original[0].has_bias else y

    def _products(self, leaf: str) -> list[ExpertsProduct] | None:
        """The products with a leaf's matrices of all experts that, side by side, are its result; None where the experts
        have to be gone through one by one."""
        if leaf not in self._at_once:
            self._at_once[leaf] = self._make_products(leaf)
        return self._at_once[leaf]

    def _make_products(self, leaf: str) -> list[ExpertsProduct] | None:
        if leaf in self._specs:
            found = [_experts_product(self._specs[leaf][0], self.stored(leaf))]
        elif (leaf, 0) in self._pieces:
            experts = [self._pieces[leaf, expert] for expert in range(self.num_experts)]
            found = [_product_of_pieces(pieces) for pieces in zip(*experts, strict=True)]
        else:
            return None
        products = [product for product in found if product is not None]
        return products if len(products) == len(found) else None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states [T, H]`, `top_k_index, top_k_weights [T, k]` -> `[T, H]`."""
        from .model import experts_are_observed, run_experts, run_experts_at_once

        original = self._original[0]
        routed = hidden_states, top_k_index, top_k_weights
        leaves = ("gate_up_proj" if original.has_gate else "up_proj", "down_proj")
        if experts_are_observed() or any(self._products(leaf) is None for leaf in leaves):
            return run_experts(original, self.project, *routed)
        return run_experts_at_once(original, self.project_at_once, *routed)


def _experts_product(spec: Entry, tensors: dict[str, Tensor]) -> ExpertsProduct | None:
    return spec.cls.experts_product(tensors, spec.shape, spec.scheme)


def _product_of_pieces(pieces: Sequence[PackedPiece]) -> ExpertsProduct | None:
    """The product with one piece of every expert; their buffers become views of what they are together.

    None where they are not all packed alike, or where there is no kernel for it; they are as they were then.
    """
    specs = [piece._specs["weight"][0] for piece in pieces if piece._specs]
    if len(specs) < len(pieces) or any(spec != specs[0] for spec in specs):
        return None
    stored = [piece.stored() for piece in pieces]
    if any(tensor.device != stored[0][""].device for tensors in stored for tensor in tensors.values()):
        return None
    if _experts_product(specs[0], stored[0]) is None:
        return None
    whole = {suffix: one_tensor([tensors[suffix] for tensors in stored]) for suffix in stored[0]}
    for suffix, tensor in whole.items():
        views = tensor.split([len(tensors[suffix]) for tensors in stored])
        for piece, view in zip(pieces, views, strict=True):
            piece._buffers[f"weight{suffix}"] = view
    for piece in pieces:
        piece.forget()
    return _experts_product(specs[0], whole)


@register_quantizer("acc")
class AccQuantizer(HfQuantizer):
    """Builds the packed modules before transformers fills them."""

    requires_calibration = True

    def __init__(self, quantization_config: AccConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._fused: dict[
            str, set[str]
        ] = {}  # conversion's first source pattern -> experts modules it must leave alone

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Replaces the modules of packed weights. Raises ValueError when the files do not hold exactly what they
        should."""
        from .model import Resolved

        header = _headers(kwargs["checkpoint_files"])
        self._entries = entries(self.quantization_config.to_dict())
        companions: dict[str, dict[str, Tensor]] = {}
        for name, spec in self._entries.items():
            tensors = {suffix: header.get(name + suffix) for suffix in spec.layout()}
            lost = [name + suffix for suffix, tensor in tensors.items() if tensor is None]
            if lost:
                raise ValueError(f"this checkpoint is incomplete: {lost[0]} is missing ({len(lost)} tensors of {name})")
            companions[name] = {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}
        extra = {name + s for name, tensors in companions.items() for s in tensors if s}
        resolved = Resolved(header.keys() - extra, model)
        if resolved.missing:
            raise ValueError(
                f"this checkpoint is incomplete: no tensor for {resolved.missing[0]} ({len(resolved.missing)} in all)"
            )
        for name, tensors in companions.items():
            if name in resolved.targets:
                self._replace(model, name, resolved, self._entries[name], tensors, header)
        _share_inputs(model)

    def _replace(
        self, model: Any, name: str, resolved: Any, spec: Entry, tensors: dict[str, Tensor], header: dict
    ) -> None:
        target = resolved.targets[name]
        path, _, leaf = target.parameter.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            model.set_submodule(path, PackedLinear(module, spec, tensors))
            return
        if not isinstance(module, PackedExperts):
            module = PackedExperts(module)
            model.set_submodule(path, module)
        if target.pattern is None:
            del module._parameters[leaf]
            module.hold(leaf, spec, tensors)
            return
        if leaf in module._parameters:  # from now on every expert's stored weight is a piece of its own
            del module._parameters[leaf]
            for sibling, expert, local in resolved.pieces(target.parameter):
                piece = PackedPiece(None if sibling in self._entries else header[sibling])
                _add(module, local.rpartition(".")[0].removeprefix(f"{path}."), piece)
                module._pieces.setdefault((leaf, expert), []).append(piece)
            for pattern in resolved.patterns(target.parameter):
                self._fused.setdefault(pattern, set()).add(path)
        local = resolved.local(name).rpartition(".")[0].removeprefix(f"{path}.")
        module.get_submodule(local).hold("weight", spec, tensors)  # pyright: ignore

    def update_weight_conversions(self, weight_conversions: list, model: Any) -> list:
        """Takes out the fusing of experts where they are packed."""
        from .model import without_fusing

        return without_fusing(weight_conversions, model, self._fused)


def _add(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at the dotted `path` below `root`, with plain modules in between."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    root.add_module(last, module)


def _share_inputs(model: nn.Module) -> None:
    """Siblings of equal inputs and scheme may be given the same tensor, and could then be multiplied in one launch."""
    for parent in model.modules():
        alike: dict[tuple, list[PackedLinear]] = {}
        for child in parent.children():
            if isinstance(child, PackedLinear):
                spec = child._specs["weight"][0]
                alike.setdefault((child.in_features, *sorted(spec.scheme.items())), []).append(child)
        for siblings in alike.values():
            shared = SharedInput(siblings)
            for key, sibling in enumerate(siblings):
                sibling.share(shared, key)


def _headers(files: list[str]) -> dict[str, Tensor]:
    """Every stored tensor by name, on the meta device."""
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                found[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
    return found


def load(folder: str | Path, planes: int | None = None, **options: Any) -> Any:
    """The model of a folder that acc wrote, packed and ready to generate; `options` go to `from_pretrained`.

    With `planes`, weights of more bit planes keep only their first ones, as a model of fewer bits.

    Raises ValueError when the folder is not whole: index, headers and names are checked before any weight is read.
    """
    from transformers import AutoModelForCausalLM

    from .source import open_source

    source = open_source(str(folder))
    model = AutoModelForCausalLM.from_pretrained(source.folder, **({"dtype": "auto"} | options))
    return model if planes is None else keep_planes(model, planes)


def keep_planes(model: Any, planes: int) -> Any:
    """The loaded model, whose weights of bit planes keep but their first `planes`; the memory of the rest is free.

    Raises ValueError where no weight has as many."""
    holders = [module for module in model.modules() if isinstance(module, Packed)]
    has_planes((spec for module in holders for spec, _ in module._specs.values()), planes)
    for module in holders:
        for leaf, (spec, names) in list(module._specs.items()):
            if (first := spec.first_planes(planes)) is not spec:
                parts = [part.first_planes(planes) for part in module.parts(leaf)]
                assert first.pack(parts).keys() == {name.removeprefix(leaf) for name in names}
                module.hold(leaf, first, first.pack(parts))
        module.forget()
    return model


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    """Every packed matrix of a loaded model, as its modules use it."""
    holders = [module for module in model.modules() if isinstance(module, Packed)]
    return [weight for holder in holders for leaf in holder._specs for weight in holder.parts(leaf)]


def choose_kernels(model: nn.Module) -> None:
    """Has every packed weight read `ACC_KERNELS` anew at its next use; what the old kernels kept is dropped."""
    for module in model.modules():
        if isinstance(module, Packed):
            module.forget()


def resident(model: nn.Module) -> tuple[int, int]:
    """Bytes of a model's parameters and buffers, tied ones once, and of what the kernels keep beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    products = [vars(weight).get("_product") for weight in packed_weights(model)]
    kept = [tensor for product in products for tensor in getattr(product, "kept", [])]
    own, beside = (sum(t.numel() * t.element_size() for t in found) for found in (tensors, kept))
    return own, beside
