"""The model card of a compressed checkpoint: what was done, with what, how to load it, and how to do it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..formats.source import Source
from .recipe import Recipe

LICENCE_KEYS = ("license", "license_name", "license_link", "language")


def card(source: Source, recipe: Recipe, records: list[dict[str, Any]], text_record: dict[str, Any] | None) -> str:
    """README.md of the output. Nothing in it depends on when, where or how fast the run was."""
    packed = [record for record in records if record["method"] != "kept"]
    weights = sum(record["parameters"] for record in packed)
    everything = sum(record["parameters"] for record in records)
    stored = sum(record["stored_bits"] * record["parameters"] for record in packed) / weights
    nominal = sum(record["nominal_bits"] * record["parameters"] for record in packed) / weights
    whole = sum(record["stored_bits"] * record["parameters"] for record in records) / everything
    plain = {"hub": source.spec.partition("@")[0], "gguf": Path(source.spec).name}
    base = plain.get(source.kind) or source.folder.resolve().name
    step = recipe.steps[0]
    lines = [
        "---",
        yaml.safe_dump(_front_matter(source, base, recipe), sort_keys=False).rstrip(),
        "---",
        "",
        f"# {base}, {step.method} at {stored:.2f} bits",
        "",
        f"`{base}` compressed by acc {__version__}: "
        f"{100 * weights / everything:.1f}% of its {everything:,} weights are packed.",
        "",
        "| | bits per weight |",
        "|---|---|",
        f"| packed weights, nominal | {nominal:.3f} |",
        f"| packed weights, counted from the files | {stored:.3f} |",
        f"| all weights, counted from the files | {whole:.3f} |",
        "",
        "## Load",
        "",
        "```python",
        "import acc  # pip install acc-toolkit; tells transformers how to read the packed weights",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        "Without `import acc`, transformers refuses the files.",
        "`acc export THIS_FOLDER OUT --to dense` makes a plain checkpoint.",
        "",
        "## How it was made",
        "",
        "The resolved recipe; `report.jsonl` has a line per tensor, `manifest.json` a checksum per file.",
        "",
        "```yaml",
        recipe.to_yaml().rstrip(),
        "```",
        "",
        *_text(text_record),
        *_events(packed),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(source: Source, base: str, recipe: Recipe) -> dict[str, Any]:
    """The hub's metadata; the licence is the base's own, where its card tells it."""
    path = source.folder / "README.md"
    given: dict[str, Any] = {}
    if path.is_file():
        parts = path.read_text(encoding="utf-8", errors="replace").split("---", 2)
        if len(parts) == 3 and not parts[0].strip():
            try:
                loaded = yaml.safe_load(parts[1])
            except yaml.YAMLError:
                loaded = None
            given = loaded if isinstance(loaded, dict) else {}
    bits = {step.settings.model_dump().get("bits", 16) for step in recipe.steps} - {16}
    return {
        **({"base_model": base} if source.kind == "hub" else {}),
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **{key: given[key] for key in LICENCE_KEYS if key in given},
        "tags": ["acc", *dict.fromkeys(step.method for step in recipe.steps), *(f"{b}-bit" for b in sorted(bits))],
    }


def _text(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return ["No calibration text was used.", ""]
    return [
        f"Calibrated on {record['tokens']:,} tokens of `{record['data']}` ({record['nsamples_used']} sequences of "
        f"{record['seqlen']}, sha256 `{record['sha256'][:16]}`).",
        f"{record['bos']}; chat template {record['chat_template']}.",
        "",
    ]


def _events(packed: list[dict[str, Any]]) -> list[str]:
    """Every way in which a tensor did not go as usual, counted."""
    kinds: dict[str, int] = {}
    for record in packed:
        for event in record["events"]:
            kinds[event["event"]] = kinds.get(event["event"], 0) + 1
    if not kinds:
        return []
    counted = [f"- {kind}: {count}" for kind, count in sorted(kinds.items())]
    return ["Events (each is named in `report.jsonl`):", "", *counted, ""]
