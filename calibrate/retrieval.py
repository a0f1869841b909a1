"""Retrieval heads: which KV heads need the whole context, and which only its first tokens and the latest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..formats.model import AttentionLayer
from ..formats.streaming import ranks, streams
from .attention import of_layers
from .base import Attended, Learned, Learner, Pass, Subject, causal_scores
from .gates import Gated, Schedule, Told, answer_rows, distance, hard, in_turn, optimise, projected
from .prompts import Prompt

SHARES = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)  # of streaming heads, at which the cost is measured
AIMS = (0.25, 0.5, 0.75, 0.875)  # shares that gates are optimised for besides the one that was asked for
OUTSIDE = 0.01  # of a streaming head's attention that its own sizes may cut off
GRAIN = 16  # tokens that sizes are multiples of
ROWS = 512  # of a text that are looked at
TILE = 2**25  # attention weights that are in memory at once
NEUTRAL = defaultdict(float, gate=1.0, rank=-1.0)  # in layers that are left alone
BACKWARD = 6  # runs of a prompt that one to learn from takes as long as, as measured on the demo model
SHARP = 0.5  # temperature of the gates that are stored: no two of them are rounded to the same number


class Retrieval(Pass):
    """Gives each KV head a gate, 1 when it retrieves and 0 when sinks and recent tokens are enough for it, and from
    the gates an order in which heads begin to stream.

    Few heads find again what was stated far back; the others lose next to nothing when all between the first tokens
    and the latest is dropped, and so is most of the cache. Which are which is learned with frozen weights: full and
    streaming attention are mixed by the gates, and the model is to answer passkeys as it did before. Xiao et al.,
    DuoAttention (arXiv 2410.10819), section 3; with gates in fp32, both attentions of the mixed stream itself, the
    answers' tokens alone in the loss, and the share of streaming heads as a constraint.
    Passkeys ask for copying: a head that is needed for other long-range work only is not found by them.
    """

    kinds: ClassVar[tuple[str, ...]] = ("text", "passkey")

    method: Literal["optimize", "score"] = Field("optimize", description="distillation, or forward scores alone")
    sparsity: float = Field(0.5, ge=0, le=1, description="share of the KV heads that stream")
    sink: int = Field(64, ge=1, description="first tokens that a streaming head keeps, at most")
    recent: int = Field(256, ge=16, description="latest tokens that a streaming head keeps, at most")
    steps: int = Field(24, ge=1, description="of the optimizer, a prompt each")
    learning_rate: float = Field(0.1, gt=0, description="of the optimizer, in units of the gates' logits")
    hard: float = Field(0.25, ge=0, lt=1, description="share of the steps, at the end, with gates of 0 and 1")
    held_out: float = Field(0.25, ge=0, lt=1, description="share of the passkey prompts that measure, not train")
    random: int = Field(1, ge=0, description="random choices of heads that are measured beside")
    keep_blocks: bool | None = Field(None, description="all blocks in memory at once; null: when they fit")

    def learner(self, layer: AttentionLayer) -> Evidence:
        return Evidence(layer, self.sink, self.recent)

    def conclude(self, subject: Subject, found: Mapping[int, dict[str, Tensor]]) -> Learned:
        evidence = weigh([found[layer.index] for layer in subject.open], self.sink, self.recent)
        score = evidence["score"]
        train, test, events = split(subject.prompts, self.sink, self.recent, self.held_out)
        if test:
            outcome = self._run(subject, evidence, train, test)
        else:
            outcome = Outcome(spread(score.flatten()), _of_largest(score.flatten()))
        gate, place = outcome.gate.reshape(score.shape), outcome.place.reshape(score.shape)
        rank = ranks(place, score, torch.ones(len(score)).bool())
        tensors = {
            name: of_layers(dict(zip((layer.index for layer in subject.open), t)), len(subject.layers), NEUTRAL[name])
            for name, t in (evidence | {"gate": gate, "rank": rank}).items()
        } | {f"pareto_{name}": t for name, t in outcome.curve.items()}
        floats = {name: t.float() for name, t in tensors.items() if t.is_floating_point()}
        return Learned(tensors | floats, self._summary(tensors, outcome), tuple(events))

    def _run(
        self, subject: Subject, evidence: Mapping[str, Tensor], train: Sequence[Prompt], test: Sequence[Prompt]
    ) -> Outcome:
        """Optimises the gates, if that was asked for, and measures them."""
        score, sink, recent = (evidence[name].flatten() for name in ("score", "sink", "recent"))
        model = Gated(subject, [*train, *test], sink, recent, self.keep_blocks)
        place, gate, losses = spread(score), _of_largest(score), []
        with model.loaded():
            progress = _Progress.of(subject, train, test, self._steps, self._choices)
            teachers = [progress.after(number, model.tell(number)) for number in range(len(model.prompts))]
            if self.method == "optimize":
                schedule = Schedule(self._aims(len(score)), self.steps, self.learning_rate, self.hard)
                place, losses = optimise(model, place, teachers[: len(train)], schedule, progress.learned)
                gate = projected(place, within(self.sparsity, 2 * len(score)), SHARP)
            curve = self._measure(Trial(model, teachers, range(len(train), len(teachers)), progress), place)
        return Outcome(place, gate, losses, curve)

    @property
    def _steps(self) -> int:
        return self.steps if self.method == "optimize" else 0

    @property
    def _shares(self) -> list[float]:
        """At which the cost is measured."""
        return sorted({*SHARES, self.sparsity})

    @property
    def _choices(self) -> int:
        """How many choices of heads are measured."""
        return 1 + (len(self._shares) - 2) * (1 + self.random)

    def _aims(self, heads: int) -> list[float]:
        """The sparsities that steps aim at: every other is the one that was asked for."""
        return [within(share, heads) for aim in AIMS for share in (self.sparsity, aim)]

    def _measure(self, trial: Trial, place: Tensor) -> dict[str, Tensor]:
        """What streaming costs at every share, for the heads that the gates choose and for random ones."""
        at = [share for share in self._shares if 0 < share < 1]
        chosen = [trial.cost(place, share) for share in at]
        anyone = []
        for seed in range(self.random):
            draw = torch.rand(len(place), generator=torch.Generator().manual_seed(seed))
            anyone.append([trial.cost(draw, share) for share in at])
        ends = trial.dense(), trial.cost(place, 1.0)

        def line(costs: Sequence[tuple[float, float]], which: int) -> Tensor:
            return torch.tensor([c[which] for c in (ends[0], *costs, ends[1])])

        curve = {"sparsity": torch.tensor(self._shares), "loss": line(chosen, 0), "accuracy": line(chosen, 1)}
        if anyone:
            curve["random"] = torch.stack([line(one, 0) for one in anyone]).mean(0)
            curve["random_accuracy"] = torch.stack([line(one, 1) for one in anyone]).mean(0)
        return curve

    def _summary(self, tensors: Mapping[str, Tensor], outcome: Outcome) -> dict[str, Any]:
        rank, curve = tensors["rank"], outcome.curve
        chosen = streams(rank, self.sparsity)
        summary: dict[str, Any] = {
            "heads": int((rank >= 0).sum()),
            "streaming": int(chosen.sum()),
            "sparsity": self.sparsity,
        }
        if chosen.any():  # tokens that a streaming head keeps, in the mean
            summary["kept"] = _round((tensors["sink"] + tensors["recent"])[chosen].double().mean())
        if curve:
            here = self._shares.index(self.sparsity)
            for name in ("loss", "random", "accuracy", "random_accuracy"):
                if name in curve:
                    summary[name] = _round(curve[name][here])
            summary["dense_accuracy"] = _round(curve["accuracy"][0])
            summary["pareto"] = {name: [_round(x) for x in t] for name, t in curve.items()}
        if outcome.losses:
            summary["losses"] = [_round(x) for x in outcome.losses]
        return summary


@dataclass(frozen=True)
class Outcome:
    """What was found of the KV heads of the open layers, one layer after the other."""

    place: Tensor  # [n], whose order is that of the heads
    gate: Tensor  # [n] in [0, 1]
    losses: Sequence[float] = ()  # of the optimizer's steps
    curve: Mapping[str, Tensor] = field(default_factory=dict)  # what streaming costs, by share of streaming heads


class Evidence(Learner):
    """What forward runs tell of the heads of a layer; sums in fp64, over query heads `H` or KV heads.

    From text: the attention on what a streaming head would not see, on each of the first tokens and at each of the
    latest distances, of up to `ROWS` rows that have something to miss. From passkeys, of the rows that predict an
    answer: the attention on the token that is to be copied (where a head stands that copies what followed the last
    time: induction) and on the one before it (where a head stands that finds the same token again), both counted as
    copying where the statement is out of a streaming head's sight; and what streaming does to the layer's output:
    with the output projection `W`, the full outputs `F` and the streaming ones `S` of the rows `r`, and `a` the gates,

        quadratic[g, h] = sum_r <W_g (S_rg - F_rg), W_h (S_rh - F_rh)>,

    so that `(1 - a) quadratic (1 - a)` is the squared error of the layer's output for any gates, exactly. Without a
    known projection it holds each head's own squares.
    """

    def __init__(self, layer: AttentionLayer, sink: int, recent: int):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        self.sink, self.recent = sink, recent
        self.sums = {
            "outside": zeros(layer.heads),
            "places": zeros(layer.heads, sink),
            "distances": zeros(layer.heads, recent),
            "rows": zeros(1),
            "copied": zeros(layer.heads),
            "matched": zeros(layer.heads),
            "answers": zeros(1),
            "quadratic": zeros(layer.kv_heads, layer.kv_heads),
            "energy": zeros(1),
        }

    def result(self) -> dict[str, Tensor]:
        return self.sums

    def see(self, attended: Attended) -> None:
        if attended.prompt.kind == "text":
            self._see_text(attended)
        else:
            self._see_answers(attended)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] += value.double().cpu()

    def _see_text(self, attended: Attended) -> None:
        tokens, first = attended.query.shape[1], self.sink + self.recent
        count = min(tokens - first, ROWS)
        if count <= 0:
            return
        spread = torch.linspace(first, tokens - 1, count, device=attended.query.device).long()
        for rows in spread.split(max(min(128, TILE // (len(attended.query) * tokens)), 1)):
            weights = _scores(attended, rows).softmax(-1)
            places = weights[..., : self.sink].sum(1)
            back = rows[:, None] - torch.arange(self.recent, device=rows.device)
            distances = weights.gather(2, back.expand(len(weights), -1, -1)).sum(1)
            self._add("places", places)
            self._add("distances", distances)
            self._add("outside", (len(rows) - places.sum(1) - distances.sum(1)).clamp(min=0))
        self.sums["rows"] += count

    def _see_answers(self, attended: Attended) -> None:
        rows, copied = answers(attended.prompt)
        far = unseen(rows, copied, self.sink, self.recent)
        rows, copied = rows.to(attended.query.device), copied.to(attended.query.device)
        scores = _scores(attended, rows)
        weights = scores.softmax(-1)
        place = torch.arange(scores.shape[-1], device=rows.device)
        cut = (place >= self.sink) & (rows[:, None] - place >= self.recent)
        change = scores.masked_fill(cut, -torch.inf).softmax(-1) - weights
        for name, target in (("copied", copied), ("matched", copied - 1)):
            there = weights.gather(2, target[:, None].expand(len(weights), -1, 1))[..., 0]
            self._add(name, there[:, far.to(there.device)].sum(1))
        self.sums["answers"] += far.sum()
        kv_heads = len(attended.value)
        moved = change.reshape(kv_heads, -1, change.shape[-1]) @ attended.value.float()
        moved = moved.unflatten(1, (-1, len(rows))).permute(2, 0, 1, 3).flatten(2)  # [R, Hkv, g Dv]
        if attended.projection is None:
            quadratic = moved.square().sum((0, 2)).diag()
        else:
            projection = attended.projection.float().unflatten(1, (kv_heads, -1))
            outputs = torch.einsum("rki,oki->rko", moved, projection)
            quadratic = torch.einsum("rko,rlo->kl", outputs, outputs)
        self._add("quadratic", quadratic)
        self._add("energy", attended.residual[rows].float().square().sum())


def _scores(attended: Attended, rows: Tensor) -> Tensor:
    """Scores `[H, R, T]` of some rows of a prompt."""
    return causal_scores(attended.query[:, rows], attended.key, rows, attended.scaling)


def answers(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """The rows `[R]` that predict an answer's next token, and where that token was stated `[R]`."""
    stated = torch.cat([torch.arange(*span) for span in prompt.stated])
    return answer_rows(prompt), stated


