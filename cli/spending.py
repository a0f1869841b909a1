"""How a budget is spent: the text is read, every part measured at every setting, and a recipe written from the best."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..calibrate.text import CalibrationText
    from ..compress.budget import Table
    from ..compress.recipe import Recipe
    from ..formats.source import Source
    from .ui import Screen

UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
TOKENS = 16384  # that settings are tried on; of these the first PROBE are what losses are measured on
PROBE = 1024
MARGIN = 0.99  # of the bytes, where outliers decide how many there will be


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


def spend(
    screen: Screen,
    source: Source,
    recipe: Recipe,
    text: CalibrationText,
    *,
    bits: float | None,
    fit: int | None,
    scaled: bool,
    per_expert: bool,
    device: str,
) -> tuple[Recipe, str]:
    """The recipe whose steps take so many stored `bits` per packed weight, or let the whole model `fit` in that many
    bytes; and what is known about it, as JSON.

    Raises ValueError when no setting is small enough, saying what the smallest takes.
    """
    from ..calibrate.stream import Stream
    from ..compress.apply import assign
    from ..compress.budget import best_table, measure
    from .ui import Meter

    rewritten = recipe.rewrite(source)
    targets = set(assign(recipe, Stream(rewritten)))
    inside = sum(math.prod(rewritten.info(name).shape) for name in targets)
    if fit is not None:
        kept = sum(info.nbytes for name in rewritten.names() if name not in targets for info in [rewritten.info(name)])
        limit = fit - kept - (1 << 14) - 512 * len(rewritten.names())  # headers of the files
        if limit <= 0:
            raise ValueError(f"--fit: what is not packed (embeddings, norms, ...) takes {kept:,} of the {fit:,} bytes")
    else:
        assert bits is not None
        limit = int(bits * inside / 8)
    wanted = 8 * limit / inside
    step = recipe.steps[0]
    settings = step.settings.alternatives(wanted)
    if len(settings) < 2:
        raise ValueError(f"{step.method} has no settings around {wanted:.2f} bits that a budget could choose among")
    first, rest = text.batches[:1, :PROBE], text.batches[1:].flatten()
    length = first.shape[1]
    rest = rest[: min(len(rest), TOKENS - length) // length * length].view(-1, length)
    with Meter(screen) as meter:
        options = measure(
            rewritten,
            targets,
            [(step.method, one) for one in settings],
            [first, *(rest.split(max(1, 4096 // length)) if len(rest) else ())],
            bits=wanted if scaled else None,
            per_expert=per_expert,
            device=device,
            report=meter,
        )
    firm = all(choice.firm for choices in options for choice in choices)
    table = best_table(options, limit if firm else int(MARGIN * limit))
    resolved = recipe.model_copy(update={"steps": tuple(table.steps())})
    _show(screen, table, scaled)
    return resolved, json.dumps(_record(table, limit, scaled), indent=1) + "\n"


def _show(screen: Screen, table: Table, scaled: bool) -> None:
    from .packing import describe
    from .ui import percent

    weights = sum(choice.part.weights for choice in table.choices)
    rows = []
    for step in table.steps():
        mine = [c for c in table.choices if (c.method, c.settings) == (step.method, step.settings)]
        share = sum(choice.part.weights for choice in mine) / weights
        stored = 8 * sum(c.nbytes for c in mine) / sum(c.part.weights for c in mine)
        rows.append([describe(step).partition(", ")[2], str(len(step.targets)), percent(share), f"{stored:.2f}"])
    screen.line()
    screen.table("", [table.choices[0].method, "tensors", "weights", "bits"], sorted(rows))
    unit = "nats per token" if scaled else "of the outputs"
    screen.line()
    screen.field("Expected", f"{table.loss:.4g} {unit} lost; no table of this size has less than {table.bound:.4g}")


def _record(table: Table, limit: int, scaled: bool) -> dict[str, Any]:
    return {
        "limit_bytes": limit,
        "expected_bytes": table.nbytes,
        "expected_loss": table.loss,
        "lower_bound": table.bound,
        "loss_of": "logits" if scaled else "block outputs",
        "parts": [
            {
                "tensors": list(choice.part.tensors),
                "method": choice.method,
                "settings": choice.settings.model_dump(mode="json"),
                "bits": round(choice.bits, 4),
                "loss": choice.loss,
            }
            for choice in table.choices
        ],
    }
