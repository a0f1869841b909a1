"""acc quantize: one method over one model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from .base import Device, Dtype, Json, MethodCommand, Model, Seed, Spill

COMMAND = MethodCommand  # the chosen method's own fields are options too
REFINE_TOKENS = 2048  # of one step of --refine
HUB_TEXT = "hf:allenai/c4:en:validation"


def quantize(
    context: typer.Context,
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="folder to write; default: MODEL-acc-METHOD-IntBITS")] = None,
    bits: Annotated[int | None, typer.Option(help="bits per code; 3 where the method has a choice")] = None,
    method: Annotated[str, typer.Option(help="see acc show")] = "spqr",
    data: Annotated[str | None, typer.Option(help="calibration text: file, folder, .jsonl, hf:NAME, or self")] = None,
    nsamples: Annotated[int | None, typer.Option(min=1, help="sequences of text; default 128, of self 64")] = None,
    seqlen: Annotated[int | None, typer.Option(min=2, help="tokens per sequence; default 2048, of self 512")] = None,
    targets: Annotated[list[str], typer.Option(help="what to compress: a glob, or re:REGEX; may be repeated")] = ["*"],  # noqa: B006
    ignore: Annotated[list[str], typer.Option(help="what to leave as it is: a glob, or re:REGEX")] = [],  # noqa: B006
    refine: Annotated[int | None, typer.Option(min=0, help="steps of learned rounding; spqr: 16, others: 0")] = None,
    rotate: Annotated[str | None, typer.Option(help="rotate the weights first: heads, residual or all")] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="tokens that go through a block at once")] = 4096,
    spill: Spill = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that acc made")] = False,
    as_json: Json = False,
) -> None:
    """Compress a model's weights and write a checkpoint.

    The chosen method's own settings are options as well, e.g. --group-size 32; `acc show METHOD` lists them.
    """
    from ..calibrate.stream import Stream
    from ..compress.apply import apply, assign
    from ..compress.recipe import Recipe, configure
    from ..formats.source import open_source
    from ..formats.store import Store
    from ..registry import listing
    from .base import bits_of, check_device, check_dtype, show_text
    from .ui import Meter, Screen

    screen = Screen(as_json)
    if method in listing("compress", "Rewrite"):
        raise ValueError(f"--method {method}: it packs nothing, but can go before a method: --{method}")
    bits = _bits(method) if bits is None else bits
    settings = context.obj | {"bits": bits}
    chosen = configure(method, settings)
    refine = chosen.refine if refine is None else refine
    needs = bool(chosen.needs or refine)
    check_device(device)
    check_dtype(dtype)
    source = open_source(model)
    if source.quantized:
        raise ValueError(f"{model}: packed already; name the dense model, or see acc export --to dense")
    if data is None and needs:
        data = "self" if source.kind == "demo" else HUB_TEXT
    recipe = Recipe.from_dict(
        {
            "dtype": dtype,
            "calibration": _calibration(source, data if needs else None, nsamples, seqlen) | {"seed": seed},
            "refine": refine,
            "steps": [
                *_rotation(rotate, seed),
                {"method": method, **settings, "targets": targets, "ignore": ignore},
            ],
        }
    )
    folder = out or default_name(source, method, bits)
    Store.check(folder, resume=resume, overwrite=overwrite)
    rewritten = recipe.rewrite(source)
    assign(recipe, Stream(rewritten))  # a pattern that fits nothing is found before the text is read
    screen.line(f"Model     {model}: {source.config.get('model_type')}, {source.dtype}".replace("torch.", ""))
    screen.line(f"Method    {method}, " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    for note in rewritten.notes:
        screen.field("Rewrite", note)
    text = _text(recipe, source) if needs else None
    batches: list[Any] = []
    if text is not None:
        show_text(screen, text)
        tokens = min(batch, REFINE_TOKENS) if refine else batch
        batches = list(text.batches.split(max(1, tokens // recipe.calibration.seqlen)))
    again = f"acc {_command(model, None if out else folder)} --resume"
    try:
        with Meter(screen) as meter:
            outcome = apply(
                recipe,
                source,
                folder,
                batches,
                text_record=_stable(text.record()) if text is not None else None,
                device=device,
                spill=spill,
                resume=resume,
                overwrite=overwrite,
                report=meter,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is kept; go on with\n  {again}") from None
    made = open_source(outcome.folder)
    _summary(screen, source, rewritten, made, outcome)
    screen.next(f"acc eval {folder} --base {model} --data {_evaluation(source)}")
    screen.result(
        {
            "folder": str(folder),
            "recipe": recipe.to_dict(),
            "dense": bits_of(source),
            "packed": bits_of(made),
            "nominal_bits": _nominal(outcome.records),
            "relative_error": _mean_error(outcome.records),
            "events": Counter(event["event"] for event in outcome.events),
            "seconds": round(outcome.seconds, 2),
            "phases": {phase: round(seconds, 2) for phase, seconds in outcome.phases.items()},
        }
    )


def _bits(method: str) -> int:
    """3, unless the method knows one width only."""
    from ..registry import lookup

    return lookup("compress", method).model_json_schema()["properties"]["bits"].get("const", 3)


def _rotation(which: str | None, seed: int) -> list[dict[str, Any]]:
    """The step that `--rotate` means."""
    if which is None:
        return []
    if which not in ("heads", "residual", "all"):
        raise ValueError(f"--rotate {which}: expected heads, residual or all")
    return [{"method": "rotate", "residual": which != "heads", "heads": which != "residual", "seed": seed}]


def _calibration(source: Any, data: str | None, nsamples: int | None, seqlen: int | None) -> dict[str, Any]:
    """How much text; what is drawn from the model itself takes time to draw, so less of it is the default."""
    samples, length = (64, 512) if data == "self" else (128, 2048)
    longest = source.config.get("max_position_embeddings")
    if isinstance(longest, int):
        length = min(length, longest)
    return {"data": data, "nsamples": nsamples or samples, "seqlen": seqlen or length}


def default_name(source: Any, method: str, bits: int) -> Path:
    """`Qwen/Qwen3-0.6B` -> `Qwen3-0.6B-acc-SpQR-Int3`."""
    from ..registry import lookup

    plain = {"hub": source.spec.partition("@")[0], "gguf": str(Path(source.spec).with_suffix("")), "demo": "demo"}
    name = Path(plain.get(source.kind) or source.folder.resolve()).name
    return Path(f"{name}-acc-{lookup('compress', method).__name__}-Int{bits}")


def _text(recipe: Any, source: Any) -> Any:
    """Loads the calibration text that a recipe names."""
    from ..calibrate.text import load_text
    from .base import sampler, text_limits, tokenizer_of

    wanted = recipe.calibration
    return load_text(
        wanted.data,
        tokenizer_of(source),
        nsamples=wanted.nsamples,
        seqlen=wanted.seqlen,
        seed=wanted.seed,
        generate=sampler(source) if wanted.data == "self" else None,
        **text_limits(source),
    )


def _stable(record: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must agree on: the tokens, not where the file lay."""
    local = record["kind"] not in ("sampled from the model", "hub data set")
    return record | {"data": Path(record["data"]).name if local else record["data"]}


