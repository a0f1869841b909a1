"""The model as a skeleton without weights: its blocks, what is stored for each, and the four seams to look through.

Besides `hf.py` this is the only file that knows transformers' internals. No class is ever patched: blocks are loaded by
transformers' own weight conversion, and everything that is watched is watched through hooks and registered functions
that
are taken off again.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, LoadStateDictConfig
from transformers.utils import logging as transformers_logging

Role = Literal["linear", "expert_input", "expert_intermediate"]
# A module that chooses experts or scales a shared one. Small, and a wrong choice costs far more than it stores.
_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate|shared_experts_gate)(\.|$)")


@dataclass(frozen=True)
class Matrix:
    """One matrix `[O, I]` of a block: a stored tensor, or one expert's part of a stored 3-D tensor."""

    tensor: str  # the name on disk
    part: int | None  # which matrix of a 3-D tensor; None for a tensor that is one matrix
    module: str  # the module that multiplies by it
    expert: int | None
    role: Role  # what its input is: the linear's own, the expert's tokens, or the expert's activated intermediate
    shape: tuple[int, int]
    transposed: bool = False  # stored as [I, O]

    @property
    def name(self) -> str:
        return self.tensor if self.part is None else f"{self.tensor}[{self.part}]"


@dataclass(frozen=True)
class Target:
    """Where a stored tensor ends."""

    parameter: str  # the module's parameter
    pattern: str | None  # the conversion that brings it there, None for a plain renaming


@dataclass(frozen=True)
class AttentionLayer:
    """The softmax attention of one decoder layer: query head `h` reads the keys of head `h // (heads // kv_heads)`."""

    index: int
    path: str  # of the module; "" where there is none
    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys
    refused: str | None  # why nothing is calibrated or made sparse in it


class Resolved:
    """Every stored tensor and the parameter it becomes, by transformers' own renamings and conversions."""

    def __init__(self, names: Iterable[str], model: Any):
        state = model.state_dict()
        self.conversions: list[Any] = get_model_conversion_mapping(model)
        self._renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        self._prefix, self._state = model.base_model_prefix, state
        self.targets: dict[str, Target] = {}
        self.strays: list[str] = []  # stored tensors that no parameter takes, e.g. extra prediction heads
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            if target in state:
                self.targets[name] = Target(target, pattern)
            else:
                self.strays.append(name)
        taken = {t.parameter for t in self.targets.values()}
        tied = set(model.all_tied_weights_keys)
        self.missing = [p for p in state if p not in taken and p not in tied and not self._filled_with(p, taken)]

    def _filled_with(self, parameter: str, taken: set[str]) -> bool:
        """A stored tensor that is cut into several parameters is recorded under the first of them only."""
        for conversion in self._converters:
            first, *others = conversion.target_patterns
            if any(o in parameter and parameter.replace(o, first) in taken for o in others):
                return True
        return False

    def local(self, name: str) -> str:
        """The tensor's name after renaming alone, as if nothing were fused."""
        return rename_source_key(name, self._renamings, [])[0]

    def pieces(self, parameter: str) -> list[tuple[str, int, str]]:
        """The stored tensors that are fused into a parameter: name, expert, name after renaming; in fusing order."""
        order = {p: i for c in self._converters for i, p in enumerate(c.source_patterns)}
        seen: dict[str | None, int] = {}
        found = []
        for name, target in self.targets.items():
            if target.parameter == parameter:
                expert = seen[target.pattern] = seen.get(target.pattern, -1) + 1
                found.append((order.get(target.pattern or "", 0), name, expert))
        return [(name, expert, self.local(name)) for _, name, expert in sorted(found, key=lambda f: f[0])]

    def patterns(self, parameter: str) -> set[str]:
        return {t.pattern for t in self.targets.values() if t.parameter == parameter and t.pattern is not None}


