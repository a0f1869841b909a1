"""acc show: methods, formats, passes and statistics, and what each can be told."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from .base import Json

# titles of what is listed: the folder, and the base that tells entries of one folder apart
FOLDERS = {
    "compress": ("Methods", "compress", None),
    "formats": ("Formats", "formats", None),
    "passes": ("Passes", "calibrate", "Pass"),
    "calibrate": ("Statistics", "calibrate", "Statistic"),
}


def show(
    name: Annotated[str | None, typer.Argument(help="a method, format, pass, statistic or recipe; or recipes")] = None,
    as_json: Json = False,
) -> None:
    """List what there is, or one entry's fields and source."""
    from ..registry import RECIPES, listing, recipes, spelled, typed
    from .ui import Screen

    screen = Screen(as_json)
    found = {kind: listing(folder, base) for kind, (_, folder, base) in FOLDERS.items()}
    if name is None:
        for kind, (title, _, _) in FOLDERS.items():
            screen.line(title)
            for entry, line in found[kind].items():
                screen.field(f"  {entry.replace('_', '-')}", line)
        found["exports"] = {"dense": "Plain weights."} | typed("formats", "Engine", "engine_")
        screen.line("Exports")
        for entry, line in found["exports"].items():
            screen.field(f"  {entry}", line)
        found["runtimes"] = typed("formats", "Runtime", "runtime_")
        screen.line("Exports of a calibration")
        for entry, line in found["runtimes"].items():
            screen.field(f"  {entry}", line)
        screen.field("Recipes", ", ".join(recipes()))
        screen.next("acc show spqr, or acc show recipes")
        screen.result(found | {"recipes": recipes()})
        return
    if name == "recipes":
        from .apply import show_recipes

        show_recipes(screen)
        return
    if name in recipes():
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        screen.line(text)
        screen.next(f"acc apply {name} MODEL")
        screen.result({"recipe": name, "text": text})
        return
    name = spelled(name)
    homes = [kind for kind in FOLDERS if name in found[kind]]
    if not homes:
        import difflib

        every = sorted({entry for entries in [*found.values(), recipes()] for entry in entries})
        near = difflib.get_close_matches(name, every, n=3) or every
        raise ValueError(f"there is no {name!r}; there is {', '.join(near)}")
    described = {kind: _describe(screen, kind, name) for kind in homes}
    if "compress" in homes:
        own = name in listing("compress", "Method")
        screen.next(f"acc quantize MODEL --method {name}" if own else f"acc quantize MODEL --{name} ...")
    elif "passes" in homes:
        screen.next(f"acc calibrate MODEL {name}")
    screen.result(described)


def _describe(screen: Any, kind: str, name: str) -> dict[str, Any]:
    from ..registry import lookup

    title, folder, base = FOLDERS[kind]
    cls = lookup(folder, name, base)
    text = inspect.getdoc(cls) or ""
    screen.line(f"{title.removesuffix('es') if kind == 'passes' else title[:-1]} {name}\n")
    screen.prose(text)
    screen.line()
    if kind == "passes":
        fields = _fields(screen, cls, name)
        screen.prose(
            f"Looks at {' and '.join(cls.kinds)} prompts; an option that another pass has too is --{name}.OPTION"
        )
        return {"text": text, "fields": fields, "kinds": list(cls.kinds)}
    if kind != "compress":
        return {"text": text}
    from ..compress.base import Method

    fields = _fields(screen, cls, name)
    if not issubclass(cls, Method):
        screen.line("\nGoes before a method, and leaves what the model computes as it is")
        return {"text": text, "fields": fields}
    needs = cls().needs  # with its defaults; a method's settings may take some away
    screen.line(f"\nNeeds {', '.join(needs) or 'no statistics'}; writes format {cls.format}")
    return {"text": text, "fields": fields, "needs": needs, "format": cls.format}


def _fields(screen: Any, cls: Any, name: str) -> dict[str, Any]:
    """Shows what a method or pass can be told."""
    rows, fields = [], {}
    for field, info in cls.model_fields.items():
        kind = cls.model_json_schema()["properties"][field]
        bounds = _bounds(kind)
        rows.append([f"--{field.replace('_', '-')}", str(info.default), bounds])
        fields[field] = {"default": info.default, "allowed": bounds, "help": info.description}
    if not fields:
        screen.line(f"{name} has no settings")
        return fields
    screen.table("", ["option", "default", "allowed"], rows)
    screen.line()
    for field, info in fields.items():
        screen.prose(f"{field}: {info['help']}")
    return fields


def _bounds(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in a few words."""
    if "anyOf" in schema:
        return " or ".join(_bounds(option) for option in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{low} to {high}"
    if low is not None:
        return f"{low} or more"
    return "none" if schema.get("type") == "null" else str(schema.get("type", "any"))
