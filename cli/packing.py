"""What quantize and apply share: a recipe is shown, run over a model, and what came of it is told."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..calibrate.text import CalibrationText
    from ..compress.recipe import Recipe, Step
    from ..formats.source import Source
    from .ui import Screen

MANY = 4  # steps, beyond which they are not shown one by one
HUB_TEXT = "hf:allenai/c4:en:validation"


def open_dense(model: str) -> Source:
    """The model to be packed. Raises ValueError for one that is packed already."""
    from ..formats.source import open_source

    source = open_source(model)
    if source.quantized:
        raise ValueError(f"{model}: packed already; name the dense model, or see acc export --to dense")
    return source


def calibration(
    source: Source, data: str | None, nsamples: int | None, seqlen: int | None, needed: bool
) -> dict[str, Any]:
    """Which text, and how much of it; what is drawn from the model itself takes time to draw, so less is the
    default."""
    if data is None and needed:
        data = "self" if source.kind == "demo" else HUB_TEXT
    data = data if needed else None
    samples, length = (64, 512) if data == "self" else (128, 2048)
    longest = source.config.get("max_position_embeddings")
    if isinstance(longest, int):
        length = min(length, longest)
    return {"data": data, "nsamples": nsamples or samples, "seqlen": seqlen or length}


def plain_name(source: Source) -> str:
    """`Qwen/Qwen3-0.6B@main` -> `Qwen3-0.6B`."""
    plain = {"hub": source.spec.partition("@")[0], "gguf": str(Path(source.spec).with_suffix("")), "demo": "demo"}
    return Path(plain.get(source.kind) or source.folder.resolve()).name


def resolved(
    recipe: Recipe, source: Source, data: str | None = None, nsamples: int | None = None, seqlen: int | None = None
) -> Recipe:
    """A recipe read from a file with the calibration that its run will have: what is given here goes before what the
    file says, and that before the defaults."""
    said = {name: getattr(recipe.calibration, name) for name in recipe.calibration.model_fields_set}
    wanted = calibration(
        source,
        data or said.get("data"),
        nsamples or said.get("nsamples"),
        seqlen or said.get("seqlen"),
        bool(recipe.needs or recipe.refine),
    )
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=wanted)})


def pack(
    screen: Screen,
    recipe: Recipe,
    source: Source,
    folder: Path,
    *,
    batch: int,
    device: str,
    spill: Path | None,
    resume: bool,
    overwrite: bool,
    text: CalibrationText | None = None,
    papers: dict[str, str] | None = None,
) -> None:
    """Runs `recipe` over `source`, `batch` tokens at once, and writes `folder`, with `papers` beside the weights. The
    text is loaded and shown here, unless it was before.

    Raises ValueError for input that cannot be compressed, OSError when the disk cannot take the output, and
    KeyboardInterrupt with the command that goes on.
    """
    from ..calibrate.stream import Stream
    from ..compress.apply import apply, assign
    from ..compress.refine import STEP_TOKENS
    from ..formats.source import open_source
    from ..formats.store import Store
    from .base import bits_of, show_text
    from .ui import Meter

    Store.check(folder, resume=resume, overwrite=overwrite)
    rewritten = recipe.rewrite(source)
    assign(recipe, Stream(rewritten))  # a pattern that fits nothing is found before the text is read
    show_recipe(screen, recipe, source, device)
    recipe = recipe.settled(source.dtype, device)
    for note in rewritten.notes:
        screen.field("Rewrite", note)
    if text is None and (recipe.needs or recipe.refine):
        text = calibration_text(recipe, source)
        show_text(screen, text)
    batches: list[Any] = []
    if text is not None:
        tokens = min(batch, STEP_TOKENS) if recipe.refine else batch
        batches = list(text.batches.split(max(1, tokens // recipe.calibration.seqlen)))
    again = f"acc {_command(source.spec, folder)} --resume"
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
                papers=papers,
                report=meter,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is kept; go on with\n  {again}") from None
    made = open_source(outcome.folder)
    _summary(screen, source, rewritten, made, outcome)
    screen.next(f"acc eval {folder} --base {source.spec} --data {_evaluation(source)}")
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


def show_recipe(screen: Screen, recipe: Recipe, source: Source, device: str) -> None:
    """The model, what is done to it, and the type that it is run in where that is not its own."""
    from .base import show_dtype
    from .ui import shorten

    kind = str(source.dtype).removeprefix("torch.")
    screen.line(f"Model     {source.spec}: {source.config.get('model_type')}, {kind}")
    if len(recipe.steps) > MANY:
        tensors = sum(len(step.targets) for step in recipe.steps)
        screen.field("Method", f"{recipe.steps[0].method}, {len(recipe.steps)} settings for {tensors} tensors")
    else:
        for step in recipe.steps:
            where = "" if step.targets == ("*",) else f": {shorten(', '.join(step.targets), 60)}"
            screen.field("Method", describe(step) + where)
    show_dtype(screen, source, recipe.dtype, device)


def describe(step: Step) -> str:
    """A step's method, its bits, and what is not as it comes."""
    said = {"bits": getattr(step.settings, "bits", None)} | step.settings.model_dump(exclude_defaults=True)
    return ", ".join([step.method, *(f"{name} {value}" for name, value in said.items() if value is not None)])


def calibration_text(recipe: Recipe, source: Source) -> CalibrationText:
    """Loads the calibration text that a recipe names."""
    from ..calibrate.text import load_text
    from .base import sampler, text_limits, tokenizer_of

    wanted = recipe.calibration
    assert wanted.data is not None
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


def _command(model: str, folder: Path) -> str:
    """The command as it was typed, with the output named where it was left to the default."""
    import shlex
    import sys

    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    if folder not in map(Path, words) and model in words:
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
