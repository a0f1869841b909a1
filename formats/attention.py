"""Models that attend as a plan says: `attach`, the attention function `acc`, and a cache that holds what is needed.

The function is registered with transformers' attention and mask interfaces, so no class is patched and every family
that transformers supports natively runs. Beside `model.py` and `hf.py` this is the only file that knows its internals:
an attention function is handed keys and values that a cache returned, and only a cache layer of our own can hold less
than all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .attention_plan import AttentionPlan, LayerPlan, PlannedAttention
from .model import Skeleton, attention_layer, decoder_layers

Function = Callable[..., tuple[Tensor, Tensor | None]]  # what the attention interface registers
Pair = tuple[Tensor, Tensor]  # keys and values
MASKS: dict[str, Callable[..., Tensor | None]] = {"sdpa": sdpa_mask, "eager": eager_mask}
NAMES = {"sdpa": "acc", "eager": "acc_over_eager"}  # of our function, by what layers without a plan run
AHEAD = 16  # tokens for which a growing cache has room at least
SLACK = 64  # tokens that a streaming head's cache gathers before it lets the oldest go
MASK_NUMBERS = 1 << 26  # in a mask of dense heads' chunk: their queries are taken in slices


def attach(model: Any, plan: AttentionPlan) -> Any:
    """Makes a transformers model, packed or dense, attend as `plan` says; returns it. `detach` takes it back.

    Layers without a plan run the implementation that the model had. Keys and values are kept as in a `PlanCache` by
    `model.generate`, and whenever an empty `DynamicCache` or a `PlanCache` is passed as `past_key_values`. With another
    cache, or none, the same is computed, but no memory is saved.

    Raises ValueError when the plan is for other layers than the model's, and for models whose attention cannot be
    exchanged.
    """
    detach(model)
    prefix, layers = decoder_layers(model)
    found = [attention_layer(model.config, layers, prefix, i) for i in range(len(layers))]
    plan.check(found)
    config = model.config.get_text_config(decoder=True)
    base = {name: base for base, name in NAMES.items()}.get(config._attn_implementation, config._attn_implementation)
    if base not in MASKS or not model._can_set_attn_implementation():
        raise ValueError(
            f"{model.config.model_type}: attention of kind {base!r} cannot follow a plan; load the model with"
            " attn_implementation='sdpa'"
        )
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(f"{model.config.model_type}: its layers share keys and values, which a plan cannot follow")
    for layer, one in zip(found, plan.layers, strict=True):
        if one is not None:
            _SEATS[model.get_submodule(layer.path)] = Seat(layer.index, one, base)
    _HOOKS[model] = model.register_forward_pre_hook(_on_call, with_kwargs=True)
    _set_implementation(model, config, NAMES[base])
    return model


def detach(model: Any) -> Any:
    """Takes a plan back: the model attends as it did before `attach`. Nothing happens when there is none."""
    hook = _HOOKS.pop(model, None)
    if hook is not None:
        hook.remove()
        for module in model.modules():
            _SEATS.pop(module, None)
        config = model.config.get_text_config(decoder=True)
        _set_implementation(model, config, next(b for b, n in NAMES.items() if n == config._attn_implementation))
    return model


def planned(plan: AttentionPlan, skeleton: Skeleton) -> Function:
    """What `Skeleton.replace_attention` runs to let a streamed model attend as in prefill. Raises as `attach`."""
    plan.check(skeleton.attention_layers())
    base = skeleton.model.config._attn_implementation.removeprefix("acc_")
    seats = {i: Seat(i, one, base) for i, one in enumerate(plan.layers) if one is not None}

    def run(dense: Function, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seat = seats.get(module.layer_idx)
        if seat is None:
            return dense(module, query, key, value, mask, **kwargs)
        return seat(dense, module, query, key, value, **kwargs)  # sequences are whole and not padded

    return run


class Seat:
    """The place of one attention module that has a plan."""

    def __init__(self, layer: int, plan: LayerPlan, base: str):
        self.layer, self.plan, self.base = layer, plan, base
        self._on: dict[tuple[torch.device, torch.dtype, int], PlannedAttention] = {}

    def __deepcopy__(self, memo: Any) -> Seat:
        return self  # copies of a cache are for the same module

    def on(self, value: Tensor) -> PlannedAttention:
        """The plan for tensors such as `value [B, H, S, Dv]`."""
        key = value.device, value.dtype, value.shape[-1]
        if key not in self._on:
            self._on[key] = PlannedAttention(self.plan, *key)
        return self._on[key]

    def split(self, key: Tensor, value: Tensor) -> tuple[Pair, Pair]:
        """Keys and values of all heads -> those of the full heads, those of the streaming ones."""
        if not self.plan.streams:
            return (key, value), (key[:, :0], value[:, :0])
        on = self.on(value)
        return (key[:, on.full], value[:, on.full]), (key[:, on.streams], value[:, on.streams])

    def __call__(
        self, dense: Function, module: Any, query: Tensor, key: Tensor, value: Tensor, *,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """As an attention function, without a mask: query `[B, H, T, D]`, of the last `T` of `S` tokens."""
        on = self.on(value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer: PlanLayer | None = getattr(key, "_acc_layer", None)
        if layer is None:
            full, streaming = self.split(key, value)
            label = on.label(full[0]) if query.shape[2] == 1 and self.plan.full else None
        else:
            full, streaming, label = layer.take(self)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _causal(dense, self.base, module, q, k, v, scaling=scaling, **kwargs).transpose(1, 2)

        out = query.new_empty(*query.shape[:3], value.shape[-1])
        if self.plan.streams:
            out[:, on.stream_queries] = on.streaming(query[:, on.stream_queries], *streaming, scale)
        if self.plan.full:
            heads = on.full_queries if self.plan.streams else slice(None)
            if query.shape[2] == 1:
                out[:, heads] = on.decode(query[:, heads], *full, label, scale, run)
            else:
                out[:, heads] = on.prefill(query[:, heads], *full, scale, run)
        return out.transpose(1, 2).contiguous(), None


class PlanCache(Cache):
    """The keys and values of a model that `attach` gave a plan.

    Layers with a plan keep, of streaming heads, the sinks and the recent tokens, whatever the length of the context;
    of full heads everything, and labels beside it. Other layers keep what transformers' own cache would. Keys keep the
    position that they had. Works for beams and batches of equal length; what streaming heads have let go cannot come
    back, so `crop`, and with it assisted decoding, is refused where there are any.

    Raises ValueError for a model without a plan.
    """

    def __init__(self, model: Any):
        if model not in _HOOKS:
            raise ValueError("the model has no plan; give it one first: acc.attach(model, plan)")
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        _plan_layers(model, cache)
        super().__init__(layers=cache.layers)

    @property
    def nbytes(self) -> int:
        """Bytes that are held, with the room ahead."""
        return sum(_held(layer) for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that a cache which keeps everything would hold for the layers with a plan, without room ahead, and
        those of the others as they are."""
        return sum(layer.dense_nbytes if isinstance(layer, PlanLayer) else _held(layer) for layer in self.layers)


