"""What several verbs share: the options they have in common, and how a text and a model are opened."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

if TYPE_CHECKING:
    from ..formats.attention_plan import AttentionPlan
    from ..formats.source import Source
    from .ui import Screen

MODEL_HELP = "hub id (org/name[@revision]), folder, .gguf file, or demo"
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")]
Seed = Annotated[int, typer.Option(min=0, help="of everything that is drawn")]
Device = Annotated[str, typer.Option(help="where blocks are run: cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="type that blocks are run in: auto, float32, bfloat16, float16")]
Planes = Annotated[int | None, typer.Option(min=1, help="of bit planes, read only so many: a model of fewer bits")]
Plan = Annotated[
    Path | None, typer.Option(help="attend as a calibration's folder says, see acc calibrate", show_default=False)
]
Sparsity = Annotated[
    float | None, typer.Option(help="with --plan: share of KV heads that stream; default: as calibrated")
]
Use = Annotated[
    list[str] | None, typer.Option(help="with --plan: heads, retrieval or channels, of these alone; default: all")
]
Adaptive = Annotated[
    bool, typer.Option("--adaptive", help="with --plan: sparse heads' budgets are set by each prompt, as FlexPrefill's")
]
Spill = Annotated[Path | None, typer.Option(help="folder for hidden states that should not stay in memory")]


class MethodCommand(typer.core.TyperCommand):
    """A verb with a `--method`, whose fields are options too: `context.obj` holds those that were given.

    They are taken out before the verb's own options are parsed, so that a value is never mistaken for an argument.
    """

    method_options: tuple[str, ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in parameter.opts} | set(ctx.help_option_names)
        ctx.obj = {}
        if any(word.startswith("--") and word.partition("=")[0] not in own for word in args):
            args, ctx.obj = self._take(args, own)
        return super().parse_args(ctx, args)

    def _take(self, args: list[str], own: set[str]) -> tuple[list[str], dict[str, Any]]:
        from ..registry import lookup

        spelled = next((p.default for p in self.params if p.name == "method"), None)
        for word, value in zip(args, [*args[1:], ""]):
            spelled = value if word == "--method" else word[9:] if word.startswith("--method=") else spelled
        fields = {f"--{name.replace('_', '-')}": name for name in lookup("compress", str(spelled)).model_fields}
        self.method_options = tuple(fields)
        rest, given = without(args, own, fields)
        return rest, {fields[name]: value for name, value in given}


def without(args: list[str], own: Collection[str], fields: Collection[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """What is left of `args` without the options in `fields`, and those, with their values, in the order given; a name
    that is among the verb's `own` options stays. Raises ValueError for an option without a value."""
    rest, given, left = [], [], list(args)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name in own or name not in fields:
            rest.append(name + equals + value)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise ValueError(f"{name} needs a value")
            value = left.pop(0)
        given.append((name, parsed(value)))
    return rest, given


def parsed(text: str) -> int | float | bool | str | None:
    """A value as typed in a shell; what a method's field makes of it is the field's business."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"none": None, "null": None, "true": True, "false": False}.get(text.lower(), text)


def calibration_at(folder: str) -> Path | None:
    """The folder, if it is one that acc calibrate wrote."""
    return Path(folder) if (Path(folder) / "calibration.json").is_file() else None


def tokenizer_of(source: Source) -> Any:
    """The model's tokenizer. Raises ValueError when the model comes without one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{source.spec}: its tokenizer cannot be loaded ({reason[:120]})") from None


def text_limits(source: Source) -> dict[str, Any]:
    """How long a sequence may be for the model, and how many tokens it knows."""
    text = source.config.get("text_config")
    config = text if isinstance(text, dict) else source.config
    return {"max_length": config.get("max_position_embeddings"), "vocab_size": config.get("vocab_size")}


def sampler(source: Source) -> Any:
    """A function that draws token ids from the model itself."""
    from transformers import AutoModelForCausalLM

    from ..calibrate.text import sample_self
    from ..kernels.base import computed_in

    dtype = computed_in(source.dtype, "cpu")
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype).eval()
    return partial(sample_self, model)