def unseen(rows: Tensor, copied: Tensor, sink: int, recent: int) -> Tensor:
    """Where a streaming head cannot see what is to be copied, nor the token before it: bool `[R]`."""
    return (copied - 1 >= sink) & (rows - copied >= recent)


def weigh(found: Sequence[Mapping[str, Tensor]], sink: int, recent: int) -> dict[str, Tensor]:
    """From the sums of the open layers to numbers `[open layers, Hkv]`; each KV head is as needed as the query head
    of its group that needs it most.

    `copy` and `outside` are shares of attention, `damage` is the size of a head's error in the layer's output when it
    alone streams, relative to the residual stream; `score` is the mean of copy and damage, each divided by its largest
    value in the model; `sink` and `recent` as by `sizes`. `quadratic [open layers, Hkv, Hkv]` is relative to the
    residual stream's squares.
    """
    kv_heads = len(found[0]["quadratic"])

    def worst(per_query: Tensor) -> Tensor:
        return per_query.reshape(kv_heads, -1).amax(1)

    numbers: dict[str, list[Tensor]] = {}
    for of in found:
        kept = sizes(of["places"], of["distances"], sink, recent)
        for name, value in {
            "copy": worst((of["copied"] + of["matched"]) / of["answers"].clamp(min=1)),
            "outside": worst(of["outside"] / of["rows"].clamp(min=1)),
            "damage": (of["quadratic"].diagonal() / of["energy"].clamp(min=1e-30)).sqrt(),
            "quadratic": of["quadratic"] / of["energy"].clamp(min=1e-30),
            "sink": worst(kept[0]),
            "recent": worst(kept[1]),
        }.items():
            numbers.setdefault(name, []).append(value)
    stacked = {name: torch.stack(rows) for name, rows in numbers.items()}
    parts = [stacked[name] / stacked[name].max().clamp(min=1e-30) for name in ("copy", "damage")]
    return stacked | {"score": (parts[0] + parts[1]) / 2}


