"""acc calibrate: learn of a model's attention what makes it cheap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from .base import Device, Dtype, Json, Model, Seed, Spill


class PassCommand(typer.core.TyperCommand):
    """The fields of the passes that are run are options too, `--FIELD` or `--PASS.FIELD`: `context.obj` has those that
    were given, `{pass: {field: value}}`."""

    method_options: tuple[str, ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from ..registry import listing, lookup

        own = {name for parameter in self.params for name in parameter.opts} | set(ctx.help_option_names)
        ctx.obj = {}
        if all(not word.startswith("--") or word.partition("=")[0] in own for word in args):
            return super().parse_args(ctx, args)
        every = listing("calibrate", "Pass")
        chosen = [word for word in args if word in every] or list(every)
        fields: dict[str, list[tuple[str, str]]] = {}
        for name in chosen:
            for field in lookup("calibrate", name, "Pass").model_fields:
                spelled = field.replace("_", "-")
                fields.setdefault(f"--{spelled}", []).append((name, field))
                fields.setdefault(f"--{name}.{spelled}", []).append((name, field))
        self.method_options = tuple(fields)
        return super().parse_args(ctx, _take(list(args), own, fields, ctx.obj))


def _take(args: list[str], own: set[str], fields: dict[str, list[tuple[str, str]]], found: dict[str, Any]) -> list[str]:
    """What is left of `args` without the fields of passes, which go to `found`."""
    from .base import parsed

    rest = []
    while args:
        name, equals, value = args.pop(0).partition("=")
        if name in own or name not in fields:
            rest.append(name + equals + value)
            continue
        if len(fields[name]) > 1:
            spelled = " or ".join(f"--{one}.{name[2:]}" for one, _ in fields[name])
            raise ValueError(f"{name}: several passes have it; say {spelled}")
        if not equals:
            if not args or args[0].startswith("--"):
                raise ValueError(f"{name} needs a value")
            value = args.pop(0)
        one, field = fields[name][0]
        found.setdefault(one, {})[field] = parsed(value)
    return rest


COMMAND = PassCommand


def calibrate(
    context: typer.Context,
    model: Model,
    passes: Annotated[list[str] | None, typer.Argument(help="which passes; default: all, see acc show")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write; default: MODEL-acc-calibration")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="text: file, folder, .jsonl, hf:NAME, or self; a domain each")
    ] = None,
    nsamples: Annotated[int, typer.Option(min=1, help="prompts of each kind and length")] = 4,
    seqlen: Annotated[int | None, typer.Option(min=64, help="tokens of the longest prompts; default 4096")] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    spill: Spill = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that acc made")] = False,
    as_json: Json = False,
) -> None:
    """Learn which heads need what of their context.

    A pass' own settings are options as well, e.g. --sparsity 0.5; `acc show PASS` lists them.
    """
    import time

    from .. import __version__
    from ..calibrate.attention import learn
    from ..formats.calibration import Calibration, Journal, facts
    from ..formats.source import open_source
    from .base import check_device, check_dtype
    from .packing import plain_name
    from .ui import Meter, Screen, clock

    chosen = _passes(passes, context.obj)
    screen = Screen(as_json)
    check_device(device)
    kind = check_dtype(dtype)
    source = open_source(model)
    folder = out or Path(f"{plain_name(source)}-acc-calibration")
    layers = _show_layers(screen, source)
    prompts, record = _prompts(
        screen, source, data, nsamples, seqlen, seed, {k for one in chosen.values() for k in one.kinds}
    )
    settings = {name: one.model_dump() for name, one in chosen.items()}
    identity = {"acc": __version__, "source": source.identity(), "passes": settings, "data": record}
    journal = Journal(folder.absolute(), identity, resume=resume, overwrite=overwrite)
    again = f"acc calibrate {model} {' '.join(passes or [])} --out {folder} ... --resume"
    started = time.monotonic()
    try:
        with Meter(screen) as meter:
            learned = learn(
                source, list(chosen.values()), prompts, journal, dtype=kind, device=device, spill=spill, progress=meter
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"what is finished is kept; go on with the same command and --resume\n  {again}"
        ) from None
    told = {
        name: {"settings": settings[name], "summary": one.summary, "events": list(one.events)}
        for name, one in learned.items()
    }
    about = {
        "name": source.spec if source.kind in ("hub", "demo") else plain_name(source),
        "family": source.config.get("model_type"),
        "identity": source.identity(),
    }
    tensors = {f"{name}.{key}": tensor for name, one in learned.items() for key, tensor in one.tensors.items()}
    calibration = Calibration(tensors, facts(about, layers, told, record))
    journal.close(calibration, {})
    seconds = time.monotonic() - started
    screen.line()
    for name, one in told.items():
        for key, value in one["summary"].items():
            screen.field(name, f"{key.replace('_', ' ')}: {value}")
        for event in one["events"]:
            screen.field("", f"note: {event}")
    screen.line(f"\n{folder}: {clock(seconds)}")
    screen.next(f"acc inspect {folder}")
    screen.result({"folder": str(folder), "passes": told, "seconds": round(seconds, 2)})


def _passes(names: list[str] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The passes that are run, configured. Raises ValueError for a name or a setting that there is not."""
    from pydantic import ValidationError

    from ..registry import listing, lookup

    found = {}
    for name in names or listing("calibrate", "Pass"):
        try:
            found[name] = lookup("calibrate", name, "Pass")(**settings.get(name, {}))
        except ValidationError as error:
            first = error.errors()[0]
            field = "--" + ".".join(map(str, first["loc"])).replace("_", "-")
            raise ValueError(f"{name}: {field}: {first['msg']} (got {first['input']!r})") from None
    return found


