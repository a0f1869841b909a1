"""acc calibrate: learn of a model's attention what makes it cheap."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from .base import Device, Dtype, Json, Model, Seed, Spill, without


class PassCommand(typer.core.TyperCommand):
    """The fields of the passes that are run are options too, `--FIELD` or `--PASS.FIELD`: `context.obj` has those that
    were given, `{pass: {field: value}}`."""

    method_options: tuple[str, ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from ..registry import listing, lookup

        own = {name for parameter in self.params for name in parameter.opts} | set(ctx.help_option_names)
        ctx.obj = {}
        ctx.meta["words"] = list(args)
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
        args, given = without(args, own, fields)
        for name, value in given:
            if len(fields[name]) > 1:
                spelled = " or ".join(f"--{one}.{name[2:]}" for one, _ in fields[name])
                raise ValueError(f"{name}: several passes have it; say {spelled}")
            one, field = fields[name][0]
            ctx.obj.setdefault(one, {})[field] = value
        return super().parse_args(ctx, args)


COMMAND = PassCommand
PASSKEYS = (8, 4, 2, 1)  # of a prompt: the first number that fits
LONGEST, SELF_LONGEST, SELF_ROW = 4096, 2048, 512  # tokens: of prompts, of prompts drawn from the model, of one draw


def calibrate(
    context: typer.Context,
    model: Model,
    passes: Annotated[
        list[str] | None, typer.Argument(help="which passes; default: all, see acc show", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder to write; default: MODEL-acc-calibration", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="text: file, folder, .jsonl, hf:NAME, or self; may be given again, for a domain each"),
    ] = None,
    nsamples: Annotated[int, typer.Option(min=1, help="prompts of each kind, length and domain")] = 2,
    seqlen: Annotated[
        int | None, typer.Option(min=64, help="tokens of the longest prompts; default: 4096, of self 2048")
    ] = None,
    read: Annotated[
        tuple[str, Path] | None,
        typer.Option("--from", metavar="RUNTIME PATH", help="read another runtime's file instead of running anything"),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    spill: Spill = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that acc made")] = False,
    as_json: Json = False,
) -> None:
    """Learn which heads need what of their context.

    Prompts of three lengths pass through the model once, block by block, and every pass looks on. A pass' own settings
    are options as well, e.g. --cost 0.2 or --heads.cost 0.2; `acc show PASS` lists them.
    """
    import time

    from ..calibrate.stream import Clock
    from ..formats.calibration import Calibration, Journal, facts
    from ..formats.partial import check_out
    from ..formats.source import open_source
    from .base import check_device, check_dtype, show_dtype
    from .learned import brief
    from .packing import plain_name
    from .pictures import draw
    from .ui import Screen, clock

    screen = Screen(as_json)
    check_device(device)
    kind = check_dtype(dtype)
    if read is not None and (passes or data or context.obj):
        raise ValueError("--from only reads a file: passes, their settings and --data do not go with it")
    chosen = {} if read is not None else _passes(passes, context.obj)
    source = open_source(model)
    folder = out or Path(f"{plain_name(source)}-acc-calibration")
    check_out(folder.absolute(), resume=resume, overwrite=overwrite)
    layers, phases = _show_layers(screen, source), {}
    started = time.monotonic()
    again = shlex.join(
        ["acc", "calibrate", *(w for w in context.meta["words"] if w not in ("--resume", "--overwrite"))]
    )
    if read is not None:
        brought = _bring(*read, layers)
        record: Any = {"from": read[0], "file": read[1].name}
        journal = Journal(folder.absolute(), _identity(source, {}, record), resume=resume, overwrite=overwrite)
        tensors, told = brought
    else:
        kinds = {kind for one in chosen.values() for kind in one.kinds}
        prompts, record = _prompts(screen, source, data, nsamples, seqlen, seed, kinds)
        settings = {name: one.model_dump() for name, one in chosen.items()}
        journal = Journal(folder.absolute(), _identity(source, settings, record), resume=resume, overwrite=overwrite)
        show_dtype(screen, source, dtype, device)
        run = {"dtype": kind, "device": device, "spill": spill}
        clocked = Clock()
        tensors, told = _learn(screen, source, chosen, prompts, journal, again, run | {"clock": clocked})
        phases = {name: round(taken, 2) for name, taken in clocked.take().items() if name != "other"}
    calibration = Calibration(tensors, facts(_about(source), layers, told, record))
    pictures, why_none = draw(calibration)
    journal.close(calibration, pictures)
    seconds = time.monotonic() - started
    brief(screen, calibration)
    each = ", ".join(f"{name} {clock(taken)}" for name, taken in phases.items())
    screen.line(f"\n{folder}: {clock(seconds)}{f' ({each})' if each else ''}")
    if pictures or why_none:
        screen.field("Pictures", ", ".join(pictures) or why_none)
    screen.next(f'acc generate {model} "..." --plan {folder}')
    screen.line(f"      acc inspect {folder}")
    screen.result(
        {
            "folder": str(folder),
            "layers": [layer.index for layer in layers if layer.refused is None],
            "passes": told,
            "data": record,
            "pictures": list(pictures),
            "seconds": round(seconds, 2),
            "phases": phases,
        }
    )


def _identity(source: Any, settings: dict[str, Any], record: Any) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    from .. import __version__

    return {"acc": __version__, "source": source.identity(), "passes": settings, "data": record}


def _about(source: Any) -> dict[str, Any]:
    """What the calibration says of its model."""
    from .packing import plain_name

    name = source.spec if source.kind in ("hub", "demo") else plain_name(source)
    return {"name": name, "family": source.config.get("model_type"), "identity": source.identity()}


def _learn(
    screen: Any, source: Any, chosen: dict[str, Any], prompts: list[Any], journal: Any, again: str, run: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs the passes -> tensors by `pass.tensor`, and what `calibration.json` says of each pass."""
    from ..calibrate.attention import learn
    from .ui import Meter

    try:
        with Meter(screen, " of step") as meter:
            learned = learn(source, list(chosen.values()), prompts, journal, progress=meter, **run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is kept; go on with\n  {again} --resume") from None
    told = {
        name: {"settings": chosen[name].model_dump(), "summary": one.summary, "events": list(one.events)}
        for name, one in learned.items()
    }
    return {f"{name}.{key}": tensor for name, one in learned.items() for key, tensor in one.tensors.items()}, told


def _bring(name: str, path: Path, layers: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same from another runtime's file; what was odd about it becomes events.

    Raises ValueError for a runtime that there is not, and for a file that is not there or does not fit."""
    from ..formats.runtime import runtime

    reader = runtime(name)
    if not path.exists():
        raise ValueError(f"--from {name} {path}: there is no such file or folder")
    brought = reader.read(path, layers)
    passes = {one: {"settings": {}, "summary": {}, "events": [], **about} for one, about in brought.passes.items()}
    for about in passes.values():
        about["events"] = [*about["events"], *brought.notes]
    return brought.tensors, passes


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
    from ..calibrate.prompts import text_prompts
    from .base import text_limits, tokenizer_of
    from .packing import HUB_TEXT

    tokenizer, limits = tokenizer_of(source), text_limits(source)
    specs = data or ["self" if source.kind == "demo" else HUB_TEXT]
    longest = seqlen or (SELF_LONGEST if "self" in specs else LONGEST)
    longest = min(longest, limits["max_length"] or longest)
    if seqlen is not None and longest < seqlen:
        raise ValueError(f"--seqlen {seqlen}: the model takes at most {longest} tokens")
    lengths = [n for n in (longest, longest // 2, longest // 4) if n >= 64]
    prompts: list[Any] = []
    records = []
    for spec in specs:
        if spec == "self":
            screen.field("Text", f"drawing {nsamples * sum(lengths):,} tokens from the model, which takes a while")
        text = _text(spec, source, tokenizer, nsamples * sum(lengths), min(SELF_ROW, lengths[-1]), seed, limits)
        ids = text.batches.flatten()
        records.append(text.record())
        screen.field("Text", f"{spec}: {ids.numel():,} tokens, {text.record()['order']}")
        if "text" in kinds:
            prompts += text_prompts(ids, [n for n in lengths for _ in range(nsamples)], spec)
        if "passkey" in kinds:
            for number in range(nsamples):
                prompts += [_passkeys(tokenizer, ids, n, spec, seed + 1000 * number + n) for n in lengths]
    tokens = sum(len(prompt) for prompt in prompts)
    span = f"{lengths[-1]} to {lengths[0]}" if len(lengths) > 1 else lengths[0]
    screen.field("Prompts", f"{len(prompts)} of {span} tokens, {tokens:,} in all")
    stated = {len(prompt.stated) for prompt in prompts if prompt.kind == "passkey"}
    if stated and min(stated) < PASSKEYS[0]:
        screen.field("", f"short prompts have room for {min(stated)} passkeys, not {PASSKEYS[0]}")
    record = {"texts": records, "lengths": lengths, "prompts": len(prompts), "tokens": tokens, "seed": seed}
    return prompts, record | ({"passkeys": sorted(stated)} if stated else {})


def _passkeys(tokenizer: Any, ids: Any, length: int, spec: str, seed: int) -> Any:
    """A prompt with as many passkeys as there is room for. Raises ValueError when there is none for one."""
    from ..calibrate.prompts import passkey_prompt

    for count in PASSKEYS[:-1]:
        with contextlib.suppress(ValueError):
            return passkey_prompt(tokenizer, ids, length, spec, count=count, seed=seed)
    return passkey_prompt(tokenizer, ids, length, spec, count=PASSKEYS[-1], seed=seed)


def _text(spec: str, source: Any, tokenizer: Any, tokens: int, row: int, seed: int, limits: dict[str, Any]) -> Any:
    """At least `tokens` tokens of a text, if it has them, in rows of `row`: what is drawn from the model is drawn row
    beside row, as one long sample would take as many steps as it has tokens."""
    from ..calibrate.text import load_text
    from .base import sampler

    drawn = {"generate": sampler(source)} if spec == "self" else {}
    return load_text(spec, tokenizer, nsamples=-(-tokens // row), seqlen=row, seed=seed, **limits, **drawn)