def sizes(places: Tensor, distances: Tensor, sink: int, recent: int) -> tuple[Tensor, Tensor]:
    """How few first and latest tokens do for each query head: attention on `places [H, sink]` and at `distances
    [H, recent]` -> two int `[H]`.

    Of what a streaming head sees with the full sizes, the smaller ones cut off no more than `OUTSIDE`, half at either
    side. Multiples of `GRAIN`; the full sizes where no text was long enough to tell.
    """
    seen = places.sum(1) + distances.sum(1)

    def enough(mass: Tensor, whole: int) -> Tensor:
        lost = mass.sum(1, keepdim=True) - mass.cumsum(1)  # by keeping 1, 2, ... tokens
        needed = 1 + (lost > OUTSIDE / 2 * seen[:, None]).sum(1)
        rounded = (-(-needed // GRAIN) * GRAIN).clamp(max=whole)
        return torch.where(seen > 0, rounded, whole).int()

    return enough(places, sink), enough(distances, recent)


def split(
    prompts: Sequence[Prompt], sink: int, recent: int, held_out: float
) -> tuple[list[Prompt], list[Prompt], list[str]]:
    """The passkey prompts to learn from, those to measure with, and what is to be said about it."""
    useful = []
    for prompt in prompts:
        if prompt.kind == "passkey" and prompt.asked and unseen(*answers(prompt), sink, recent).any():
            useful.append(prompt)
    if not useful:
        told = f"no passkey prompt states anything out of sight of {sink} first and {recent} latest tokens"
        return [], [], [f"{told}: gates are forward scores, and nothing was measured; take a larger --seqlen"]
    if len(useful) == 1 or not held_out:
        return useful, useful[-1:], ["the cost of streaming is measured on a prompt that gates were learned from"]
    count = min(max(round(held_out * len(useful)), 1), len(useful) - 1)
    return useful[:-count], useful[-count:], []


def spread(score: Tensor) -> Tensor:
    """Where the optimizer begins: scores `[n]` by their order alone, evenly from -1 to 1."""
    place = torch.empty(len(score))
    place[score.sort(stable=True).indices] = torch.linspace(-1, 1, len(score))
    return place


def within(share: float, parts: int) -> float:
    """A share that leaves at least one part of `parts` on either side."""
    return min(max(share, 1 / parts), 1 - 1 / parts)


def _of_largest(score: Tensor) -> Tensor:
    return score / score.max().clamp(min=1e-30)


def _round(value: float | Tensor) -> float:
    return float(f"{float(value):.4g}")


@dataclass
class _Progress:
    """Tokens that were run, of so many; one that is learned from counts as several."""

    subject: Subject
    sizes: list[int]  # of the prompts
    tokens: int
    done: int = 0

    @classmethod
    def of(
        cls, subject: Subject, train: Sequence[Prompt], test: Sequence[Prompt], steps: int, choices: int
    ) -> _Progress:
        """Before so many steps over the prompts to learn from, and choices that are tried on the others."""
        sizes = [len(prompt) for prompt in (*train, *test)]
        learned = sum(sizes[number] for number in in_turn(steps, len(train)))
        return cls(subject, sizes, sum(sizes) + BACKWARD * learned + choices * sum(sizes[len(train) :]))

    def learned(self, number: int) -> None:
        self._add(BACKWARD * self.sizes[number])

    def after(self, number: int, told: Told) -> Told:
        self._add(self.sizes[number])
        return told

    def _add(self, tokens: int) -> None:
        self.done += tokens
        self.subject.tick(min(self.done / self.tokens, 1.0))


@dataclass(frozen=True)
class Trial:
    """Prompts on which choices of heads are measured."""

    model: Gated
    teachers: Sequence[Told]  # of all prompts of the model
    numbers: Sequence[int]  # which of them measure
    progress: _Progress

    def cost(self, place: Tensor, share: float) -> tuple[float, float]:
        """The distance from the dense model and the share of right answers, with that share of heads, those at the
        lowest places `[n]`, streaming."""
        told = [self.progress.after(n, self.model.tell(n, hard(place, share))) for n in self.numbers]
        far = [float(distance(one.hidden, self.teachers[n].hidden)) for one, n in zip(told, self.numbers)]
        return sum(far) / len(far), _mean_right(told)

    def dense(self) -> tuple[float, float]:
        return 0.0, _mean_right([self.teachers[number] for number in self.numbers])


def _mean_right(told: Sequence[Told]) -> float:
    return sum(float(one.right.float().mean()) for one in told) / len(told)