def plan_of(
    screen: Screen, folder: Path | None, sparsity: float | None, use: list[str] | None, adaptive: bool
) -> AttentionPlan | None:
    """What `--plan` and the options with it ask for, and shows it; None where no plan is wanted."""
    if folder is None:
        for name, given in (("--sparsity", sparsity is not None), ("--use", use), ("--adaptive", adaptive)):
            if given:
                raise ValueError(f"{name} is of a plan: name the calibration's folder with --plan")
        return None
    from ..formats.attention_plan import AttentionPlan

    plan = AttentionPlan.load(folder, sparsity=sparsity, use=use or None, adaptive=adaptive)
    found = plan.summary()
    screen.field("Plan", f"{folder}: {found['streaming_kv_heads']} of {found['kv_heads']} KV heads stream")
    screen.field(
        "",
        f"{found['sparse_query_heads']} of {found['query_heads']} query heads are sparse in prefill, the KV heads of"
        f" {found['labelled_layers']} of {found['layers']} layers in decoding",
    )
    return plan


def loaded_model(source: Source, dtype: Any, planes: int | None, device: str) -> Any:
    """The whole model on the device, for running. Raises ValueError where another package would have to run it."""
    from transformers import AutoModelForCausalLM

    from ..formats.hf import keep_planes

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype or source.dtype)
    except ImportError as error:  # what another engine packed, its own package runs
        raise ValueError(f"{source.spec}: {error}; or see acc export --to dense") from None
    if planes is not None:
        keep_planes(loaded, planes)
    return loaded.to(device).eval()


def check_device(device: str) -> str:
    """Raises ValueError when torch cannot use the device."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return device


def show_dtype(screen: Screen, source: Source, dtype: str, device: str) -> None:
    """Says so where `auto` is not the model's own type."""
    from ..kernels.base import computed_in

    used = computed_in(source.dtype, device)
    if dtype == "auto" and used != source.dtype:
        own, used = (str(kind).removeprefix("torch.") for kind in (source.dtype, used))
        screen.field("Run in", f"{used}: this processor has no products of {own}; --dtype {own} would be slow")


def check_dtype(dtype: str) -> Any:
    """None for auto, else a torch type. Raises ValueError for any other word."""
    import torch

    from ..calibrate.stream import DTYPES

    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return getattr(torch, dtype)


def show_text(screen: Screen, text: Any) -> None:
    """The decisions about a calibration text, and how it starts."""
    from .ui import WIDTH, shorten

    record = text.record()
    used, seqlen = record["nsamples_used"], record["seqlen"]
    screen.field("Text", f"{record['data']}: {used} sequences of {seqlen} tokens, {used * seqlen:,} in all")
    screen.field("", f"sha256 {record['sha256'][:16]}, {record['order']}")
    screen.field("", record["bos"])
    screen.field("", f"chat template {record['chat_template']}")
    screen.line(f"{'':<10}starts {shorten(repr(text.first_sample[:400]), WIDTH - 17)}")
    for note in text.notes:
        screen.field("", f"note: {note}")


def bits_of(source: Source) -> dict[str, float]:
    """Bytes and bits per weight, counted from the files: of everything, and of what is packed."""
    import math

    infos = {name: source.info(name) for name in source.names()}
    sizes = {name: math.prod(info.shape) for name, info in infos.items()}
    total = sum(info.nbytes for info in infos.values())
    packed = [name for name in source.entries if name in infos]
    inside = sum(sizes[name] for name in packed)
    return {
        "bytes": total,
        "parameters": sum(sizes.values()),
        "bits": 8 * total / sum(sizes.values()),
        "packed_parameters": inside,
        "packed_bytes": sum(infos[name].nbytes for name in packed),
        "packed_bits": 8 * sum(infos[name].nbytes for name in packed) / inside if inside else 0.0,
    }


CLASSES = {
    "embeddings": r"embed_tokens|wte|word_embeddings",
    "head": r"lm_head|embed_out",
    "routers": r"\.(gate|router|shared_expert_gate)\.",
    "shared experts": r"shared_expert",
    "experts": r"\.experts\.",
    "attention": r"attn|attention",
    "norms": r"norm",
    "mlp": r"mlp|feed_forward|ffn",
}


def class_of(tensor: str) -> str:
    """What kind of tensor a name on disk means."""
    import re

    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, tensor)), "other")