def _command(model: str, folder: Path | None) -> str:
    """The command as it was typed, with the output named where it was left to the default."""
    import shlex
    import sys

    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    if folder is not None and model in words:
        words.insert(words.index(model) + 1, str(folder))
    return shlex.join(words)


def _evaluation(source: Any) -> str:
    return "self" if source.kind == "demo" else "TEXT.txt"


def _packed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["method"] != "kept"]


def _mean(records: list[dict[str, Any]], key: str) -> float | None:
    rows = _packed(records)
    weights = sum(row["parameters"] for row in rows)
    return sum(row[key] * row["parameters"] for row in rows) / weights if weights else None


def _nominal(records: list[dict[str, Any]]) -> float | None:
    return _mean(records, "nominal_bits")


def _mean_error(records: list[dict[str, Any]]) -> float | None:
    return _mean(records, "relative_error")


def _summary(screen: Any, source: Any, rewritten: Any, made: Any, outcome: Any) -> None:
    from .base import bits_of
    from .ui import clock, count, percent, shorten, size

    before, after = bits_of(source), bits_of(made)
    of_packed = sum(rewritten.info(name).nbytes for name in made.entries)
    nominal = _nominal(outcome.records)
    figures = {
        "whole model": (before["bytes"], after["bytes"], before["bits"], after["bits"]),
        "packed part": (
            of_packed,
            after["packed_bytes"],
            8 * of_packed / after["packed_parameters"],
            after["packed_bits"],
        ),
    }
    rows = [[name, size(a), size(b), f"{c:.3f}", f"{d:.3f}", ""] for name, (a, b, c, d) in figures.items()]
    rows[-1][-1] = f"{nominal:.3f}" if nominal is not None else ""
    screen.line()
    screen.table("", ["", "dense", "packed", "bits", "stored bits", "nominal"], rows)
    share = after["packed_parameters"] / after["parameters"]
    screen.line(f"\n{percent(share)} of {count(after['parameters'])} weights packed in {clock(outcome.seconds)}")
    slowest = [item for item in sorted(outcome.phases.items(), key=lambda item: -item[1]) if item[1] >= 1]
    if slowest:
        screen.line("  " + ", ".join(f"{phase} {clock(seconds)}" for phase, seconds in slowest))
    worst = sorted(_packed(outcome.records), key=lambda record: -record["relative_error"])[:3]
    for record in worst:
        name = record["tensor"] if record.get("part") is None else f"{record['tensor']}[{record['part']}]"
        screen.line(f"  error {percent(record['relative_error']):>6} of the {record['error_of']}  {shorten(name, 50)}")
    for kind, number in Counter(event["event"] for event in outcome.events).items():
        screen.line(f"  event {kind}: {number} (report.jsonl names each)")
