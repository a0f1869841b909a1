"""How a budget is spent: the text is read, every part measured at every setting, and a recipe written from the best."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibrate.text import CalibrationText
    from ..compress.budget import Choice, Table
    from ..compress.recipe import Recipe
    from ..formats.source import Source
    from .ui import Screen

UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
TOKENS = 20480  # that settings are tried on
PROBE = 4096  # of these, that losses are measured on
ALONE = 1024  # the same where rounding is not learned and every part is carried to the logits by itself
LEARNED = 16  # steps of learned rounding, at most, that tell what it leaves
LESSON = 1024  # tokens of such a step
MARGIN = 0.99  # of the bytes, where outliers decide how many there will be
MIDDLE = 3.5  # bits, of the settings that are tried when the loss is given
FILE = "budget.json"


@dataclass(frozen=True)
class Budget:
    """What a mix may take, one of these: stored `bits` per packed weight, bytes of the whole model, nats per token."""

    bits: float | None = None
    fit: int | None = None
    max_kl: float | None = None

    @classmethod
    def of(cls, bits: float | None, fit: str | None, max_kl: float | None) -> Budget:
        """As typed. Raises ValueError for more than one of them, and for a size that is none."""
        if sum(given is not None for given in (bits, fit, max_kl)) > 1:
            raise ValueError("--bits, --fit and --max-kl: give one of them, it decides the others")
        return cls(bits, None if fit is None else parse_size(fit), max_kl)

    @property
    def mixed(self) -> bool:
        """Whether it takes a mix; whole bits are those of every code."""
        return self.fit is not None or self.max_kl is not None or (self.bits is not None and self.bits % 1 != 0)

    def limit(self, source: Source, targets: Collection[str]) -> tuple[int | None, int]:
        """Bytes that the packed tensors may take, None where the loss is limited; and how many weights these have."""
        inside = sum(math.prod(source.info(name).shape) for name in targets)
        if self.fit is None:
            return None if self.bits is None else int(self.bits * inside / 8), inside
        kept = sum(source.info(name).nbytes for name in source.names() if name not in targets)
        limit = self.fit - kept - (1 << 14) - 512 * len(source.names())  # headers of the files
        if limit <= 0:
            raise ValueError(
                f"--fit: what is not packed (embeddings, norms, ...) takes {kept:,} of the {self.fit:,} bytes"
            )
        return limit, inside

    def table(self, options: Sequence[Sequence[Choice]], limit: int | None) -> Table:
        """The best mix. Raises ValueError, with what could be had, when there is none."""
        from ..compress.budget import best_table, smallest_table

        if limit is None:
            assert self.max_kl is not None
            return smallest_table(options, self.max_kl)
        firm = all(choice.firm for choices in options for choice in choices)
        return best_table(options, limit if firm else int(MARGIN * limit))


def parse_size(text: str) -> int:
    """`6GiB`, `6G`, `800 MB` -> bytes; GB is taken as 10^9, GiB and G as 2^30. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"--fit {text}: expected a size such as 6GiB or 800MB")
    number, unit, binary = found.groups()
    power = UNITS[unit.upper()]
    if unit and not binary and text.strip().upper().endswith("B"):
        power = 1000 ** int(math.log2(power) / 10)
    return int(float(number) * power)