def _show_layers(screen: Any, source: Any) -> list[Any]:
    """The layers, and what is said of those that are left alone."""
    from ..calibrate.attention import open_layers
    from ..calibrate.stream import Stream

    skeleton = Stream(source).skeleton
    layers = skeleton.attention_layers()
    screen.field("Model", f"{source.spec}: {skeleton.family}")
    heads = open_layers(layers, skeleton.family)
    one = heads[0]
    screen.field(
        "Layers", f"{len(heads)} of {len(layers)}; {one.heads} query heads on {one.kv_heads} of {one.head_dim}"
    )
    refused: dict[str, list[int]] = {}
    for layer in layers:
        if layer.refused is not None:
            refused.setdefault(layer.refused, []).append(layer.index)
    for reason, which in refused.items():
        screen.field("", f"left alone: {', '.join(map(str, which))}: {reason}")
    return layers


def _prompts(
    screen: Any, source: Any, data: list[str] | None, nsamples: int, seqlen: int | None, seed: int, kinds: set[str]
) -> tuple[list[Any], Any]:
    """The prompts of the kinds that somebody looks at, and a record of where they came from."""
    from ..calibrate.prompts import passkey_prompt, text_prompts
    from ..calibrate.text import load_text
    from .base import sampler, text_limits, tokenizer_of
    from .packing import HUB_TEXT

    tokenizer, limits = tokenizer_of(source), text_limits(source)
    longest = min(seqlen or 4096, limits["max_length"] or 4096)
    if seqlen is not None and longest < seqlen:
        raise ValueError(f"--seqlen {seqlen}: the model takes at most {longest} tokens")
    lengths = [n for n in (longest, longest // 2, longest // 4) if n >= 64]
    prompts: list[Any] = []
    records = []
    for spec in data or ["self" if source.kind == "demo" else HUB_TEXT]:
        drawn = {"generate": sampler(source)} if spec == "self" else {}
        text = load_text(
            spec, tokenizer, nsamples=nsamples * len(lengths), seqlen=longest, seed=seed, **limits, **drawn
        )
        ids = text.batches.flatten()
        records.append(text.record())
        screen.field("Text", f"{spec}: {text.tokens:,} tokens")
        if "text" in kinds:
            prompts += text_prompts(ids, [n for n in lengths for _ in range(nsamples)], spec)
        if "passkey" in kinds:
            for number in range(nsamples):
                prompts += [
                    passkey_prompt(tokenizer, ids, n, spec, count=8, seed=seed + 1000 * number + n) for n in lengths
                ]
    tokens = sum(len(prompt) for prompt in prompts)
    screen.field("Prompts", f"{len(prompts)} of {lengths[-1]} to {lengths[0]} tokens, {tokens:,} in all")
    return prompts, {"texts": records, "lengths": lengths, "prompts": len(prompts), "tokens": tokens, "seed": seed}