def _held(layer: Any) -> int:
    if isinstance(layer, PlanLayer):
        return layer.nbytes
    return sum(t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)


class PlanLayer(CacheLayerMixin):
    """What is kept of one layer with a plan.

    `update` takes new keys and values and returns them as they are: the layer's attention function, which runs next,
    takes what else it needs from here. Were another one to run, it would see the new tokens only; the next update
    finds out and raises.
    """

    def __init__(self, seat: Seat):
        super().__init__()
        self.seat, self.seen = seat, 0
        self.is_croppable = not seat.plan.streams
        self._row = 0  # bytes of a token, all heads
        self._given: tuple[Pair, Pair, Tensor | None] | None = None
        sink, recent = seat.plan.window if seat.plan.streams else (0, 1)
        self._full: tuple[Rows, Rows, Rows] = Rows(), Rows(), Rows()  # keys, values, labels
        self._recent: tuple[Rows, Rows] = Window(sink, recent), Window(sink, recent)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._row = sum(t[:, :, 0].nbytes for t in (key_states, value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raises ValueError when acc's attention function did not take what the last update gave."""
        if self._given is not None:
            raise ValueError(
                f"layer {self.seat.layer}: its keys are in a PlanCache, but acc's attention did not run; attach the"
                " plan to the model that the cache is for"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        full, streaming = self.seat.split(key_states, value_states)
        label = None
        if self.seat.plan.full:
            label = self.seat.on(value_states).label(full[0])
            label = None if label is None else self._full[2].append(label)
            full = self._full[0].append(full[0]), self._full[1].append(full[1])
        if self.seat.plan.streams:
            streaming = self._recent[0].append(streaming[0]), self._recent[1].append(streaming[1])
        self._given = full, streaming, label
        key = key_states.view_as(key_states)  # a tensor of its own, known to no one else
        key._acc_layer = self  # pyright: ignore[reportAttributeAccessIssue]
        return key, value_states

    def take(self, seat: Seat) -> tuple[Pair, Pair, Tensor | None]:
        """Keys and values of the full and of the streaming heads, and labels, for the queries of the last update."""
        if seat is not self.seat or self._given is None:
            raise ValueError(f"layer {seat.layer} reads the keys of layer {self.seat.layer} of a PlanCache")
        given, self._given = self._given, None
        return given

    @property
    def _rows(self) -> tuple[Rows, ...]:
        return *self._full, *self._recent

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows)

    @property
    def dense_nbytes(self) -> int:
        return self._row * self.seen

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen, self._given, self.is_initialized = 0, None, False
        for rows in self._rows:
            rows.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens. Raises ValueError where there are streaming heads."""
        if tokens_to_remove == 0:
            return
        if self.seat.plan.streams:
            raise ValueError(
                f"layer {self.seat.layer} has streaming heads, which cannot go back: generate without assistance, or"
                " make the plan with sparsity 0"
            )
        self.seen -= abs(tokens_to_remove)
        for rows in self._full:
            rows.length = min(rows.length, self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda held: held[indices])

    def offload(self) -> None:
        self._change(lambda held: held.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda held: held.to(self.device, non_blocking=True))

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        for rows in self._rows:
            if rows.held is not None:
                before, rows.held = rows.held.shape[0], function(rows.held)
        if self.is_initialized:
            first = next(rows.held for rows in self._rows if rows.held is not None)
            self._row = self._row * first.shape[0] // before


class Rows:
    """`[B, H, S, ·]`, one row per token, with room ahead: a token more is rarely a copy of the others."""

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self.length = 0

    @property
    def nbytes(self) -> int:
        return 0 if self.held is None else self.held.nbytes

    def clear(self) -> None:
        self.held, self.length = None, 0

    def append(self, rows: Tensor) -> Tensor:
        """Takes new rows; returns a view of all of them."""
        end = self.length + rows.shape[2]
        held = self._with_room(end, rows)
        held[:, :, self.length : end] = rows
        self.length = end
        return held[:, :, :end]

    def _with_room(self, end: int, like: Tensor) -> Tensor:
        if self.held is None or end > self.held.shape[2]:
            room = like.new_empty(*like.shape[:2], self.room(end), like.shape[3])
            if self.held is not None:
                room[:, :, : self.length] = self.held[:, :, : self.length]
            self.held = room
        return self.held

    def room(self, end: int) -> int:
        return end + max(AHEAD, end // 16)


class Window(Rows):
    """The first `sink` rows and at least the last `recent - 1`: what the next token sees besides itself.

    Rows that are neither are let go once `SLACK` of them have gathered, so that the size is constant."""

    def __init__(self, sink: int, recent: int):
        super().__init__()
        self.sink, self.before = sink, recent - 1

    def room(self, end: int) -> int:
        return min(super().room(end), self.sink + self.before + SLACK)

    def append(self, rows: Tensor) -> Tensor:
        """Takes new rows; returns those that they may see, in order, and themselves."""
        end = self.length + rows.shape[2]
        if end <= self.sink + self.before + SLACK:
            return super().append(rows)
        whole = rows
        if self.held is not None and self.length:
            late = max(self.sink, self.length - self.before)
            whole = torch.cat([self.held[:, :, : self.sink], self.held[:, :, late : self.length], rows], dim=2)
        keep = self.sink + self.before
        self.length = 0
        held = self._with_room(keep + SLACK, rows)
        if whole.shape[2] <= keep + SLACK:
            held[:, :, : whole.shape[2]] = whole
            self.length = whole.shape[2]
        else:
            held[:, :, : self.sink] = whole[:, :, : self.sink]
            held[:, :, self.sink : keep] = whole[:, :, whole.shape[2] - self.before :]
            self.length = keep
        return whole


def _attention(
    base: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The function that is registered as NAMES[base]."""
    if base == "eager":
        dense: Function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        dense = ALL_ATTENTION_FUNCTIONS[base]
    seat = _SEATS.get(module)
    if seat is not None:
        if mask is not None:
            raise ValueError(
                f"layer {seat.layer} follows a plan, which knows no padding, no mask of one's own and no static cache:"
                " give prompts of equal length, or one at a time, or acc.detach(model)"
            )
        return seat(dense, module, query, key, value, **kwargs)
    if hasattr(key, "_acc_layer"):
        raise ValueError(f"layer {module.layer_idx} has no plan, but its keys are in a PlanCache that has one for it")
    if mask is None and kwargs.get("is_causal") is not False and getattr(module, "is_causal", True):
        mask = _causal_mask(base, query, query.shape[2], key.shape[2])
    return dense(module, query, key, value, mask, **kwargs)


def _mask(
    base: str,
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> Tensor | None:
    """The mask function that is registered as NAMES[base]: none where queries are the last tokens, see all before them
    and nothing is padded. For a chunk of a long prompt that mask would be large, so the layers that need it make it.
    Any other is the base's, as a tensor, which layers with a plan refuse."""
    last = kv_offset == 0 and bool(q_offset + q_length == kv_length)  # not so in a cache of fixed length
    padded = attention_mask is not None and not bool(attention_mask.all())
    if mask_function is causal_mask_function:
        if last and allow_is_causal_skip and not padded:
            return None
        allow_is_causal_skip = False
    return MASKS[base](
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **others,
    )


def _causal_mask(base: str, query: Tensor, rows: int, keys: int) -> Tensor | None:
    """What the base would be given for the last `rows` of `keys` tokens without padding."""
    return MASKS[base](
        batch_size=query.shape[0],
        q_length=rows,
        kv_length=keys,
        q_offset=keys - rows,
        kv_offset=0,
        dtype=query.dtype,
        device=query.device,
    )


def _causal(
    dense: Function, base: str, module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> Tensor:
    """Dense causal attention of some KV heads, `[B, T, H, Dv]`; in slices of queries where a mask is needed."""
    rows, keys = query.shape[2], key.shape[2]
    if rows == 1 or (base == "sdpa" and rows == keys):
        return dense(module, query, key, value, None, **kwargs)[0]
    size = max(1, MASK_NUMBERS // (keys * query.shape[0]))
    parts = []
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        seen = keys - rows + stop
        mask = _causal_mask(base, query, stop - start, seen)
        part = query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen]
        parts.append(dense(module, *part, mask, **kwargs)[0])
    return torch.cat(parts, dim=1)


def _plan_layers(model: Any, cache: Cache) -> None:
    """Gives an empty cache of transformers the layers that the model's plan wants."""
    seats = [_SEATS[module] for module in model.modules() if module in _SEATS]
    if cache.layer_class_to_replicate is not None:  # it makes its layers when they are needed
        depth = model.config.get_text_config(decoder=True).num_hidden_layers
        cache.layers += [cache.layer_class_to_replicate() for _ in range(depth - len(cache.layers))]
    for seat in seats:
        cache.layers[seat.layer] = PlanLayer(seat)


def _on_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the model runs: an empty cache, such as `generate` makes, becomes one for the plan."""
    given = kwargs.get("past_key_values")
    if type(given) is DynamicCache and not given.offloading and given.get_seq_length() == 0:
        _plan_layers(model, given)


def _set_implementation(model: Any, config: Any, name: str) -> None:
    """For the text model alone, where there are others."""
    if config is model.config:
        model.set_attn_implementation(name)
    else:
        model.set_attn_implementation(
            {next(k for k in model.config.sub_configs if getattr(model.config, k) is config): name}
        )


_SEATS: WeakKeyDictionary[nn.Module, Seat] = WeakKeyDictionary()
_HOOKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

for _base, _name in NAMES.items():
    AttentionInterface.register(_name, partial(_attention, _base))
    AttentionMaskInterface.register(_name, partial(_mask, _base))
