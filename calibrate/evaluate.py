"""How well a model predicts a text, and how far it strays from its base; and a fingerprint of what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .stream import Stream

BF16_TOLERANCE = 0.03  # of `same_fingerprint`, when one of the two sides computed in bf16
Progress = Callable[[str, int], None]  # ("model" | "base", blocks done) or ("windows", windows scored)


class Streamed(Protocol):
    """What is asked of a model: to stream over batches, then to give the logits `[B, T, V]` of each in turn."""

    def blocks(self, batches: Sequence[Tensor]) -> Iterable[Any]: ...

    def logits(self) -> Iterable[Tensor]: ...


def windows(ids: Tensor, window: int, count: int | None = None) -> Tensor:
    """The first `count` (default: all) windows of a text, `ids [tokens]` -> `[N, window]`, one after the other.

    A last partial window is left out; `unscored` says so. Raises ValueError for a text shorter than one window.
    """
    if window < 2 or (count is not None and count < 1):
        raise ValueError(f"--window {window} --windows {count}: a window needs 2 tokens or more, and there must be one")
    if ids.numel() < window:
        remedy = f"use --window {ids.numel()} or less" if ids.numel() >= 2 else "evaluate on a longer text"
        raise ValueError(f"the text has {ids.numel()} tokens, fewer than one window of {window}; {remedy}")
    whole = ids.numel() // window
    used = whole if count is None else min(count, whole)
    return ids.flatten()[: used * window].view(used, window)


def unscored(ids: Tensor, cut: Tensor, count: int | None = None) -> str:
    """In words: what the windows `cut [N, window]` use of the text `ids`, and whether that is less than asked for."""
    used, window = cut.shape
    said = f"{used} windows of {window} tokens"
    if count is not None and used < count:
        said += f" ({count} asked for)"
    rest = ids.numel() - cut.numel()
    return said + (f"; the last {rest} tokens of the text are not scored" if rest else "")


def evaluate(
    stream: Streamed, base_stream: Streamed | None, windows: Tensor, progress: Progress | None = None
) -> dict[str, Any]:
    """Scores of a model over `windows [N, window]`, and against its base where there is one: see `Scores.result`."""
    return evaluate_all([stream], base_stream, windows, progress)[0]


def evaluate_all(
    streams: Sequence[Streamed], base_stream: Streamed | None, windows: Tensor, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """The same for several models of one base, which runs once for all of them."""
    tell = progress or (lambda stage, done: None)
    batches = list(windows.split(1))
    for stage, one in [*(("model", stream) for stream in streams), ("base", base_stream)]:
        if one is not None:
            for done, _ in enumerate(one.blocks(batches), 1):
                tell(stage, done)
    scores = [Scores() for _ in streams]
    of_base = [None] * len(batches) if base_stream is None else base_stream.logits()
    of_models = zip(*(stream.logits() for stream in streams), strict=True)
    for ids, base, logits in zip(batches, of_base, of_models, strict=True):
        for score, own in zip(scores, logits):
            score.add(ids[0], own[0], None if base is None else base[0])
        tell("windows", len(scores[0].nll))
    return [score.result() for score in scores]


class Scores:
    """Means over the predicted tokens of each window: all but the first, which nothing precedes.

    Logarithms are taken in fp32, over a few positions at a time so that no second copy of the logits arises (and what
    does arise stays in the cache: measured 1.7 times as fast as pieces of 2**22), and summed over positions in fp64.
    A logit that is not finite is an error.
    """

    def __init__(self, chunk_elements: int = 2**17):
        self.chunk_elements = chunk_elements
        self.window = 0
        self.nll: list[float] = []
        self.nll_base: list[float] = []
        self.kl: list[float] = []
        self.top1: list[float] = []

    @torch.no_grad()
    def add(self, ids: Tensor, logits: Tensor, base: Tensor | None = None) -> None:
        """One window: `ids [T]`, `logits [T, V]` and those of the base. Every window has the same length."""
        number = len(self.nll) + 1
        if base is not None and base.shape != logits.shape:
            raise ValueError(f"the model has a vocabulary of {logits.shape[-1]}, its base one of {base.shape[-1]}")
        assert self.window in (0, len(ids))
        self.window = len(ids)
        predicted = len(ids) - 1
        sums = torch.zeros(4, dtype=torch.float64)
        size = max(1, self.chunk_elements // logits.shape[-1])
        for start in range(0, predicted, size):
            here = slice(start, min(start + size, predicted))
            targets = ids[start + 1 : here.stop + 1].to(logits.device)
            sums += _chunk_sums(targets, logits[here], None if base is None else base[here], number).cpu()
        nll, nll_base, kl, top1 = (sums / predicted).tolist()
        self.nll.append(nll)
        if base is not None:
            self.nll_base.append(nll_base)
            self.kl.append(kl)
            self.top1.append(top1)

    def result(self) -> dict[str, Any]:
        """JSON-simple, in nats; every `<key>_stderr` is the standard error over windows, None for a single one.

        `tokens` counts predictions. With a base: `kl` is KL(base || model), `top1` the share of positions where both
        give the same token the highest logit, `ppl_ratio` the perplexity over the base's, with the error of the pairs.
        """
        nll, nll_error = _mean(self.nll)
        perplexity = _exp(nll)
        found = {
            "perplexity": perplexity,
            "perplexity_stderr": None if nll_error is None else perplexity * nll_error,
            "nll": nll,
            "nll_stderr": nll_error,
            "windows": len(self.nll),
            "window": self.window,
            "tokens": len(self.nll) * (self.window - 1),
        }
        if not self.kl:
            return found
        nll_base, base_error = _mean(self.nll_base)
        excess, excess_error = _mean([own - base for own, base in zip(self.nll, self.nll_base, strict=True)])
        kl, kl_error = _mean(self.kl)
        top1, top1_error = _mean(self.top1)
        ratio, perplexity_base = _exp(excess), _exp(nll_base)
        return found | {
            "kl": max(kl, 0.0),  # rounding may leave -1e-9
            "kl_stderr": kl_error,
            "top1": top1,
            "top1_stderr": top1_error,
            "nll_base": nll_base,
            "nll_base_stderr": base_error,
            "perplexity_base": perplexity_base,
            "perplexity_base_stderr": None if base_error is None else perplexity_base * base_error,
            "ppl_ratio": ratio,
            "ppl_ratio_stderr": None if excess_error is None else ratio * excess_error,
        }


def _chunk_sums(targets: Tensor, logits: Tensor, base: Tensor | None, window: int) -> Tensor:
    """Sums over positions of nll, the base's nll, KL(base || model) and top-1 agreement; `[t]`, `[t, V]` -> `[4]`."""
    log_p = _log_softmax(logits, window, "model")
    nll = -log_p.gather(1, targets[:, None]).sum(dtype=torch.float64)
    if base is None:
        return torch.stack([nll, *nll.new_zeros(3)])
    log_b = _log_softmax(base, window, "base")
    nll_base = -log_b.gather(1, targets[:, None]).sum(dtype=torch.float64)
    agree = (logits.argmax(1) == base.argmax(1)).sum(dtype=torch.float64)
    kl = log_p.neg_().add_(log_b).mul_(log_b.exp_()).sum(1).sum(dtype=torch.float64)
    return torch.stack([nll, nll_base, kl, agree])


