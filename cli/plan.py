"""acc plan: what a run would make and take, before it is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .base import Json, MethodCommand, Model

if TYPE_CHECKING:
    from ..calibrate.stream import Stream
    from ..compress.recipe import Recipe, Step
    from ..formats.base import Entry
    from ..formats.source import Source
    from .ui import Screen

COMMAND = MethodCommand  # the chosen method's own fields are options too
WIDEST = 8  # bits per code


def plan(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="where the folder would be written: its disk is looked at")] = Path(),
    bits: Annotated[float | None, typer.Option(help="bits per code, default 3; 2.7: stored bits, mixed")] = None,
    method: Annotated[str, typer.Option(help="see acc show")] = "spqr",
    recipe: Annotated[str | None, typer.Option(help="a recipe instead of a method: a file, or see acc apply")] = None,
    changes: Annotated[list[str], typer.Option("--set", help="of the recipe: path=value, e.g. steps.0.bits=4")] = [],  # noqa: B006
    fit: Annotated[str | None, typer.Option(help="the most bits whose files fit, e.g. 6GiB")] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="the fewest bytes that lose so many nats per token; with --measured")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="folder of a run that mixed settings: what it measured says who gets what")
    ] = None,
    nsamples: Annotated[int | None, typer.Option(min=1, help="sequences of text; default 128, of self 64")] = None,
    seqlen: Annotated[int | None, typer.Option(min=2, help="tokens per sequence; default 2048, of self 512")] = None,
    targets: Annotated[list[str], typer.Option(help="what to compress: a glob, or re:REGEX; may be repeated")] = ["*"],  # noqa: B006
    ignore: Annotated[list[str], typer.Option(help="what to leave as it is: a glob, or re:REGEX")] = [],  # noqa: B006
    refine: Annotated[
        int | None, typer.Option(min=0, help="steps of learned rounding; default: 16 or 0, by method")
    ] = None,
    rotate: Annotated[str | None, typer.Option(help="rotate the weights first: heads, residual or all")] = None,
    batch: Annotated[int, typer.Option(min=1, help="tokens that go through a block at once")] = 4096,
    as_json: Json = False,
) -> None:
    """Tell what a run would make and take: bytes, bits, disk, memory, time.

    Reads the headers of a model's files and no weight. Bytes are exact but for what only the data decides, as SpQR's
    outliers, and within 2% with those; memory and time are estimates, the time from two seconds of measuring.
    """
    from ..calibrate.stream import Stream
    from ..compress.apply import assign
    from ..compress.plan import planned_entries, sizes
    from .base import check_dtype
    from .packing import open_dense, resolved
    from .spending import Budget, recall
    from .ui import Screen, size

    screen, source = Screen(as_json), open_dense(model)
    budget = Budget.of(bits, fit, max_kl)
    if max_kl is not None and measured is None:
        raise ValueError(
            f"--max-kl {max_kl:g}: headers do not say what is lost; name with --measured the folder of a run that mixed"
            " settings, or let the run itself measure: acc quantize --max-kl"
        )
    if measured is not None and (recipe is not None or not budget.mixed):
        raise ValueError("--measured is of a mix: give --max-kl, --fit or --bits as in 2.7 with it, and no --recipe")
    mixed = bits if budget.mixed and measured is None else None
    if recipe is None:
        if changes:
            raise ValueError("--set changes a recipe: name one with --recipe")
        code = 3 if bits is None else min(max(round(bits), 2), 8) if budget.mixed else int(bits)
        settings = context.obj | {"bits": code}
        wanted = _one_step(method, settings, targets, ignore, refine, rotate)
    else:
        wanted = _of_file(recipe, changes, [*context.obj, *(["bits"] if bits is not None else [])])
    wanted = resolved(wanted, source, None, nsamples, seqlen)
    rewritten = wanted.rewrite(source)
    stream = Stream(rewritten, dtype=check_dtype(wanted.dtype))
    tried: dict[int, int] = {}
    asked, mix = wanted, None
    if measured is not None:
        mix = recall(measured, source, wanted, budget)
        wanted = mix.of(wanted)
    elif fit is not None and budget.fit is not None:
        wanted, tried = _fitting(wanted, stream, budget.fit, fit)
    chosen = assign(wanted, stream)
    choices = [chosen] if mixed is None else _choices(mixed, wanted.steps[0], chosen)
    taken = [sizes(choice, stream) for choice in choices]
    after = taken[0] if mixed is None else _mixed(mixed, wanted.steps[0], chosen, stream, taken)
    result: dict[str, Any] = _bytes_of(source, rewritten, chosen, after) | {"recipe": wanted.to_dict()}
    if budget.fit is not None and mix is None:
        left = budget.fit - (result["after"] - result["packed_after"])
        result["fit"] = {"limit": budget.fit, "bytes": tried, "mixed_bits": 8 * left / result["packed_parameters"]}
    result |= _cost(wanted, stream, chosen, source, after, batch, taken) | {"disk": _disk(source, after, out)}
    result["engines"] = _engines(source, [planned_entries(each, stream) for each in choices])
    result["mixed"] = mixed
    if mix is not None:
        result["mix"] = {"expected_loss": mix.table.loss, "bound": mix.table.bound}
    _show(screen, wanted, source, rewritten, result)
    instead = [] if mixed is None else ["--bits", f"{mixed:g}"]
    if mix is not None:
        mix.show(screen)
        given = {"--bits": bits, "--fit": fit, "--max-kl": max_kl}
        instead = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        instead += ["--measured", str(measured)]
        wanted = asked
    screen.next(_command(model, recipe, changes, wanted, fit is not None, instead))
    screen.result(result)
    if missing := result["disk"]["missing"]:
        raise OSError(
            f"{result['disk']['folder']}: {size(missing)} of disk are missing; make room, or name another OUT"
        )


def _one_step(
    method: str, settings: dict[str, Any], targets: list[str], ignore: list[str], refine: int | None, rotate: str | None
) -> Recipe:
    """The recipe that acc quantize would make of the same options, text apart."""
    from ..compress.recipe import Recipe, configure
    from .quantize import rotation

    refine = configure(method, settings).refine if refine is None else refine
    step = {"method": method, **settings, "targets": targets, "ignore": ignore}
    return Recipe.from_dict({"refine": refine, "steps": [*rotation(rotate, 0), step]})


def _of_file(name: str, changes: list[str], others: list[str]) -> Recipe:
    from .apply import read_recipe

    if others:
        raise ValueError(f"--{others[0].replace('_', '-')} beside --recipe: change the recipe with --set path=value")
    return read_recipe(name, changes)


def _fitting(recipe: Recipe, stream: Stream, limit: int, spelled: str) -> tuple[Recipe, dict[int, int]]:
    """The recipe with the most bits whose files are no larger than `limit`, and the bytes of each that was tried.

    Raises ValueError with the least that can be had."""
    from ..compress.apply import assign
    from ..compress.plan import OVERHEAD, sizes, with_bits
    from .ui import size

    tried: dict[int, int] = {}
    for bits in range(WIDEST, 1, -1):
        try:
            changed = with_bits(recipe, bits)
        except ValueError:  # bits that the method does not know
            continue
        after = sizes(assign(changed, stream), stream)
        tried[bits] = sum(after.values()) + OVERHEAD * len(after)
        if tried[bits] <= limit:
            return changed, tried
    if not tried:
        raise ValueError("--fit: the method has no bits to choose")
    least = min(tried, key=lambda bits: tried[bits])
    raise ValueError(
        f"--fit {spelled}: the least is {size(tried[least])}, at {least} bits; larger groups take less, and so does the"
        " output head where --targets names it"
    )


def _choices(bits: float, step: Step, chosen: dict[str, Step]) -> list[dict[str, Step]]:
    """What `acc quantize` would mix for so many stored bits. Raises ValueError where there is nothing to choose."""
    choices = [
        dict.fromkeys(chosen, step.model_copy(update={"settings": one})) for one in step.settings.alternatives(bits)
    ]
    if len(choices) < 2:
        raise ValueError(f"{step.method} has no settings around {bits:g} bits that a budget could choose among")
    return choices


def _mixed(
    bits: float, step: Step, chosen: dict[str, Step], stream: Stream, taken: list[dict[str, int]]
) -> dict[str, int]:
    """Bytes of every tensor when a mix takes so many stored bits, spread evenly as nobody knows yet who gets more;
    `taken` are those of its choices. Raises ValueError with the least that can be had."""
    import math

    weights = {name: math.prod(stream.source.info(name).shape) for name in chosen}
    least = min(8 * sum(after[name] for name in chosen) / sum(weights.values()) for after in taken)
    if bits < least:
        raise ValueError(f"--bits {bits:g}: the least that {step.method} can do there is {least:.3f} stored bits")
    return taken[0] | {name: int(bits * weights[name] / 8) for name in chosen}


def _bytes_of(source: Source, rewritten: Source, chosen: dict[str, Step], after: dict[str, int]) -> dict[str, Any]:
    """Bytes by class, before and after, and stored bits."""
    import math

    from .base import class_of

    weights = {name: math.prod(rewritten.info(name).shape) for name in after}
    before = {name: source.info(name).nbytes for name in source.names()}
    classes: dict[str, dict[str, int]] = {}
    for name in after:
        row = classes.setdefault(class_of(name), {"weights": 0, "before": 0, "after": 0})
        row["weights"] += weights[name]
        row["before"] += before.get(name, 0)  # a head that a rewrite unties was not there
        row["after"] += after[name]
    packed = sum(weights[name] for name in chosen)
    inside = sum(after[name] for name in chosen)
    return {
        "classes": dict(sorted(classes.items(), key=lambda item: -item[1]["before"])),
        "before": sum(before.values()),
        "after": sum(after.values()),
        "bits": 8 * sum(after.values()) / sum(weights.values()),
        "packed_parameters": packed,
        "packed_before": sum(before.get(name, 0) for name in chosen),
        "packed_after": inside,
        "packed_bits": 8 * inside / packed,
    }


def _cost(
    recipe: Recipe,
    stream: Stream,
    chosen: dict[str, Step],
    source: Source,
    after: dict[str, int],
    batch: int,
    taken: list[dict[str, int]],
) -> dict[str, Any]:
    """Estimates of memory and time; of several choices, whose tensors have `taken` bytes, a mix is made, for which each
    is measured."""
    import os

    from ..compress.estimate import Shapes, duration, measure, memory, memory_of_measuring, probing, work
    from .spending import LESSON, TOKENS, effort

    wanted = recipe.calibration
    tokens = wanted.nsamples * wanted.seqlen if recipe.needs or recipe.refine else 0
    shapes = Shapes(recipe, stream, chosen)
    moments = memory(shapes, after, tokens, batch)
    before = sum(source.info(name).nbytes for name in source.names())
    speed = measure(recipe, stream.dtype)
    seconds = duration(work(shapes, before, sum(after.values()), tokens), speed)
    if len(taken) > 1:
        probe, steps = effort(recipe.refine)
        seen = min(TOKENS, tokens)
        passes = probing(shapes, len(taken), probe, seen, LESSON * steps, speed)
        seconds["measure"] = len(taken) * seconds.get("solve", 0.0) + passes
        moments["measure"] = memory_of_measuring(shapes, taken, probe, seen, LESSON if steps else 0)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "tokens": tokens,
        "memory": {"peak": max(moments.values()), "at": max(moments, key=lambda m: moments[m]), "machine": machine},
        "seconds": seconds,
        "speed": {"products": speed.products, "copy": speed.copy, "threads": speed.threads},
    }


def _disk(source: Source, after: dict[str, int], out: Path) -> dict[str, Any]:
    """What would be written, and what is free where `out` is, or would be."""
    import shutil

    from ..compress.plan import OVERHEAD

    home = out.absolute()
    while not home.exists():
        home = home.parent
    written = sum(after.values()) + OVERHEAD * len(after) + sum(path.stat().st_size for path in source.side_files())
    free = shutil.disk_usage(home).free
    return {"folder": str(home), "written": written, "free": free, "missing": max(0, written - free)}


def _engines(source: Source, choices: list[dict[str, Entry]]) -> dict[str, str]:
    """What can load the result, and what it takes; of a mix, whatever it is mixed of."""
    from ..formats.engine import engine, engines
    from .ui import size

    dense = size(sum(source.info(name).nbytes for name in source.names()))
    found = {"transformers": "after `import acc`"}
    for name in engines():
        try:
            one = engine(name)(source)
            every = ((key, entry) for entries in choices for key, entry in entries.items())
            refused = next((why for key, entry in every if (why := one.refuses(key, entry))), None)
        except ValueError as error:
            refused = str(error)
        if refused is None:
            found[name] = f"after acc export --to {name}"
    return found | {"any other": f"after acc export --to dense, at {dense}"}


MOMENTS = {
    "observe": "while a block is observed",
    "solve": "while a block is solved",
    "refine": "while rounding is learned",
    "measure": "while a mix is measured",
    "check": "while the result is checked",
}


def _show(screen: Screen, recipe: Recipe, source: Source, rewritten: Source, result: dict[str, Any]) -> None:
    from .packing import show_recipe
    from .ui import clock, count, size

    show_recipe(screen, recipe, source, "cpu")
    for note in rewritten.notes:
        screen.field("Rewrite", note)
    if "fit" in result:
        each = [f"{bits} bits {size(nbytes)}" for bits, nbytes in result["fit"]["bytes"].items()]
        screen.field("Fit", f"{size(result['fit']['limit'])}: {', '.join(each[-3:])}")
        screen.field("", f"acc quantize --fit mixes settings and spends it all: {result['fit']['mixed_bits']:.2f} bits")
    if result["mixed"] is not None:
        screen.field("Mix", f"settings around these, {result['mixed']:g} stored bits together")
    rows = [
        [
            kind,
            count(row["weights"]),
            size(row["before"]),
            size(row["after"]),
            f"{8 * row['after'] / row['weights']:.3f}",
        ]
        for kind, row in result["classes"].items()
    ]
    packed, weights = "packed part", sum(row["weights"] for row in result["classes"].values())
    rows.append(["whole model", count(weights), size(result["before"]), size(result["after"]), f"{result['bits']:.3f}"])
    part = size(result["packed_before"]), size(result["packed_after"]), f"{result['packed_bits']:.3f}"
    rows.append([packed, count(result["packed_parameters"]), *part])
    screen.line()
    screen.table("", ["class", "weights", "before", "after", "stored bits"], rows)
    disk, memory, seconds = result["disk"], result["memory"], result["seconds"]
    screen.line()
    screen.field("Disk", f"{size(disk['written'])} to write, {size(disk['free'])} free")
    here = f" of {size(memory['machine'])} here" if memory["machine"] else ""
    screen.field("Memory", f"about {size(memory['peak'])}{here}, {MOMENTS[memory['at']]}")
    if memory["machine"] and memory["peak"] > memory["machine"]:
        screen.field("", "too much: take fewer --nsamples, --refine 0, a smaller --batch, or a machine with more")
    phases = ", ".join(f"{phase} {clock(s)}" for phase, s in seconds.items() if s >= 1)
    screen.field("Time", f"about {clock(sum(seconds.values()))} ({phases})")
    speed = result["speed"]
    screen.field(
        "", f"as fast as this machine is now: {speed['products'] / 1e9:.0f} GFLOP/s, {speed['threads']} threads"
    )
    screen.field("Loads in", "; ".join(f"{engine} {how}" for engine, how in result["engines"].items()))


def _command(
    model: str, recipe: str | None, changes: list[str], wanted: Recipe, fitted: bool, budget: list[str]
) -> str:
    """What would do what was planned, text and pace apart; a `budget` stands for the bits."""
    import shlex

    if recipe is not None:
        steps = enumerate(wanted.to_dict()["steps"])
        found = [f"steps.{number}.bits={step['bits']}" for number, step in steps if fitted and "bits" in step]
        return shlex.join(["acc", "apply", recipe, model, *(w for c in [*changes, *found] for w in ("--set", c))])
    step, words = wanted.steps[0], ["acc", "quantize", model, "--method", wanted.steps[0].method]
    own = step.settings.model_dump(mode="json", exclude_defaults=True)
    own.pop("bits", None)
    if not budget and "bits" in type(step.settings).model_fields:
        own |= {"bits": getattr(step.settings, "bits", None)}
    for name, value in own.items():
        words += [f"--{name.replace('_', '-')}", "null" if value is None else str(value).lower()]
    words += [word for pattern in step.targets if pattern != "*" for word in ("--targets", pattern)]
    words += [word for pattern in step.ignore for word in ("--ignore", pattern)]
    words += budget
    words += ["--refine", str(wanted.refine)] if wanted.refine != step.settings.refine else []
    for one in wanted.rewrites:
        which = [name for name in ("residual", "heads") if getattr(one, name, False)]
        words += ["--rotate", which[0] if len(which) == 1 else "all"]
    return shlex.join(words)