@dataclass(frozen=True)
class Mix:
    """The best table within a budget, and what was measured for it: `options` hold every part at every setting.

    `limit` is in bytes, None where it is the loss that is limited; losses are the logits' where `scaled`."""

    table: Table
    options: list[list[Choice]]
    limit: int | None
    scaled: bool

    @classmethod
    def best(cls, options: list[list[Choice]], limit: int | None, budget: Budget, scaled: bool) -> Mix:
        """Raises ValueError when none is within `budget`, saying what could be had."""
        return cls(budget.table(options, limit), options, limit, scaled)

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with the table's steps instead of its one."""
        return recipe.model_copy(update={"steps": tuple(self.table.steps())})

    def show(self, screen: Screen) -> None:
        """Setting by setting, what it is expected to lose, and the proof that there is none better."""
        from .packing import describe
        from .ui import percent

        table = self.table
        weights = sum(choice.part.weights for choice in table.choices)
        rows = []
        for step in table.steps():
            mine = [c for c in table.choices if (c.method, c.settings) == (step.method, step.settings)]
            share = sum(choice.part.weights for choice in mine) / weights
            stored = 8 * sum(c.nbytes for c in mine) / sum(c.part.weights for c in mine)
            rows.append([describe(step).partition(", ")[2], str(len(step.targets)), percent(share), f"{stored:.2f}"])
        screen.line()
        screen.table("", [table.choices[0].method, "tensors", "weights", "bits"], sorted(rows))
        unit = "nats per token" if self.scaled else "of the outputs"
        screen.line()
        if self.limit is None:
            screen.field("Expected", f"{table.loss:.4g} {unit} lost, in {table.nbytes:,} bytes;")
            screen.field("", f"no table that loses as little takes less than {table.bound:,.0f}")
        else:
            screen.field(
                "Expected", f"{table.loss:.4g} {unit} lost; no table of this size has less than {table.bound:.4g}"
            )

    def record(self) -> str:
        """As JSON: the table, and all that was measured."""
        kinds = list(dict.fromkeys((choice.method, choice.settings) for row in self.options for choice in row))
        told = {
            "limit_bytes": self.limit,
            "expected_bytes": self.table.nbytes,
            "expected_loss": self.table.loss,
            "lower_bound": self.table.bound,
            "loss_of": "logits" if self.scaled else "block outputs",
            "parts": [
                {
                    "tensors": list(choice.part.tensors),
                    "method": choice.method,
                    "settings": choice.settings.model_dump(mode="json"),
                    "bits": round(choice.bits, 4),
                    "loss": choice.loss,
                }
                for choice in self.table.choices
            ],
            "settings": [{"method": method, **settings.model_dump(mode="json")} for method, settings in kinds],
            "measured": [
                {
                    "block": choices[0].part.block,
                    "tensors": list(choices[0].part.tensors),
                    "weights": choices[0].part.weights,
                    "bytes": [choice.nbytes for choice in choices],
                    "firm": all(choice.firm for choice in choices),
                    "loss": [choice.loss for choice in choices],
                }
                for choices in self.options
            ],
        }
        return json.dumps(told, indent=1) + "\n"