def _log_softmax(logits: Tensor, window: int, whose: str) -> Tensor:
    values = logits.float()
    if not torch.isfinite(torch.stack(values.aminmax())).all():  # both are NaN if one value is
        raise ValueError(f"window {window}: the {whose}'s logits are not finite; try another --dtype, or acc verify")
    return values.log_softmax(-1)


def _mean(values: list[float]) -> tuple[float, float | None]:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def fingerprint_ids(vocab_size: int, length: int = 16) -> Tensor:
    """Token ids `[1, length]` that depend on the vocabulary's size alone and spread over all of it."""
    return _spread(vocab_size, length)[None]


def fingerprint(logits: Tensor) -> dict[str, Any]:
    """What a model computes, in about 40 numbers, from its logits `[..., V]` on `fingerprint_ids`: the last position's.

    `top`: the eight highest logits as `[id, value]`; `probe`: those of 16 ids spread over the vocabulary; `spread`: the
    standard deviation of all. Values are relative to the mean logit, which softmax ignores, and have 6 digits.
    """
    last = logits.reshape(-1, logits.shape[-1])[-1].detach().double().cpu()
    if not torch.isfinite(last).all():
        raise ValueError("the model's logits are not finite")
    values = last - last.mean()
    top = values.topk(min(8, len(values)))
    return {
        "vocab_size": len(values),
        "spread": _round(values.square().mean().sqrt()),
        "top": [[int(i), _round(v)] for i, v in zip(top.indices, top.values)],
        "probe": [_round(v) for v in values[_spread(len(values), 16)]],
    }


def fingerprint_of(source: Any) -> dict[str, Any]:
    """The fingerprint of a model as its files have it, streamed in fp32: half precision alone moves it by percents."""
    stream = Stream(source, dtype=torch.float32)
    vocabulary = stream.skeleton.model.get_input_embeddings().num_embeddings
    for _ in stream.blocks([fingerprint_ids(vocabulary)]):
        pass
    return fingerprint(next(stream.logits())[0])


def same_fingerprint(expected: dict[str, Any], found: dict[str, Any], tolerance: float = 1e-3) -> str | None:
    """None when both come from the same model, else what differs, in words.

    Compared is the relative error, in the 2-norm, over every logit that is known of both; one that is among the highest
    of one side only counts with how far it has moved at least.

    The default leaves room for another machine when both sides computed in fp32, which is what to do: bf16 arithmetic
    alone moves the logits of SmolLM2-135M by 1.7% (BF16_TOLERANCE allows that), and so hides a lost group of weights
    (0.3-3%) or two exchanged experts (0.2%), though hardly a scale that is wrong by a factor of two (3-30%).
    """
    if expected["vocab_size"] != found["vocab_size"]:
        return f"the vocabulary has {found['vocab_size']} entries, {expected['vocab_size']} were recorded"
    pairs = list(zip(expected["probe"], found["probe"]))
    mine, yours = (dict(map(tuple, side["top"])) for side in (expected, found))
    for token in mine.keys() | yours.keys():
        low_mine, low_yours = min(mine.values()), min(yours.values())
        if token in mine and token in yours:
            pairs.append((mine[token], yours[token]))
        elif token in mine:
            pairs.append((mine[token], min(mine[token], low_yours)))
        else:
            pairs.append((min(yours[token], low_mine), yours[token]))
    size = math.hypot(*(a for a, _ in pairs))
    error = math.hypot(*(a - b for a, b in pairs))
    if error <= tolerance * size:
        return None
    percent = 100 * error / max(size, 1e-30)
    return f"the logits differ from those recorded by {percent:.2g}% (tolerance {100 * tolerance:.2g}%)"


def _spread(vocab_size: int, length: int) -> Tensor:
    """`length` ids, neighbours about 0.38 of the vocabulary apart: multiples of the golden section, modulo 1."""
    return torch.tensor([int((k * 0.6180339887498949 + 0.5) % 1.0 * vocab_size) for k in range(length)])


def _round(value: Tensor) -> float:
    return float(f"{float(value):.6g}")
