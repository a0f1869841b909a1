"""acc inspect: what a model is made of, and what could be done with it; what a calibration learned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .base import Json

if TYPE_CHECKING:
    from .ui import Screen


def inspect(
    model: Annotated[
        str, typer.Argument(help="a model (hub id, folder, .gguf file, or demo) or a calibration", show_default=False)
    ],
    targets: Annotated[list[str], typer.Option(help="show what a pattern selects: a glob, or re:REGEX")] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Show what a model is made of, or what a calibration learned.

    Of a model: blocks, heads, experts, and bytes by class. Of a folder of acc calibrate: from what it was made, and a
    table and a map of the heads for every pass; figures at a length are of prompts of that length.
    """
    from ..calibrate.stream import Stream
    from ..compress.apply import assign
    from ..compress.recipe import Recipe
    from ..formats.source import open_source
    from ..registry import listing
    from .base import bits_of, calibration_at
    from .ui import Screen, count, percent, size

    screen = Screen(as_json)
    if calibration_at(model) is not None:
        if targets:
            raise ValueError(f"--targets selects tensors of a model, and {model} is a calibration")
        _calibration(screen, model)
        return
    source = open_source(model)
    stream = Stream(source)
    skeleton = stream.skeleton
    matrices = [m for index in range(len(skeleton.layers)) for m in skeleton.matrices(index)]
    names = list(dict.fromkeys(m.tensor for m in matrices))
    facts = _facts(source, skeleton) | {"packable tensors": len(names), "packable matrices": len(matrices)}
    stored = bits_of(source)
    for key, value in facts.items():
        screen.line(f"{key:<20}{value:,}" if type(value) is int else f"{key:<20}{value}")
    if source.quantized:
        screen.line(f"{'stored bits':<20}{stored['packed_bits']:.3f} in the packed part, {stored['bits']:.2f} in all")
    rows = []
    for kind, (weights, nbytes) in _classes(source).items():
        rows.append([kind, count(weights), size(nbytes), percent(nbytes / stored["bytes"])])
    screen.line()
    screen.table("", ["class", "weights", "bytes", "share"], rows)
    inside = sum(m.shape[0] * m.shape[1] for m in matrices)
    fate = "are packed" if source.quantized else f"can be packed by {', '.join(listing('compress', 'Method'))}"
    share = stored["packed_parameters"] if source.quantized else inside
    screen.line(f"\n{percent(share / stored['parameters'])} of the weights {fate}")
    selected: list[str] = []
    if targets:
        preview = Recipe.from_dict({"steps": [{"method": "rtn", "targets": targets}]})
        selected = sorted(assign(preview, stream), key=source.names().index)
        screen.line(f"\n--targets selects {len(selected)} tensors:")
    for name in selected:
        screen.line(f"  {name}")
    if not source.quantized:
        screen.next(f"acc quantize {model} --bits 3")
    classes = {kind: {"weights": weights, "bytes": nbytes} for kind, (weights, nbytes) in _classes(source).items()}
    screen.result({"facts": facts, "stored": stored, "classes": classes, "selected": selected})


def _calibration(screen: Screen, folder: str) -> None:
    from ..formats.calibration import Calibration
    from .learned import tensors_of, whole

    calibration = Calibration.load(folder)
    whole(screen, calibration)
    pictures = sorted(path.name for path in Path(folder).glob("*.png"))
    if pictures:
        screen.line()
        screen.field("Pictures", ", ".join(pictures))
    model = calibration.facts["model"]["name"]
    screen.next(f'acc generate {model} "..." --plan {folder}')
    screen.result({"facts": calibration.facts, "tensors": tensors_of(calibration), "pictures": pictures})


def _facts(source: Any, skeleton: Any) -> dict[str, Any]:
    config = skeleton.model.config.get_text_config(decoder=True)
    named = [getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    experts = next((number for number in named if number), 0)
    facts = {
        "family": skeleton.family,
        "parameters": sum(math.prod(source.info(n).shape) for n in source.names()),
        "type": str(source.dtype).removeprefix("torch."),
        "blocks": len(skeleton.layers),
        "hidden size": config.hidden_size,
        "heads": config.num_attention_heads,
        "key/value heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "context": getattr(config, "max_position_embeddings", None),
        "vocabulary": config.vocab_size,
        "head tied": bool(skeleton.model.all_tied_weights_keys),
    }
    if experts:
        shared = getattr(config, "n_shared_experts", None) or int("shared experts" in _classes(source))
        facts |= {"experts": experts, "experts per token": config.num_experts_per_tok, "shared experts": shared}
    return facts


def _classes(source: Any) -> dict[str, tuple[int, int]]:
    """`{class: (weights, bytes)}`, largest first."""
    from .base import class_of

    found: dict[str, tuple[int, int]] = {}
    for name in source.names():
        info, kind = source.info(name), class_of(name)
        weights, nbytes = found.get(kind, (0, 0))
        found[kind] = (weights + math.prod(info.shape), nbytes + info.nbytes)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))
