"""acc eval: how well a model predicts a text, and how far it is from its base."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from .base import Adaptive, Device, Dtype, Json, Model, Plan, Planes, Seed, Sparsity, Spill, Use


def eval(
    model: Model,
    data: Annotated[str, typer.Option(help="text: file, folder, .jsonl, hf:NAME, or self", show_default=False)],
    base: Annotated[str | None, typer.Option(help="the dense model to compare with")] = None,
    window: Annotated[int, typer.Option(min=2, help="tokens per window")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="how many windows; default: the whole text")] = None,
    max_kl: Annotated[float | None, typer.Option(help="exit code 3 when the divergence is larger")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="exit code 3 when the ratio is larger")] = None,
    plan: Plan = None,
    sparsity: Sparsity = None,
    use: Use = None,
    adaptive: Adaptive = False,
    passkeys: Annotated[
        int | None, typer.Option(min=1, help="ask for so many passkeys in --data instead of measuring perplexity")
    ] = None,
    seqlen: Annotated[int, typer.Option(min=64, help="tokens of a prompt with passkeys")] = 2048,
    planes: Planes = None,
    seed: Seed = 1,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    spill: Spill = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, and divergence from a base model.

    The text is tokenised once and cut into windows that do not overlap; every token but the first of a window is
    predicted. Models are streamed: one block at a time is in memory. `--data self` draws the text from the base. With
    --plan the model, not its base, attends as in prefill.

    With --passkeys the model is loaded whole, reads prompts that state some in the text, and has to write them
    greedily when it is asked; --plan then holds for prefill, decoding and the cache.
    """
    from ..calibrate.evaluate import evaluate, unscored
    from ..calibrate.evaluate import windows as cut
    from ..calibrate.stream import Stream
    from ..formats.source import open_source
    from .base import bits_of, check_device, check_dtype, plan_of, show_dtype
    from .ui import Meter, Missed, Screen

    screen = Screen(as_json)
    if passkeys is not None and base is not None:
        raise ValueError("--passkeys asks one model: leave --base out, and run the base by itself")
    if base is None and (max_kl is not None or max_ppl_ratio is not None):
        raise ValueError("--max-kl and --max-ppl-ratio compare with a base: name it with --base")
    check_device(device)
    kind = check_dtype(dtype)
    source = open_source(model)
    if planes is not None:
        source.read_planes(planes)
    wanted = plan_of(screen, plan, sparsity, use, adaptive)
    if passkeys is not None:
        _ask(screen, source, data, passkeys, seqlen, wanted, kind, planes, device, seed)
        return
    other = open_source(base) if base is not None else None
    ids, record = _ids(data, other or source, window, windows, seed)
    batches = cut(ids, window, windows)
    screen.field("Text", f"{data}: {unscored(ids, batches, windows)}")
    screen.field("", record["bos"])
    show_dtype(screen, source, dtype, device)
    own = Stream(source, dtype=kind, device=device, spill=spill)
    of_base = Stream(other, dtype=kind, device=device, spill=spill) if other is not None else None
    with contextlib.ExitStack() as stack:
        if wanted is not None:
            from ..formats.attention import planned

            stack.enter_context(own.skeleton.replace_attention(planned(wanted, own.skeleton)))
        meter = stack.enter_context(Meter(screen))
        result = evaluate(own, of_base, batches, _Tracked(meter, [own, of_base], len(batches)))
    result |= {"stored": bits_of(source), "stored_base": bits_of(other) if other is not None else None, "text": record}
    missed = _missed(result, max_kl, max_ppl_ratio)
    _table(screen, model, base, result)
    screen.result(result | {"missed": missed})
    if missed:
        raise Missed("; ".join(missed))
    if source.quantized:
        screen.next(f'acc generate {model} "Once upon a time"')


