"""acc bench: how fast a model writes, dense and packed, and in how much memory."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .base import Dtype, Json, Model, Seed

if TYPE_CHECKING:
    from torch import Tensor

WAYS = "compiled,cache,reference"
PARITY = 4, 1e-4  # roundings of the type, or this: ways that differ in nothing but where they round stay below a third


def bench(
    model: Model,
    packed: Annotated[list[str] | None, typer.Argument(help="folders that acc wrote", show_default=False)] = None,
    kernels: Annotated[
        str | None, typer.Option(help=f"of ACC_KERNELS, for what is packed; default: what it has of {WAYS}")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens written per repeat")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="tokens read before")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="rounds in which every row has its turn")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: its own choice")] = None,
    nf4: Annotated[bool, typer.Option("--nf4", help="add MODEL with bitsandbytes' NF4 weights")] = False,
    shapes: Annotated[bool, typer.Option("--shapes", help="time each shape of packed matrix instead")] = False,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure greedy decoding at batch 1 on the CPU, dense against packed.

    All models are in memory at once and take turns, so that whatever else the machine does falls on all of them.
    Speed is the median over the steps of all turns. A way of running a packed model must give the same products as the
    torch definition, within rounding, before its speed is shown; else the exit code is 3. The text is random tokens.
    """
    import torch

    from ..formats.source import open_source
    from ..kernels.base import WAYS as known
    from .base import check_dtype
    from .ui import Missed, Screen, shorten

    screen = Screen(as_json)
    ways = [way.strip() for way in (kernels or WAYS).split(",")]
    unknown = [way for way in ways if way not in known]
    if unknown:
        raise ValueError(f"--kernels {unknown[0]}: expected some of {','.join(known)}")
    if threads is not None:
        torch.set_num_threads(threads)
    sources = {spec: open_source(spec) for spec in [model, *(packed or [])]}
    dense = [spec for spec, source in sources.items() if not source.quantized and spec != model]
    if dense:
        raise ValueError(f"{dense[0]} is not packed; MODEL is the dense one, the others are folders that acc wrote")
    if nf4 and sources[model].quantized:
        raise ValueError(f"--nf4: {model} is packed already")
    kind = check_dtype(dtype) or sources[model].dtype
    loaded = {spec: _load(source.folder, kind) for spec, source in sources.items()}
    rows = [row for spec in sources for row in _rows(spec, loaded[spec], sources[spec].quantized, ways)]
    if nf4:
        rows.insert(1, Row(model, _nf4(_load(sources[model].folder, kind), kind), None, name="nf4"))
    ids = _prompt(sources[model], prompt_tokens, seed)
    with torch.no_grad(), _environment():
        missing = {row: reason for row in rows if (reason := _reason_against(row)) is not None}
        if kernels is not None and missing:
            raise ValueError(next(iter(missing.values())))
        rows = [row for row in rows if row not in missing]
        if shapes:
            result = {"shapes": _time_shapes([row for row in rows if row.way], repeats)}
        else:
            _compare(rows, ids)
            _decode(rows, ids, new_tokens, repeats, screen)
            result = {"rows": [row.record(rows[0]) for row in rows]}
    result |= {"model": model, "dtype": str(kind).removeprefix("torch."), "prompt_tokens": prompt_tokens}
    result |= {"new_tokens": new_tokens, "repeats": repeats, "machine": _machine()}
    result["left_out"] = [{"model": row.spec, "kernels": row.way, "reason": why} for row, why in missing.items()]
    (_show_shapes if shapes else _show)(screen, result)
    for row, why in missing.items():
        screen.field("Left out", f"{shorten(row.spec, 22)} {row.way}: {why}")
    screen.result(result)
    wrong = [row for row in rows if not row.right]
    if wrong:
        named = ", ".join(f"{row.spec} ({row.way})" for row in wrong)
        raise Missed(f"{named}: products differ from the torch definition's by more than {wrong[0].bound:.2g} of them")
    screen.next(f'acc generate {(packed or [model])[-1]} "Once upon a time"')


