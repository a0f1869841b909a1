"""acc apply: a recipe over one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .base import MODEL_HELP, Device, Json, Spill

if TYPE_CHECKING:
    from ..compress.recipe import Recipe
    from .ui import Screen


def apply(
    recipe: Annotated[str | None, typer.Argument(help="a .yaml file, or the name of one that comes with acc")] = None,
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    out: Annotated[Path | None, typer.Argument(help="folder to write; default: MODEL-acc-RECIPE")] = None,
    changes: Annotated[list[str], typer.Option("--set", help="path=value, e.g. steps.0.bits=4; may be repeated")] = [],  # noqa: B006
    data: Annotated[str | None, typer.Option(help="calibration text instead of the recipe's")] = None,
    nsamples: Annotated[int | None, typer.Option(min=1, help="sequences of text")] = None,
    seqlen: Annotated[int | None, typer.Option(min=2, help="tokens per sequence")] = None,
    dtype: Annotated[str | None, typer.Option(help="type that blocks are run in: auto, float32, ...")] = None,
    device: Device = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="tokens that go through a block at once")] = 4096,
    spill: Spill = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that acc made")] = False,
    as_json: Json = False,
) -> None:
    """Compress a model as a YAML recipe says; alone, list the recipes.

    The recipe.yaml that lies beside every compressed model is one: it makes the same weights again.
    """
    from .ui import Screen

    screen = Screen(as_json)
    if recipe is None:
        show_recipes(screen)
        return
    from .base import check_device, check_dtype
    from .packing import open_dense, pack, plain_name, resolved

    chosen = read_recipe(recipe, [*changes, *([f"dtype={dtype}"] if dtype else [])])
    if model is None:
        raise ValueError(f"which model? acc apply {recipe} MODEL")
    check_device(device)
    check_dtype(chosen.dtype)
    source = open_dense(model)
    pack(
        screen,
        resolved(chosen, source, data, nsamples, seqlen),
        source,
        out or Path(f"{plain_name(source)}-acc-{Path(recipe).stem}"),
        batch=batch,
        device=device,
        spill=spill,
        resume=resume,
        overwrite=overwrite,
    )


def show_recipes(screen: Screen) -> None:
    """Lists the recipes that come with acc, each with what it is for."""
    from ..registry import recipes

    found = recipes()
    screen.line("Recipes")
    for name, line in found.items():
        screen.line(f"  {name}")
        screen.field("", line)
    screen.next("acc apply RECIPE MODEL, or acc show RECIPE")
    screen.result({"recipes": found})


def read_recipe(name: str, changes: list[str]) -> Recipe:
    """The recipe in a file, or the one of that name that comes with acc.

    Raises ValueError with the nearest names when there is neither, and for whatever is no recipe."""
    import difflib

    from ..compress.recipe import Recipe
    from ..registry import RECIPES, recipes

    path, known = Path(name).expanduser(), recipes()
    if not path.is_file():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise ValueError(f"there is no file {name}, and no recipe of that name; there is {', '.join(near)}")
        path = RECIPES / f"{name}.yaml"
    return Recipe.read(path, changes)