def without_fusing(conversions: list[Any], model: Any, packed: Mapping[str, set[str]]) -> list[Any]:
    """Conversions that leave packed experts alone: `packed` maps a source pattern to the experts modules to be skipped.

    A conversion that other, dense, layers still need is kept for those layers only.
    """
    kept: list[Any] = []
    for conversion in conversions:
        skip = set().union(*(packed.get(p, set()) for p in conversion.source_patterns))
        if not skip or not isinstance(conversion, WeightConverter):
            kept.append(conversion)
            continue
        for path, module in model.named_modules():
            if hasattr(module, "is_transposed") and path not in skip:
                scoped = conversion.copy(
                    list(conversion._original_source_patterns),
                    list(conversion._original_target_patterns),
                    operations=list(conversion.operations),
                )
                layer = re.match(r"(.*\.\d+)\.", path)
                assert layer is not None
                scoped.base_model_prefix = model.base_model_prefix
                scoped.scope_prefix = layer.group(1).removeprefix(f"{model.base_model_prefix}.")
                kept.append(scoped)
    return kept


class Skeleton:
    """A causal language model on the meta device, into which one block at a time is loaded.

    Raises ValueError naming the family when the model is of a kind that cannot be streamed.
    """

    def __init__(
        self,
        folder: str,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: str = "cpu",
        changes: Mapping[str, Any] | None = None,
    ):
        """`folder` holds config.json, of which `changes` replaces keys; `shapes` are those of the dense tensors."""
        self.device = torch.device(device)
        self.dtype = dtype
        self.shapes = dict(shapes)
        config = AutoConfig.from_pretrained(folder, **(changes or {}))
        config.__dict__.pop("quantization_config", None)
        self.family = config.model_type
        try:
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(
                f"{self.family} models are not supported: transformers has no causal language model of that family"
            ) from None
        self.model.eval().requires_grad_(False)
        depth = config.get_text_config(decoder=True).num_hidden_layers
        lists = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
        if len(lists) > 1:  # a vision tower may be as deep as the decoder
            inside = {id(m) for m in self.model.get_decoder().modules()}
            lists = {n: m for n, m in lists.items() if id(m) in inside} or lists
        if not lists:
            raise ValueError(f"{self.family} models are not supported: no list of decoder layers was found in them")
        self.prefix, self.layers = next(iter(lists.items()))
        self._has_experts = self._check_experts()
        if self._has_experts:
            self.model.set_experts_implementation("acc_stream")
        self._resolve_names()

    def _check_experts(self) -> bool:
        """Whether there are fused experts. Raises ValueError for those that the experts seam does not serve."""
        found = False
        for name, module in self.layers.named_modules():
            if any(p.dim() == 3 for p in module.parameters(recurse=False)) and hasattr(module, "num_experts"):
                if not hasattr(module, "is_transposed"):
                    raise ValueError(
                        f"{self.family} models are not supported: {type(module).__name__} ({name}) does not run through"
                        " transformers' experts interface, so its experts can be neither observed nor replaced"
                    )
                found = True
        return found

    def _resolve_names(self) -> None:
        resolved = self._resolved = Resolved(self.shapes, self.model)
        self.conversions, self.targets, self.strays = resolved.conversions, resolved.targets, resolved.strays
        if resolved.missing:
            raise ValueError(
                f"the checkpoint lacks {len(resolved.missing)} tensors of a {self.family} model, e.g. "
                + ", ".join(resolved.missing[:3])
            )
        block = re.compile(re.escape(self.prefix) + r"\.(\d+)\.")
        self.block_names: list[list[str]] = [[] for _ in self.layers]
        self.outer_names: list[str] = []
        for name, target in self.targets.items():
            found = block.match(target.parameter)
            (self.block_names[int(found.group(1))] if found else self.outer_names).append(name)

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    # Loading and dropping

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts stored tensors (by disk name) into the skeleton, through transformers' weight conversion.

        `tensors` is asked for each once, when the parameter that it becomes is made: of a mapping that reads them from
        a file no more than one parameter's are in memory beside the model.
        """
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(
                self.model,
                {name: _Later(tensors, name) for name in tensors},
                LoadStateDictConfig(
                    dtype=self.dtype,
                    dtype_plan=self.model._get_dtype_plan(self.dtype),
                    weight_mapping=self.conversions,
                    # with something to be left on disk, transformers does not fetch tensors ahead, in threads
                    device_map={"": self.device, "nothing": "disk"},
                ),
            )
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
        if info.mismatched_keys or info.conversion_errors or info.unexpected_keys:
            what = (
                sorted(map(str, info.mismatched_keys)) or sorted(info.conversion_errors) or sorted(info.unexpected_keys)
            )
            raise ValueError(f"the checkpoint does not fit a {self.family} model: {what[0]}")

    def load_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        self.load(tensors)
        self._fill_buffers(self.layers[index])
        return self.layers[index].requires_grad_(False)

    def drop_block(self, index: int) -> None:
        self.layers[index].to("meta")

    @contextlib.contextmanager
    def outer(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Everything but the blocks (embeddings, final norm, head) is in memory inside the context."""
        outside = [m for n, m in self.model.named_modules() if not f"{n}.".startswith(f"{self.prefix}.")]
        self.load(tensors)
        self.model.tie_weights(
            missing_keys=set(self.model.all_tied_weights_keys) - {t.parameter for t in self.targets.values()}
        )
        for module in outside:
            self._fill_buffers(module, recurse=False)
        try:
            yield
        finally:
            for module in outside:
                for name, p in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(p.to("meta"), requires_grad=False))
            self.model.tie_weights()

    def _fill_buffers(self, root: nn.Module, recurse: bool = True) -> None:
        """Computes the buffers that no file stores (rotary frequencies, embedding scales), as transformers would."""
        for module in root.modules() if recurse else [root]:
            empty = [
                n
                for n, b in module.named_buffers(recurse=False)
                if b.is_meta and n in module._non_persistent_buffers_set
            ]
            if not empty:
                continue
            for name in empty:
                blank = torch.zeros_like(module.get_buffer(name), device=self.device)
                module._buffers[name] = blank.fill_(torch.nan) if blank.is_floating_point() else blank
            self._owner(module)._init_weights(module)
            for name in empty:
                value = module.get_buffer(name)
                if value.is_floating_point() and value.isnan().any():
                    raise ValueError(
                        f"{self.family} models are not supported: there is no way to rebuild the buffer {name!r}"
                        f" of {type(module).__name__}"
                    )

    def _owner(self, module: nn.Module) -> Any:
        """The innermost pretrained model that holds `module`: its `_init_weights` knows it."""
        name = next(n for n, m in self.model.named_modules() if m is module)
        path = name.split(".")
        for end in range(len(path), -1, -1):
            candidate = self.model.get_submodule(".".join(path[:end]))
            if candidate is not module and hasattr(candidate, "_init_weights"):
                return candidate
        return self.model

    # What is in a block

    def matrices(self, index: int) -> list[Matrix]:
        """The matrices of a block that a method may compress, in the order of the files. Routers are not among them."""
        found: list[Matrix] = []
        counts: dict[tuple[str, str | None], int] = {}
        for name in self.block_names[index]:
            target = self.targets[name]
            path, _, leaf = target.parameter.rpartition(".")
            module, shape = self.model.get_submodule(path), self.shapes[name]
            position = counts.get((target.parameter, target.pattern), 0)
            counts[target.parameter, target.pattern] = position + 1
            if isinstance(module, nn.Linear) and leaf == "weight" and not _ROUTER.search(path):
                if target.pattern is None and len(shape) == 2:
                    found.append(Matrix(name, None, path, None, "linear", shape))
            elif hasattr(module, "is_transposed") and leaf in ("gate_up_proj", "up_proj", "down_proj"):
                role: Role = "expert_intermediate" if leaf == "down_proj" else "expert_input"
                if target.pattern is not None and len(shape) == 2:
                    found.append(Matrix(name, None, path, position, role, shape))
                elif target.pattern is None and len(shape) == 3:
                    t = bool(module.is_transposed)
                    matrix = (shape[2], shape[1]) if t else (shape[1], shape[2])
                    found += [Matrix(name, e, path, e, role, matrix, t) for e in range(shape[0])]
        return found

    def place(self, matrix: Matrix) -> tuple[nn.Parameter, Callable[[Tensor], Tensor]]:
        """The parameter that a matrix of a loaded block is in, and what cuts the matrix `[O, I]`, a view, out of it or
        out of a tensor of its shape."""
        target = self.targets[matrix.tensor]
        parameter, expert = self.model.get_parameter(target.parameter), matrix.expert
        if expert is None:
            return parameter, lambda whole: whole
        if target.pattern is None:
            return parameter, lambda whole: whole[expert].T if matrix.transposed else whole[expert]
        first = 0  # of the rows, where an expert's matrices lie one above the other
        for name, of, _ in self._resolved.pieces(target.parameter):
            if name == matrix.tensor:
                break
            first += self.shapes[name][0] if of == expert else 0
        return parameter, lambda whole: whole[expert, first : first + matrix.shape[0]]

    def outer_matrices(self) -> list[Matrix]:
        """The output head, where it is a stored matrix of its own and not the embeddings' twin."""
        head = self.model.get_output_embeddings()
        found = []
        for name in self.outer_names:
            target = self.targets[name]
            path, _, leaf = target.parameter.rpartition(".")
            if leaf == "weight" and isinstance(head, nn.Linear) and self.model.get_submodule(path) is head:
                found.append(Matrix(name, None, path, None, "linear", (head.out_features, head.in_features)))
        return found

    # The block seam

    def frame(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[tuple[tuple, dict[str, Any]]]]:
        """What transformers itself would hand to each block for `ids [B, T]` with padding `mask [B, T]`.

        Returns the embedded input `[B, T, H]` and per block the other positional and keyword arguments (masks, position
        embeddings). To be called inside `outer`. Raises ValueError when the model alters the residual stream between
        blocks, where nothing could follow it.
        """
        calls: list[tuple[tuple, dict[str, Any]]] = []
        first: list[Tensor] = []

        def record(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index != len(calls) or (first and hidden is not first[0]):
                raise ValueError(
                    f"{self.family} models are not supported: they change hidden states before block {index}"
                )
            first.append(hidden)
            calls.append((args, {k: v for k, v in kwargs.items() if v is not None}))
            if index == len(self.layers) - 1:
                raise _Stop
            return hidden

        with self._forwards(record), contextlib.suppress(_Stop):
            self._call(ids, mask)
        if len(calls) != len(self.layers):
            raise ValueError(
                f"{self.family} models are not supported: only {len(calls)} of {len(self.layers)} blocks are run"
            )
        return first[0], calls

    def logits(self, ids: Tensor, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """`hidden [B, T, H]` after the last block -> logits `[B, T, V]`, by the model's own final norm and head."""

        def replay(index: int, unused: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden

        with self._forwards(replay):
            return self._call(ids, mask).logits

    def final(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """`hidden [B, T, H]` after the last block -> the same after the final norm. Gradients flow."""
        with self._forwards(lambda index, unused, *args, **kwargs: hidden):
            return self.model.get_decoder()(input_ids=ids.to(self.device), use_cache=False).last_hidden_state

    def _call(self, ids: Tensor, mask: Tensor | None) -> Any:
        extra = {} if mask is None else {"attention_mask": mask.to(self.device)}
        return self.model(input_ids=ids.to(self.device), use_cache=False, **extra)

    @contextlib.contextmanager
    def _forwards(self, function: Callable) -> Iterator[None]:
        """Every block's `forward` is `function(index, hidden, ...)` inside the context."""
        try:
            for index, layer in enumerate(self.layers):
                layer.forward = _bind(function, index)
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def attention_layers(self) -> list[AttentionLayer]:
        """The attention of every decoder layer, in order, as its module and the config describe it."""
        return [attention_layer(self.model.config, self.layers, self.prefix, i) for i in range(len(self.layers))]

    # The linear, experts and attention seams

    @contextlib.contextmanager
    def observe_linears(
        self, root: nn.Module, paths: list[str], see: Callable[[str, Tensor], None]
    ) -> Iterator[dict[str, str]]:
        """Calls `see(leader, x)` with each distinct input of the named linears whenever `root`, which holds them, runs.

        Yields `{path: leader}`: linears that were handed the same tensor share the statistic of the first of them.
        """
        leaders: dict[str, str] = {}
        seen: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its id is not given to another one

        def hook(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            leader, _ = seen.setdefault(id(x), (path, x))
            if leaders.setdefault(path, leader) != leader:
                raise ValueError(
                    f"{path} shares its input with {leader} in one batch and with {leaders[path]} in another"
                )
            if leader == path:
                see(path, x)

        handles = [root.register_forward_pre_hook(lambda module, args: seen.clear())]
        for p in paths:
            handles.append(self.model.get_submodule(p).register_forward_pre_hook(lambda m, a, p=p: hook(p, m, a)))
        try:
            yield leaders
        finally:
            for handle in handles:
                handle.remove()
            seen.clear()

    @contextlib.contextmanager
    def observe_experts(self, see: Callable[[str, int, Role, Tensor, Tensor], None]) -> Iterator[None]:
        """Calls `see(path, expert, role, tokens, x)` for each expert that was hit: `tokens [N]` are row numbers of the
        flattened batch, `x [N, I]` is the expert's input or its activated intermediate."""
        names = {id(m): n for n, m in self.model.named_modules() if hasattr(m, "is_transposed")}

        def forward(module: nn.Module, expert: int, role: Role, tokens: Tensor, x: Tensor) -> None:
            see(names[id(module)], expert, role, tokens, x)

        _EXPERT_OBSERVERS.append(forward)
        try:
            yield
        finally:
            _EXPERT_OBSERVERS.remove(forward)

    @contextlib.contextmanager
    def observe_attention(self, see: Callable[..., None]) -> Iterator[None]:
        """Calls `see(module, query, key, value, attention_mask, **kwargs)` in every softmax attention layer, with
        `query [B, H, T, D]` and `key, value [B, Hkv, S, D]` after position embedding. Outputs are unchanged.

        Raises ValueError for a model whose attention cannot be observed."""

        def run(dense: Callable, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
            see(module, query, key, value, mask, **kwargs)
            return dense(module, query, key, value, mask, **kwargs)

        with self.replace_attention(run):
            yield

    @contextlib.contextmanager
    def replace_attention(self, run: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
        """`run(dense, module, query, key, value, attention_mask, **kwargs) -> (output [B, T, H, D], weights or None)`
        takes the place of every softmax attention, which is `dense(module, query, ...)`; shapes as above. Inside
        another such context `dense` is what the outer one runs.

        Raises ValueError for a model whose attention cannot be observed."""
        base = self.model.config._attn_implementation.removeprefix("acc_")
        if base not in ("sdpa", "eager") or not self.model._can_set_attn_implementation():
            raise ValueError(f"{self.family}: attention of kind {base!r} cannot be observed")
        self.model.set_attn_implementation(f"acc_{base}")
        _ATTENTION_RUNS.append(run)
        try:
            yield
        finally:
            _ATTENTION_RUNS.remove(run)
            if not _ATTENTION_RUNS:
                self.model.set_attn_implementation(base)


def attention_layer(config: Any, layers: nn.ModuleList, prefix: str, index: int) -> AttentionLayer:
    """The attention of decoder layer `index`; `layers` stand at `prefix` in the model that `config` describes."""
    config = config.get_text_config(decoder=True)
    named = ((n, m) for n, m in layers[index].named_modules() if hasattr(m, "layer_idx"))
    name, module = next(((n, m) for n, m in named if "Attention" in type(m).__name__), ("", None))
    heads = config.num_attention_heads
    if module is None:
        other = [type(m).__name__ for m in layers[index].children()][:1]
        return AttentionLayer(index, "", heads, 0, 0, f"no softmax attention, but {', '.join(other)}")
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds else "full_attention"
    window = module.sliding_window if hasattr(module, "sliding_window") else getattr(config, "sliding_window", None)
    refused = None
    if hasattr(module, "kv_lora_rank"):
        refused = "multi-head latent attention (MLA), which keeps no keys per head"
    elif kind != "full_attention":
        refused = kind.replace("_", " ") + (f" over {window} tokens, sparse already" if window else "")
    elif window and window < config.max_position_embeddings:
        refused = f"sliding attention over {window} tokens, sparse already"
    elif getattr(module, "sinks", None) is not None:
        refused = "learned sinks in its softmax"
    elif getattr(module, "attn_logit_softcapping", None):
        refused = "capped attention scores"
    kv_heads = heads // getattr(module, "num_key_value_groups", 1)
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // heads
    return AttentionLayer(index, f"{prefix}.{index}.{name}", heads, kv_heads, head_dim, refused)


def linear_modules(folder: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, str]:
    """`{stored name: module}` of every plain linear layer; one whose weight is tied, and not stored, under its
    parameter's name. Raises ValueError as `Skeleton`."""
    skeleton = Skeleton(folder, shapes, dtype)
    stored = {target.parameter: name for name, target in skeleton.targets.items() if target.pattern is None}
    paths = [path for path, module in skeleton.model.named_modules() if type(module) is nn.Linear]
    return {stored.get(f"{path}.weight", f"{path}.weight"): path for path in paths}


class _Later:
    """A tensor that is fetched from its mapping when transformers asks for all of it, as of a slice of a file."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str):
        self._tensors, self._name = tensors, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensors[self._name][index]


class _Stop(Exception):
    """Ends a forward whose only purpose was to see what the blocks are given."""


def _bind(function: Callable, index: int) -> Callable:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(index, hidden_states, *args, **kwargs)

    return forward


_EXPERT_OBSERVERS: list[Callable[[nn.Module, int, Role, Tensor, Tensor], None]] = []
_ATTENTION_RUNS: list[Callable[..., tuple[Tensor, Tensor | None]]] = []


def run_experts(
    module: Any,
    project: Callable[[str, int, Tensor], Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Runs experts one by one: `hidden_states [T, H]`, `top_k_index, top_k_weights [T, k]` -> `[T, H]`.

    `project(leaf, expert, x)` multiplies by one expert's matrix and adds its bias; gate, activation and norm are the
    module's own. The same products in the same order as transformers' own loop, with observers told what each expert
    sees.
    An index equal to the number of experts marks a slot without expert and is skipped.
    """
    result = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= module.num_experts:
            continue
        slot, token = torch.where(top_k_index.T == expert)
        x = hidden_states[token]
        _tell_experts(module, expert, "expert_input", token, x)
        up = project("gate_up_proj" if module.has_gate else "up_proj", expert, x)
        inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        _tell_experts(module, expert, "expert_intermediate", token, inner)
        out = project("down_proj", expert, inner)
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        out = out * top_k_weights[token, slot, None]
        result.index_add_(0, token, out.to(result.dtype))
    return result


def run_experts_at_once(
    module: Any,
    project: Callable[[str, Tensor, Tensor, Tensor], Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """As `run_experts`, one product over all experts per projection; nothing waits for the device, nobody observes.

    `project(leaf, x, expert, ends)` multiplies each row of `x [N, I]`, `N = T · k` sorted by expert, by the matrix of
    its expert and adds the bias: `expert [N]` for each row, `ends` int32 `[E]` the row after the last one of each. Rows
    past the last end are for no expert: they may hold any finite number, and go under the name of the last expert.
    """
    (tokens, slots), experts = top_k_index.shape, module.num_experts
    expert, order = top_k_index.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True, out_int32=True)
    spare, expert = (expert >= experts)[:, None], expert.clamp(max=experts - 1)
    up = project("gate_up_proj" if module.has_gate else "up_proj", hidden_states[order // slots], expert, ends)
    inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    y = project("down_proj", inner, expert, ends)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = (y * top_k_weights.flatten()[order, None]).masked_fill(spare, 0)
    sorted_back = torch.empty_like(y).index_copy_(0, order, y)
    return sorted_back.view(tokens, slots, y.shape[-1]).sum(1).to(hidden_states.dtype)


def experts_are_observed() -> bool:
    """Whether `run_experts` has somebody to tell what each expert sees."""
    return bool(_EXPERT_OBSERVERS)


def stream_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function that streamed models run: `run_experts` over the module's dense weights."""

    def project(leaf: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(module, leaf)[expert]
        y = nn.functional.linear(x, weight.T if module.is_transposed else weight)
        return y + getattr(module, f"{leaf}_bias")[expert] if module.has_bias else y

    return run_experts(module, project, hidden_states, top_k_index, top_k_weights)


def _tell_experts(module: nn.Module, expert: int, role: Role, tokens: Tensor, x: Tensor) -> None:
    for see in _EXPERT_OBSERVERS:
        see(module, expert, role, tokens, x)


def _open_attention(base: str) -> Callable:
    def attention(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if base == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[base]
        for run in _ATTENTION_RUNS:
            function = partial(run, function)
        return function(module, *args, **kwargs)

    return attention


ExpertsInterface.register("acc_stream", stream_experts)
for _name, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(f"acc_{_name}", _open_attention(_name))
    AttentionMaskInterface.register(f"acc_{_name}", _mask)