@dataclass(eq=False)
class Row:
    """One model run in one way; `way` is None for a dense model."""

    spec: str
    model: Any
    way: str | None
    name: str = "dense"  # of a row without a way
    error: float = 0.0  # largest of a packed layer's outputs, in the norm, relative to the torch definition's
    prefill: list[float] = field(default_factory=list)  # seconds, per turn
    steps: list[list[float]] = field(default_factory=list)  # seconds per token, per turn
    first: float = 0.0  # seconds that the first use took: compiling, decoding what is kept
    bytes: int = 0
    kept: int = 0

    def use(self) -> None:
        from ..formats.hf import choose_kernels

        if self.way is not None:
            os.environ["ACC_KERNELS"] = self.way
            choose_kernels(self.model)

    @property
    def bound(self) -> float:
        import torch

        roundings, least = PARITY
        return max(roundings * torch.finfo(self.model.dtype).eps, least)

    @property
    def right(self) -> bool:
        return self.error <= self.bound

    def record(self, base: Row) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.spec, "kernels": self.way or self.name}
        found |= {"bytes": self.bytes, "bytes_kept": self.kept}
        if self.way is not None:
            found["error"] = self.error
        if not self.steps or not self.right:
            return found
        ratios = [statistics.median(b) / statistics.median(s) for b, s in zip(base.steps, self.steps)]
        every = [step for turn in self.steps for step in turn]
        return found | {
            "tokens_per_second": 1 / statistics.median(every),
            "tokens_per_second_best": 1 / min(every),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "prefill_seconds": min(self.prefill),
            "first_use_seconds": self.first,
        }


