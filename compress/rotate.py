"""Rotation: the same model in a basis without outlying weights (Hadamard matrices, computed once, offline)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..calibrate.stream import Stream
from ..formats.model import Skeleton
from ..formats.source import Rewritten, Source, TensorInfo, finite
from .base import Rewrite
from .hadamard import Rotation

CHUNK = 1 << 24  # weights that are held in fp64 at a time, where a tensor can be taken in pieces


class Rotate(Rewrite):
    """Turns the residual stream, and the values of each attention head, into a basis where no coordinate stands out.

    Every matrix that writes the stream is followed by an orthogonal matrix, every matrix that reads it is preceded by
    the transpose, so nothing changes but the weights: their outliers, and those of the activations, are spread over all
    coordinates, and what is left is easier to round. The scales of the norms between are moved into the matrices that
    read them first, as only a norm without a scale commutes with a rotation. Between the values and the output of
    attention the same is done head by head. (QuaRot, arXiv 2404.00456; SpinQuant's R1 and R2, arXiv 2405.16406.)

    Limits: a tied output head becomes a matrix of its own, as it takes over the last norm's scale. Families whose norms
    write into the stream, or subtract a mean, can only have their heads rotated. Where small groups keep outliers to
    themselves already, little is gained: compare with `acc eval`.
    """

    residual: bool = Field(True, description="rotate the residual stream; a tied output head is untied")
    heads: bool = Field(True, description="rotate values and attention outputs head by head; adds no byte")
    seed: int = Field(0, ge=0, description="of the random signs")

    @model_validator(mode="after")
    def _something(self) -> Rotate:
        if not (self.residual or self.heads):
            raise ValueError("residual and heads are both false: nothing would be rotated")
        return self

    def rewrite(self, source: Source, dtype: torch.dtype | None = None) -> Rewritten:
        return Rotated(source, self, dtype)


@dataclass(frozen=True)
class Family:
    """What rotation has to know of a family."""

    residual: str | None = None  # why its stream cannot be rotated
    plus: float = 0.0  # its norms multiply by their stored scale plus this


POST = "its norms after attention and MLP write into the stream"
MEAN = "its norms subtract the mean, which a rotation does not keep"
EXACT = ("deepseek_v3", "gpt_oss", "granite", "llama", "mistral", "mixtral", "olmoe", "phi3", "qwen2", "qwen2_moe",
         "qwen3", "qwen3_moe", "smollm3")  # fmt: skip
FAMILIES = dict.fromkeys(EXACT, Family()) | {
    "gemma": Family(plus=1.0),
    "gemma2": Family(POST),
    "gemma3_text": Family(POST),
    "olmo2": Family(POST),
    "olmo3": Family(POST),
    "starcoder2": Family(MEAN),
}

# Parameters by their name inside a block, and outside all blocks: what reads the stream, behind which norm; what writes
# it; and what never meets it.
_MLP = r"mlp\.(experts\.|shared_experts?\.)?"
_QKV = r"self_attn\.(q_proj|k_proj|v_proj|qkv_proj|q_a_proj|kv_a_proj_with_mqa)"
READS = {
    rf"{_QKV}\.weight": "input_layernorm.weight",
    rf"{_MLP}(gate_proj|up_proj|gate_up_proj)(\.weight)?": "post_attention_layernorm.weight",
    r"mlp\.(gate|router|shared_expert_gate)\.weight": "post_attention_layernorm.weight",
    r"lm_head\.weight": "norm.weight",
}
WRITES = rf"(self_attn\.o_proj|{_MLP}down_proj|embed_tokens)(\.weight|\.bias|_bias)?"
NORMS = r"(input_layernorm|post_attention_layernorm|norm)\.weight"
APART = (
    rf"{_QKV}\.bias|{_MLP}(gate_proj|up_proj|gate_up_proj)(\.bias|_bias)"
    r"|self_attn\.((q_norm|k_norm|q_a_layernorm|kv_a_layernorm|q_b_proj|kv_b_proj)\.(weight|bias)|sinks)"
    r"|mlp\.(router\.bias|gate\.e_score_correction_bias)"
)


@dataclass(frozen=True)
class Turn:
    """One axis of a stored tensor times a rotation."""

    rotation: Rotation
    axis: int
    norm: str | None = None  # the tensor whose values scale the axis first
    groups: int = 1  # equal parts of the axis ...
    last: int | None = None  # ... of each of which only so many at the end are turned

    def __call__(self, x: Tensor, scale: Callable[[str], Tensor]) -> Tensor:
        """`x` fp64 of any shape -> the same shape."""
        moved = x.movedim(self.axis, -1)
        if self.norm is not None:
            moved = moved * scale(self.norm)
        parts = moved.unflatten(-1, (self.groups, -1))
        start = 0 if self.last is None else parts.shape[-1] - self.last
        turned = torch.cat([parts[..., :start], self.rotation(parts[..., start:])], -1)
        return turned.flatten(-2).movedim(-1, self.axis)


class Rotated(Rewritten):
    """A rotated source: a tensor is computed in fp64 when it is asked for, and kept nowhere."""

    def __init__(self, source: Source, settings: Rotate, dtype: torch.dtype | None = None):
        super().__init__(source)
        self._dtype = dtype
        skeleton = Stream(source).skeleton
        self._family = family_of(skeleton, settings)
        self._turns: dict[str, list[Turn]] = {}
        self._blank: set[str] = set()  # norms whose scale has moved
        self._twin: dict[str, str] = {}  # a head that was tied: the embeddings that it is made from
        generator = torch.Generator().manual_seed(settings.seed)
        stream = Rotation(skeleton.model.get_input_embeddings().embedding_dim, generator)
        if settings.residual:
            self._turn_stream(skeleton, stream)
            self.notes.append(f"residual stream: Hadamard {stream}")
        if settings.heads:
            heads = head_turns(skeleton, generator)
            for name, turn in heads.items():
                self._turns.setdefault(name, []).append(turn)
            self.notes.append(f"attention heads: Hadamard {next(iter(heads.values())).rotation}")

    def names(self) -> list[str]:
        return [*self.before.names(), *self._twin]

    def info(self, name: str) -> TensorInfo:
        return super().info(self._twin.get(name, name))

    def tensor(self, name: str) -> Tensor:
        origin = self._twin.get(name, name)
        plain = finite(self.before.tensor(origin), origin)
        dtype = self._dtype or plain.dtype
        if name in self._blank:
            return torch.full_like(plain, 1.0 - self._family.plus, dtype=dtype)
        turns = self._turns.get(name, [])
        if not turns:
            return plain.to(dtype) if plain.is_floating_point() else plain
        out = torch.empty(plain.shape, dtype=dtype, device=plain.device)
        first = any(turn.axis % plain.dim() == 0 for turn in turns)  # what is turned cannot be taken in pieces
        rows = len(plain) if first else max(1, CHUNK * len(plain) // plain.numel())
        for piece, place in zip(plain.split(rows), out.split(rows)):
            wide = piece.double()
            for turn in turns:
                wide = turn(wide, self._scale)
            place.copy_(wide)
        return out

    def _scale(self, norm: str) -> Tensor:
        return finite(self.before.tensor(norm), norm).double() + self._family.plus

    def _turn_stream(self, skeleton: Skeleton, rotation: Rotation) -> None:
        places = placed(skeleton)
        disk = {place + key: name for name, (place, key) in places.items()}
        head = skeleton.model.base_model_prefix + ".", "lm_head.weight"
        if "".join(head) not in disk:
            self._twin[head[1]] = disk[head[0] + "embed_tokens.weight"]
            more = self.info(head[1]).nbytes
            self.remarks[head[1]] = [{"event": "untied", "from": self._twin[head[1]], "bytes": more}]
            self.notes.append(f"output head untied: {more:,} bytes more")
        self.changes["tie_word_embeddings"] = False
        self.config = self.before.config | self.changes
        for name, (place, key) in (places | {name: head for name in self._twin}).items():
            shape = skeleton.shapes[self._twin.get(name, name)]
            if re.fullmatch(NORMS, key):
                self._blank.add(name)
            elif norm := next((norm for pattern, norm in READS.items() if re.fullmatch(pattern, key)), None):
                self._turns[name] = [Turn(rotation, -2 if _transposed(skeleton, name) else -1, disk[place + norm])]
            elif re.fullmatch(WRITES, key):
                last = key.endswith("bias") or key.startswith("embed") or _transposed(skeleton, name)
                self._turns[name] = [Turn(rotation, -1 if last else -2)]
            elif not re.fullmatch(APART, key):
                raise ValueError(
                    f"{skeleton.family}: {name} is unknown to rotation; rotate only the heads (residual: false)"
                )
            if any(shape[turn.axis] != rotation.size for turn in self._turns.get(name, [])):
                raise ValueError(f"{name}: {shape} does not fit a residual stream of {rotation.size}")


def family_of(skeleton: Skeleton, settings: Rotate) -> Family:
    """Raises ValueError naming the family when the rotation asked for would not be exact, with the reason."""
    family = FAMILIES.get(skeleton.family)
    if family is None:
        means = any(isinstance(module, nn.LayerNorm) for module in skeleton.model.modules())
        reason = MEAN if means else f"it is exact for {', '.join(sorted(EXACT))}, and the heads of some others"
        raise ValueError(f"{skeleton.family} models cannot be rotated: {reason}")
    reason = family.residual
    strays = [name for name in skeleton.strays if not name.endswith("rotary_emb.inv_freq")]
    if reason is None and strays:
        reason = f"{strays[0]} is no part of the model that transformers runs, and might read the stream"
    if settings.residual and reason is not None:
        raise ValueError(
            f"{skeleton.family}: the residual stream cannot be rotated: {reason}; rotate only the heads"
            " (--rotate heads, or residual: false)"
        )
    return family


def placed(skeleton: Skeleton) -> dict[str, tuple[str, str]]:
    """Where each stored tensor belongs, `("model.layers.3.", "mlp.gate.weight")`; the head goes with the model."""
    outside = skeleton.model.base_model_prefix + "."
    found = {}
    for name, target in skeleton.targets.items():
        inside = re.match(rf"{re.escape(skeleton.prefix)}\.\d+\.", target.parameter)
        place = inside.group() if inside else outside
        found[name] = place, target.parameter.removeprefix(place)
    return found


def head_turns(skeleton: Skeleton, generator: torch.Generator) -> dict[str, Turn]:
    """What produces values, and what reads them after attention has mixed them, head by head."""
    config = skeleton.model.config.get_text_config(decoder=True)
    if getattr(config, "clip_qkv", None) is not None:
        raise ValueError(f"{skeleton.family}: heads cannot be rotated: this model clips their values (clip_qkv)")
    places = placed(skeleton)
    latent = any(key.startswith("self_attn.kv_b_proj") for _, key in places.values())
    size = config.v_head_dim if latent else getattr(config, "head_dim", None)
    rotation = Rotation(size or config.hidden_size // config.num_attention_heads, generator)
    values = {
        "v_proj": Turn(rotation, 0),
        "qkv_proj": Turn(rotation, 0, last=config.num_key_value_heads * rotation.size),
        "kv_b_proj": Turn(rotation, 0, groups=config.num_attention_heads, last=rotation.size),
        "o_proj": Turn(rotation, 1),
    }
    if latent:
        values.pop("v_proj")
    found = {}
    for name, (_, key) in places.items():
        part, _, leaf = key.removeprefix("self_attn.").partition(".")
        if part in values and (leaf == "weight" or part != "o_proj"):
            found[name] = values[part]
            length = skeleton.shapes[name][values[part].axis]
            if length % (values[part].groups * rotation.size):
                raise ValueError(f"{name}: {skeleton.shapes[name]} does not fit heads of {rotation.size}")
    return found


def _transposed(skeleton: Skeleton, name: str) -> bool:
    """Whether a stored stack of experts' matrices is `[E, I, O]`."""
    if name not in skeleton.targets or len(skeleton.shapes[name]) != 3:
        return False
    return bool(skeleton.model.get_submodule(skeleton.targets[name].parameter.rpartition(".")[0]).is_transposed)