def _ask(
    screen: Any,
    source: Any,
    data: str,
    count: int,
    seqlen: int,
    plan: Any,
    dtype: Any,
    planes: Any,
    device: str,
    seed: int,
) -> None:
    """`--passkeys`."""
    from ..calibrate.passkeys import passkeys, prompts_of
    from ..kernels.base import computed_in
    from .base import loaded_model, text_limits, tokenizer_of
    from .ui import Meter, size

    longest = text_limits(source)["max_length"]
    if longest is not None and seqlen > longest:
        raise ValueError(f"--seqlen {seqlen}: the model takes at most {longest} tokens")
    ids, record = _ids(data, source, seqlen, -(-count // 8), seed)
    prompts = prompts_of(tokenizer_of(source), ids, seqlen, count, domain=data, seed=seed)
    screen.field("Prompts", f"{len(prompts)} of {seqlen} tokens, {count} passkeys in all")
    model = loaded_model(source, dtype or computed_in(source.dtype, device), planes, device)
    caches: list[Any] = []

    def new_cache() -> Any:
        caches[:] = [PlanCache(model)]  # the last one is looked at
        return caches[0]

    asked: dict[str, Any] = {"model": model, "prompts": prompts}
    if plan is not None:
        from ..formats.attention import PlanCache, attach

        attach(model, plan)
        asked["new_cache"] = new_cache
    with Meter(screen) as meter:
        result = passkeys(**asked, progress=meter)
    error = "" if result["accuracy_stderr"] is None else f" ±{100 * result['accuracy_stderr']:.1f}"
    screen.line(f"\n{100 * result['accuracy']:.1f}%{error} of {count} passkeys at {seqlen} tokens")
    if caches:
        held, dense = caches[0].nbytes, caches[0].dense_nbytes
        screen.line(f"{size(held)} of keys and values were kept; without a plan it would be {size(dense)}")
        result |= {"cache_bytes": held, "dense_cache_bytes": dense}
    screen.result(result | {"text": record})


def _ids(data: str, source: Any, window: int, windows: int | None, seed: int) -> tuple[Any, dict[str, Any]]:
    """The tokens of the text; with `self` as many as are needed, drawn from the model."""
    from ..calibrate.text import load_text, load_tokens
    from .base import sampler, text_limits, tokenizer_of

    tokenizer = tokenizer_of(source)
    limits = text_limits(source)
    if limits["max_length"] is not None and window > limits["max_length"]:
        raise ValueError(f"--window {window}: the model takes at most {limits['max_length']} tokens")
    if data == "self":
        text = load_text(
            data, tokenizer, nsamples=windows or 16, seqlen=window, seed=seed, generate=sampler(source), **limits
        )
        return text.batches.reshape(-1), text.record()
    stream = load_tokens(data, tokenizer, chat_template="auto", vocab_size=limits["vocab_size"])
    return stream.ids, stream.record()


class _Tracked:
    """Turns what `evaluate` reports into one fraction: blocks of both models, then windows."""

    def __init__(self, meter: Any, streams: list[Any], windows: int):
        self.meter = meter
        self.blocks = [len(s.skeleton.layers) if s is not None else 0 for s in streams]
        self.windows, self.done = windows, {"model": 0, "base": 0, "windows": 0}

    def __call__(self, stage: str, done: int) -> None:
        self.done[stage] = done
        blocks = sum(self.blocks)
        share = 0.8 * (self.done["model"] + self.done["base"]) / blocks + 0.2 * self.done["windows"] / self.windows
        self.meter(min(share, 1.0), stage)


def _missed(result: dict[str, Any], max_kl: float | None, max_ppl_ratio: float | None) -> list[str]:
    missed = []
    if max_kl is not None and result["kl"] > max_kl:
        missed.append(f"KL divergence {result['kl']:.4f} is above --max-kl {max_kl}")
    if max_ppl_ratio is not None and result["ppl_ratio"] > max_ppl_ratio:
        missed.append(f"perplexity ratio {result['ppl_ratio']:.4f} is above --max-ppl-ratio {max_ppl_ratio}")
    return missed


def _table(screen: Any, model: str, base: str | None, result: dict[str, Any]) -> None:
    from .ui import shorten, size

    def row(name: str, stored: dict[str, float], own: str) -> list[str]:
        bits = f"{stored['packed_bits']:.3f}" if stored["packed_parameters"] else f"{stored['bits']:.2f}"
        error = result.get(f"{own}_stderr")
        figure = f"{result[own]:.3f}" + (f" ±{error:.2f}" if error is not None else "")
        return [shorten(name, 28), size(stored["bytes"]), bits, figure]

    columns = ["model", "bytes", "stored bits", "perplexity"]
    rows = [row(model, result["stored"], "perplexity")]
    if base is not None:
        columns += ["KL", "top-1"]
        rows = [
            [*row(base, result["stored_base"], "perplexity_base"), "", ""],
            [*rows[0], f"{result['kl']:.4f}", f"{100 * result['top1']:.1f}%"],
        ]
    screen.line()
    screen.table("", columns, rows)
    if base is not None:
        excess = result["nll"] - result["nll_base"]
        screen.line(f"\nPerplexity {result['ppl_ratio']:.4f} times the base's ({excess:+.4f} nats per token)")
