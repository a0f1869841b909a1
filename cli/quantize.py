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
    bits: Annotated[int, typer.Option(help="bits per code, 2 to 8")] = 3,
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
    from ..compress.recipe import Recipe, configure
    from ..registry import listing
    from .base import check_device, check_dtype
    from .packing import calibration, open_dense, pack
    from .ui import Screen

    if method in listing("compress", "Rewrite"):
        raise ValueError(f"--method {method}: it packs nothing, but can go before a method: --{method}")
    settings = context.obj | {"bits": bits}
    chosen = configure(method, settings)
    refine = chosen.refine if refine is None else refine
    needs = bool(chosen.needs or refine)
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
    pack(
        Screen(as_json),
        recipe,
        source,
        out or default_name(source, method, bits),
        batch=batch,
        device=device,
        spill=spill,
        resume=resume,
        overwrite=overwrite,
    )


def rotation(which: str | None, seed: int) -> list[dict[str, Any]]:
    """The step that `--rotate` means."""
    if which is None:
        return []
    if which not in ("heads", "residual", "all"):
        raise ValueError(f"--rotate {which}: expected heads, residual or all")
    return [{"method": "rotate", "residual": which != "heads", "heads": which != "residual", "seed": seed}]


def default_name(source: Any, method: str, bits: int) -> Path:
    """`Qwen/Qwen3-0.6B` -> `Qwen3-0.6B-acc-SpQR-Int3`."""
    from ..registry import lookup
    from .packing import plain_name

    return Path(f"{plain_name(source)}-acc-{lookup('compress', method).__name__}-Int{bits}")
