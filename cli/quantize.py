"""acc quantize: one method over one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .base import Device, Dtype, Json, MethodCommand, Model, Seed, Spill

COMMAND = MethodCommand  # the chosen method's own fields are options too


def quantize(
    context: typer.Context,
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="folder to write; default: MODEL-acc-METHOD-IntBITS")] = None,
    bits: Annotated[float | None, typer.Option(help="bits per code; 2.7: stored bits per weight, mixed")] = None,
    fit: Annotated[str | None, typer.Option(help="mix bits so that the whole takes at most this, e.g. 6GiB")] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="mix bits so that it loses at most so many nats per token")
    ] = None,
    sensitivity: Annotated[str, typer.Option(help="what a mix is chosen by: kl of the logits, or output")] = "kl",
    measured: Annotated[
        Path | None, typer.Option(help="a folder of acc quantize whose budget.json says what settings lose")
    ] = None,
    per_expert: Annotated[bool, typer.Option("--per-expert", help="a mix may treat a layer's experts apart")] = False,
    method: Annotated[str, typer.Option(help="see acc show")] = "spqr",
    data: Annotated[str | None, typer.Option(help="calibration text: file, folder, .jsonl, hf:NAME, or self")] = None,
    nsamples: Annotated[int | None, typer.Option(min=1, help="sequences of text; default 128, of self 64")] = None,
    seqlen: Annotated[int | None, typer.Option(min=2, help="tokens per sequence; default 2048, of self 512")] = None,
    targets: Annotated[list[str], typer.Option(help="what to compress: a glob, or re:REGEX; may be repeated")] = ["*"],  # noqa: B006
    ignore: Annotated[list[str], typer.Option(help="what to leave as it is: a glob, or re:REGEX")] = [],  # noqa: B006
    refine: Annotated[
        int | None, typer.Option(min=0, help="steps of learned rounding; default: 16 or 0, by method")
    ] = None,
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
    from ..compress.recipe import Recipe, configure
    from ..formats.store import Store
    from ..registry import listing
    from .base import check_device, check_dtype, show_text
    from .packing import calibration, calibration_text, open_dense, pack
    from .spending import FILE, Budget, recall, recall_begun, spend
    from .ui import Screen

    if method in listing("compress", "Rewrite"):
        raise ValueError(f"--method {method}: it packs nothing, but can go before a method: --{method}")
    budget = Budget.of(bits, fit, max_kl)
    if max_kl is not None and sensitivity != "kl":
        raise ValueError("--max-kl is of the logits: it goes with --sensitivity kl")
    if measured is not None and not budget.mixed:
        raise ValueError("--measured is of a mix: give --max-kl, --fit or --bits as in 2.7 with it")
    bits = float(_bits(method)) if bits is None else bits
    if sensitivity not in ("kl", "output"):
        raise ValueError(f"--sensitivity {sensitivity}: expected kl or output")
    settings = context.obj | {"bits": min(max(round(bits), 2), 8) if budget.mixed else int(bits)}
    chosen = configure(method, settings)
    refine = chosen.refine if refine is None else refine
    needs = bool(chosen.needs or refine or budget.mixed)
    check_device(device)
    check_dtype(dtype)
    source = open_dense(model)
    recipe = Recipe.from_dict(
        {
            "dtype": dtype,
            "calibration": calibration(source, data, nsamples, seqlen, needs) | {"seed": seed},
            "refine": refine,
            "steps": [
                *rotation(rotate, seed),
                {"method": method, **settings, "targets": targets, "ignore": ignore},
            ],
        }
    )
    name = fit or (f"{bits:g}" if max_kl is None else f"KL{max_kl:g}")
    screen, folder = Screen(as_json), out or default_name(source, method, name)
    text, papers = None, {}
    if budget.mixed:
        Store.check(folder, resume=resume, overwrite=overwrite)  # before minutes of measuring
        if measured is not None:
            mix = recall(measured, source, recipe, budget)
        else:
            text = calibration_text(recipe, source)
            show_text(screen, text)
            mix = recall_begun(folder, source, recipe, budget) if resume else None
            how = {"scaled": sensitivity == "kl", "per_expert": per_expert, "device": device}
            mix = mix or spend(screen, source, recipe, text, budget=budget, **how)
        mix.show(screen)
        recipe, papers = mix.of(recipe), {FILE: mix.record()}
    pack(
        screen,
        recipe,
        source,
        folder,
        batch=batch,
        device=device,
        spill=spill,
        resume=resume,
        overwrite=overwrite,
        text=text,
        papers=papers,
    )


def _bits(method: str) -> int:
    """3, unless the method knows one width only."""
    from ..registry import lookup

    return lookup("compress", method).model_json_schema()["properties"]["bits"].get("const", 3)


def rotation(which: str | None, seed: int) -> list[dict[str, Any]]:
    """The step that `--rotate` means."""
    if which is None:
        return []
    if which not in ("heads", "residual", "all"):
        raise ValueError(f"--rotate {which}: expected heads, residual or all")
    return [{"method": "rotate", "residual": which != "heads", "heads": which != "residual", "seed": seed}]


def default_name(source: Any, method: str, size: str) -> Path:
    """`Qwen/Qwen3-0.6B` -> `Qwen3-0.6B-acc-SpQR-Int3`."""
    import re

    from ..registry import lookup
    from .packing import plain_name

    number = re.fullmatch(r"[\d.]+", size) is not None
    form = f"Int{size}" if size.isdecimal() else f"{size}bit" if number else size
    return Path(f"{plain_name(source)}-acc-{lookup('compress', method).__name__}-{form}")