def _load(folder: Any, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _nf4(model: Any, dtype: Any) -> Any:
    """The model with every linear layer but the output head in bitsandbytes' NF4, in blocks of 64 as is its default.

    What is not a linear layer, fused experts among it, stays dense, as bitsandbytes leaves it.
    """
    import bitsandbytes.nn
    from torch import nn

    kinds: Any = bitsandbytes.nn

    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is model.get_output_embeddings():
            continue
        bias = module.bias is not None
        packed = kinds.Linear4bit(module.in_features, module.out_features, bias, compute_dtype=dtype, quant_type="nf4")
        packed.weight = kinds.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        packed.bias = module.bias
        packed = packed.to("cpu")  # this quantises
        model.set_submodule(path, packed)
        state: Any = packed.weight.quant_state
        packed.register_buffer("absmax", state.absmax, persistent=False)  # so that its bytes are counted
    return model


def _rows(spec: str, model: Any, quantized: bool, ways: list[str]) -> list[Row]:
    return [Row(spec, model, way) for way in ways] if quantized else [Row(spec, model, None)]


def _reason_against(row: Row) -> str | None:
    """Why the model cannot be run in this way; None where it can."""
    import torch

    from ..formats.hf import packed_weights

    if row.way is None:
        return None
    row.use()
    try:
        for weight in {type(weight): weight for weight in packed_weights(row.model)}.values():
            weight.matmul(torch.zeros(1, weight.shape[1], dtype=row.model.dtype))
    except ValueError as error:
        return str(error)
    return None


def _prompt(source: Any, tokens: int, seed: int) -> Tensor:
    import torch

    from .base import text_limits

    size = text_limits(source)["vocab_size"]
    return torch.randint(size, (1, tokens), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """`ACC_KERNELS` is as it was afterwards."""
    before = os.environ.get("ACC_KERNELS")
    try:
        yield
    finally:
        os.environ.pop("ACC_KERNELS", None)
        if before is not None:
            os.environ["ACC_KERNELS"] = before


def _compare(rows: list[Row], ids: Tensor) -> None:
    """Fills in how far each way's products are from the torch definition's: many tokens at once, and one alone.

    Every packed layer is given what it was given under the definition, so that errors are those of a product. Logits
    would tell less: one bit of a bfloat16 may send a token to another expert, or its attention to another token, and
    moves its logits by more than a wrong product does.
    """
    expected: dict[str, list[Tensor]] = {}
    for row in rows:
        if row.way in (None, "reference"):
            continue
        if row.spec not in expected:
            Row(row.spec, row.model, "reference").use()
            expected[row.spec] = _read(row.model, ids, [])
        row.use()
        errors = [_error(y, right) for y, right in zip(_read(row.model, ids, expected[row.spec]), expected[row.spec])]
        row.error = max(errors, default=0.0)


def _read(model: Any, ids: Tensor, known: list[Tensor]) -> list[Tensor]:
    """What each packed layer gives when all tokens but the last are read at once, then that one.

    Where it is `known` what should have been given, the model goes on with that.
    """
    from ..formats.hf import PackedExperts, PackedLinear

    found: list[Tensor] = []

    def keep(layer: Any, given: Any, y: Tensor) -> Tensor | None:
        found.append(y.clone())
        return known[len(found) - 1].clone() if known else None

    layers = [module for module in model.modules() if isinstance(module, PackedLinear | PackedExperts)]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        many = model(ids[:, :-1], use_cache=True, logits_to_keep=1)
        model(ids[:, -1:], past_key_values=many.past_key_values, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _error(y: Tensor, right: Tensor) -> float:
    """Of `y`, relative to what is `right`; infinite where it is no number."""
    size = right.double().norm().clamp(min=1e-30)
    return float(((y.double() - right.double()).norm() / size).nan_to_num(nan=math.inf))


def _decode(rows: list[Row], ids: Tensor, new_tokens: int, repeats: int, screen: Any) -> None:
    """Every row has a turn in each round: one prompt, then one token after the other."""
    from ..formats.hf import resident
    from .ui import Meter

    right = [row for row in rows if row.right]
    with Meter(screen) as meter:
        for turn in range(repeats):
            for index, row in enumerate(right):
                meter((turn * len(right) + index) / (repeats * len(right)), row.way or row.name)
                row.use()
                first, _ = _turn(row.model, ids, 2)  # not counted: caches fill, threads wake up
                # the torch definition is ten times slower and its steps vary little
                steps = max(2, new_tokens // 8) if row.way == "reference" else new_tokens
                prefill, taken = _turn(row.model, ids, steps)
                row.first = max(row.first, first - prefill)
                row.prefill.append(prefill)
                row.steps.append(taken)
                row.bytes, row.kept = resident(row.model)


def _turn(model: Any, ids: Tensor, steps: int) -> tuple[float, list[float]]:
    """Seconds of the prompt, and of each token after it."""
    started = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    prefill, taken = time.perf_counter() - started, []
    for _ in range(steps):
        started = time.perf_counter()
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        taken.append(time.perf_counter() - started)
    return prefill, taken


def _time_shapes(rows: list[Row], repeats: int) -> list[dict[str, Any]]:
    """Microseconds per product with one token, by shape: a dense copy of the same matrices and each way in turn.

    All matrices of a shape are gone through, as a model does, so that they come from where they would come from.
    """
    import torch
    import torch.nn.functional as F

    from ..formats.hf import packed_weights

    found = []
    for spec in dict.fromkeys(row.spec for row in rows):
        ways = [row for row in rows if row.spec == spec]
        ways[0].use()
        every = packed_weights(ways[0].model)
        for shape in dict.fromkeys(weight.shape for weight in every):
            own = [weight for weight in every if weight.shape == shape]
            x = torch.randn(1, shape[1], dtype=ways[0].model.dtype)
            dense = [weight.dequantize(x.dtype) for weight in own]
            turns: dict[str, Callable[[], Any]] = {"dense": lambda x=x, d=dense: [F.linear(x, w) for w in d]}
            for row in ways:
                row.use()
                same = [weight for weight in packed_weights(row.model) if weight.shape == shape]
                turns[str(row.way)] = lambda x=x, s=same: [weight.matmul(x) for weight in s]
                turns[str(row.way)]()
            best = dict.fromkeys(turns, float("inf"))
            for _ in range(3 * repeats):
                for name, turn in turns.items():
                    started = time.perf_counter()
                    turn()
                    best[name] = min(best[name], (time.perf_counter() - started) / len(own) * 1e6)
            found.append({"model": spec, "shape": list(shape), "matrices": len(own), "microseconds": best})
    return found


def _machine() -> dict[str, Any]:
    """What speeds depend on; the copy counts bytes read and bytes written."""
    import torch
    import transformers

    a = torch.ones(1 << 25)
    b, seconds = torch.empty_like(a), float("inf")
    for _ in range(6):
        started = time.perf_counter()
        b.copy_(a)
        seconds = min(seconds, time.perf_counter() - started)
    return {
        "copy_gb_per_second": 2 * a.numel() * a.element_size() / seconds / 1e9,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _show(screen: Any, result: dict[str, Any]) -> None:
    from .ui import shorten, size

    lines = []
    for row in result["rows"]:
        name = [shorten(row["model"], 22), row["kernels"]]
        memory = size(row["bytes"] + row["bytes_kept"])
        if "ratio" not in row:
            lines.append([*name, "", "", "", "", f"wrong by {row['error']:.2g}"])
            continue
        speed, ratio = f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}"
        prefill = f"{1000 * row['prefill_seconds']:.0f} ms"
        lines.append([*name, speed, ratio, prefill, memory, "" if "error" not in row else "ok"])
    screen.table("", ["model", "kernels", "tok/s", "ratio", "prefill", "memory", "parity"], lines)
    machine = result["machine"]
    screen.line()
    screen.field("Ratio", "to the first row, median over the rounds, in which all rows take turns")
    screen.field("Memory", "bytes of parameters, buffers and what kernels keep; at the first use more may be taken")
    screen.field("Machine", f"{machine['threads']} threads, copies {machine['copy_gb_per_second']:.1f} GB/s")


def _show_shapes(screen: Any, result: dict[str, Any]) -> None:
    from .ui import shorten

    for spec in dict.fromkeys(item["model"] for item in result["shapes"]):
        items = [item for item in result["shapes"] if item["model"] == spec]
        ways = list(items[0]["microseconds"])
        lines = []
        for item in items:
            taken = item["microseconds"]
            shape = "{} x {}".format(*item["shape"])
            lines.append([shape, item["matrices"], *(f"{taken[way]:.1f}" for way in ways)])
        screen.table(f"{shorten(spec, 40)}: microseconds, one token", ["matrix", "how many", *ways], lines)
