"""The model card of a compressed checkpoint: what was done, with what, how to load it, and how to do it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..formats.source import Source
from .recipe import Recipe

LICENCE_KEYS = ("license", "license_name", "license_link", "language")
REFUSED = [
    "Without `import acc`, transformers refuses the files.",
    "`acc export THIS_FOLDER OUT --to dense` makes a plain checkpoint.",
    "",
]


def card(source: Source, recipe: Recipe, records: list[dict[str, Any]], text_record: dict[str, Any] | None) -> str:
    """README.md of the output. Nothing in it depends on when, where or how fast the run was."""
    packed = [record for record in records if record["method"] != "kept"]
    plain = {"hub": source.spec.partition("@")[0], "gguf": Path(source.spec).name}
    base = plain.get(source.kind) or source.folder.resolve().name
    step = recipe.steps[0].method if recipe.steps else recipe.rewrites[0].name
    lines = [
        "---",
        yaml.safe_dump(_front_matter(source, base, recipe), sort_keys=False).rstrip(),
        "---",
        "",
        f"# {base}, {step} at {_bits(packed or records, 'stored_bits'):.2f} bits",
        "",
        *_figures(base, records, packed),
        "## Load",
        "",
        "```python",
        *(
            ["import acc  # pip install acc-toolkit; tells transformers how to read the packed weights"]
            if packed
            else []
        ),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        *(REFUSED if packed else []),
        "## How it was made",
        "",
        "The resolved recipe; `report.jsonl` has a line per tensor, `manifest.json` a checksum per file.",
        "",
        "```yaml",
        recipe.to_yaml().rstrip(),
        "```",
        "",
        *_text(text_record),
        *_events(records),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _figures(base: str, records: list[dict[str, Any]], packed: list[dict[str, Any]]) -> list[str]:
    """What is packed, and in how many bits."""
    if not packed:
        return [f"`{base}` rewritten by acc {__version__}: other weights, the same model. Nothing is packed.", ""]
    everything = sum(record["parameters"] for record in records)
    share = sum(record["parameters"] for record in packed) / everything
    return [
        f"`{base}` compressed by acc {__version__}: {100 * share:.1f}% of its {everything:,} weights are packed.",
        "",
        "| | bits per weight |",
        "|---|---|",
        f"| packed weights, nominal | {_bits(packed, 'nominal_bits'):.3f} |",
        f"| packed weights, counted from the files | {_bits(packed, 'stored_bits'):.3f} |",
        f"| all weights, counted from the files | {_bits(records, 'stored_bits'):.3f} |",
        "",
    ]


def _bits(records: list[dict[str, Any]], key: str) -> float:
    weights = sum(record["parameters"] for record in records)
    return sum(record[key] * record["parameters"] for record in records) / weights


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
    methods = [*(one.name for one in recipe.rewrites), *(step.method for step in recipe.steps)]
    bits = {step.settings.model_dump().get("bits", 16) for step in recipe.steps} - {16}
    return {
        **({"base_model": base} if source.kind == "hub" else {}),
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **{key: given[key] for key in LICENCE_KEYS if key in given},
        "tags": ["acc", *dict.fromkeys(methods), *(f"{b}-bit" for b in sorted(bits))],
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


def _events(records: list[dict[str, Any]]) -> list[str]:
    """Every way in which a tensor did not go as usual, counted."""
    kinds: dict[str, int] = {}
    for record in records:
        for event in record.get("events", []):
            kinds[event["event"]] = kinds.get(event["event"], 0) + 1
    if not kinds:
        return []
    counted = [f"- {kind}: {count}" for kind, count in sorted(kinds.items())]
    return ["Events (each is named in `report.jsonl`):", "", *counted, ""]