def spend(
    screen: Screen,
    source: Source,
    recipe: Recipe,
    text: CalibrationText,
    *,
    budget: Budget,
    scaled: bool,
    per_expert: bool,
    device: str,
) -> Mix:
    """Measures every part at every setting of the recipe's method, and finds the best mix within `budget`.

    Raises ValueError when there is none, saying what could be had.
    """
    from ..calibrate.stream import Stream
    from ..compress.apply import assign
    from ..compress.budget import measure
    from .ui import Meter

    rewritten = recipe.rewrite(source)
    targets = set(assign(recipe, Stream(rewritten)))
    limit, inside = budget.limit(rewritten, targets)
    step, wanted = recipe.steps[0], MIDDLE if limit is None else 8 * limit / inside
    near = [wanted] if limit is not None else [wanted - 1, wanted, wanted + 1]
    settings = list(dict.fromkeys(one for bits in near for one in step.settings.alternatives(bits)))
    if len(settings) < 2:
        raise ValueError(f"{step.method} has no settings around {wanted:.2f} bits that a budget could choose among")
    tokens, learned = effort(recipe.refine)
    probe, rest = cut(text.batches, tokens, TOKENS)
    lessons = rest.split(max(1, LESSON // rest.shape[1])) if len(rest) else ()
    with Meter(screen) as meter:
        options = measure(
            rewritten,
            targets,
            [(step.method, one) for one in settings],
            [probe, *lessons],
            bits=wanted,
            scaled=scaled,
            refine=learned,
            per_expert=per_expert,
            device=device,
            report=meter,
        )
    return Mix.best(options, limit, budget, scaled)


def effort(refine: int) -> tuple[int, int]:
    """Tokens that losses are measured on, and steps of learned rounding that are taken, for a run of `refine` steps."""
    return (PROBE, min(refine, LEARNED)) if refine else (ALONE, 0)


def cut(text: Tensor, probe: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Of sequences `[N, T]` the first ones, of about `probe` tokens but not more than a quarter, as one batch; and what
    follows in rows of the same length, all together at most `tokens`."""
    count = max(1, min(probe // text.shape[1], len(text) // 4))
    first, rest = text[:count, :probe], text[count:].flatten()
    length = first.shape[1]
    return first, rest[: min(len(rest), tokens - first.numel()) // length * length].view(-1, length)


def recall(folder: Path, source: Source, recipe: Recipe, budget: Budget) -> Mix:
    """The best mix within `budget` by what another run measured, which wrote `folder`.

    Raises ValueError for a folder without that, where that run looked at another model, at other tensors, at another
    method, or had other settings of it, than `recipe`, and when no mix is within the budget."""
    from ..formats.manifest import read_manifest

    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or not (folder / FILE).is_file():
        raise ValueError(f"--measured {folder}: no {FILE} of acc there; make one with acc quantize --bits 3.3 or --fit")
    return _recalled(folder, f"--measured {folder}", manifest["identity"], source, recipe, budget)


def recall_begun(out: Path, source: Source, recipe: Recipe, budget: Budget) -> Mix | None:
    """The same by what the run that is to be resumed measured before it was stopped; None where it had not."""
    from ..formats.manifest import read_manifest
    from ..formats.partial import partial_of
    from ..formats.store import Store

    for folder, identity in [
        (partial_of(out), Store.unfinished(out)),
        (out, (read_manifest(out) or {}).get("identity")),
    ]:
        if identity is not None and (folder / FILE).is_file():
            return _recalled(folder, f"--resume: {folder}", identity, source, recipe, budget)
    return None


def _recalled(
    folder: Path, where: str, identity: dict[str, Any], source: Source, recipe: Recipe, budget: Budget
) -> Mix:
    """From the file in `folder`, which a run of that identity wrote; `where` is what errors are said of."""
    from ..calibrate.stream import Stream
    from ..compress.apply import assign
    from ..compress.budget import Choice, Part
    from ..compress.recipe import Recipe, configure
    from ..formats.safefile import confined, read_json

    if identity.get("source") != source.identity():
        raise ValueError(f"{where}: was made of another model than {source.spec}")
    told = read_json(confined(folder, FILE))
    try:
        made = Recipe.from_dict(identity["recipe"])
        kinds = [(one.pop("method"), one) for one in map(dict, told["settings"])]
        settings = [(method, configure(method, fields)) for method, fields in kinds]
        options = []
        for row in told["measured"]:
            part = Part(row["block"], tuple(row["tensors"]), row["weights"])
            each = zip(settings, row["bytes"], row["loss"], strict=True)
            options.append([Choice(part, *kind, nbytes, row["firm"], loss) for kind, nbytes, loss in each])
        scaled = told["loss_of"] == "logits"
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder / FILE}: not as acc writes it; make the folder again") from None
    if budget.max_kl is not None and not scaled:
        raise ValueError(f"{where}: losses are of the blocks' outputs; --max-kl needs --sensitivity kl there")
    stream = Stream(recipe.rewrite(source))
    step, chosen = recipe.steps[0], assign(recipe, stream)
    if made.rewrites != recipe.rewrites:
        raise ValueError(f"{where}: the weights were rotated otherwise there")
    if (method := options[0][0].method) != step.method:
        raise ValueError(f"{where}: is of --method {method}, not of {step.method}")
    if effort(made.refine) != effort(recipe.refine):
        raise ValueError(f"{where}: was measured for --refine {made.refine}, not {recipe.refine}")
    for name, wanted in step.settings.model_dump().items():
        tried = {getattr(one, name) for _, one in settings}
        if len(tried) == 1 and wanted not in tried and name in step.settings.model_fields_set:
            raise ValueError(f"{where}: was measured with {name} {tried.pop()}, not {wanted}")
    known = {name for choices in options for name in choices[0].part.tensors}
    if odd := sorted(known ^ chosen.keys()):
        raise ValueError(f"{where}: {odd[0]} and {len(odd) - 1} others are in one of the two runs alone")
    limit, _ = budget.limit(stream.source, chosen)
    return Mix.best(options, limit, budget, scaled)
