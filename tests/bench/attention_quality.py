"""What a calibrated plan costs a model: perplexity, divergence, passkeys and cache, beside other choices of equal cost.

    acc calibrate MODEL --data CALIBRATION.txt --out CALIBRATION
    python tests/bench/attention_quality.py MODEL CALIBRATION --eval TEXT.txt --out tests/bench/results/NAME.json

Rows with the same share of streaming heads, or the same mean cost in prefill, differ only in which heads get what:

    heads COST          the calibration's own search, at that share of the query-key products of dense attention;
                        heads by recall COST, heads by squares COST: the same for another objective
    each head COST      every head by itself gets that cost, and the kind that keeps most attention (MInference's paper)
    one budget COST     every head reads the same share of columns and diagonals (as most of MInference's files have it)
    random kinds COST   a kind drawn for each head, at that cost
    retrieval SHARE     that share of the KV heads stream; random retrieval SHARE: heads drawn instead
    retrieval SHARE, heads COST    the same, and the others' query heads read as in `heads COST`
    channels            decoding by labels; random channels: channels drawn instead
    whole plan          all of it, as `acc generate --plan` runs it

Rows that are in the output file are not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from acc.calibrate.evaluate import evaluate, windows
from acc.calibrate.head_search import choose
from acc.calibrate.heads import Heads
from acc.calibrate.passkeys import passkeys, prompts_of
from acc.calibrate.stream import Stream
from acc.calibrate.text import load_tokens
from acc.cli.base import loaded_model, tokenizer_of
from acc.formats.attention import PlanCache, attach, detach, planned
from acc.formats.attention_plan import AttentionPlan
from acc.formats.calibration import Calibration
from acc.formats.patterns import DENSE, VERTICAL_SLASH
from acc.formats.source import open_source
from measure import machine
from torch import Tensor


class Curves:
    """What the pass heads measured: of every head, candidate and length what is kept, lost and paid."""

    def __init__(self, calibration: Calibration):
        self.calibration, of = calibration, calibration.of("heads")
        self.kind, self.share, self.length = of["curve_kind"], of["curve_budget"].double(), of["length"]
        self.layers = [i for i, x in enumerate(calibration.facts["layers"]) if x["refused"] is None]
        self.recall, self.error, self.cost = (
            of[f"curve_{one}"][self.layers].double().flatten(0, 1) for one in ("recall", "error", "cost")
        )  # [n, K, N]
        self.paid: Tensor | None = None  # [n], what the last search pays for each head at the greatest length

    def families(self) -> dict[tuple[int, float], list[int]]:
        """Candidates of a kind that differ in their size alone, small ones first."""
        found: dict[tuple[int, float], list[int]] = {}
        for at, (kind, share) in enumerate(zip(self.kind.tolist(), self.share)):
            if kind != DENSE:
                found.setdefault((kind, round(float(share[0] / share.sum()), 3)), []).append(at)
        return {key: sorted(members, key=lambda at: float(self.share[at].sum())) for key, members in found.items()}

    def at(self, family: list[int], cost: float, values: Tensor, heads: Tensor | None = None) -> Tensor:
        """`values [n or 1, K, N]` of a family, between candidates, where its mean cost is `cost` -> `[n or 1, N]`."""
        mean = self.cost[:, family].mean(0).log()  # [m, N]
        wanted = torch.tensor(cost).double().log()
        above = (mean < wanted).sum(0).clamp(1, len(family) - 1)  # [N]
        n = torch.arange(mean.shape[1])
        low, high = mean[above - 1, n], mean[above, n]
        part = ((wanted - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
        of = values[:, family]
        return of[:, above - 1, n].lerp(of[:, above, n], part.expand(len(of), -1))

    def shares(self, family: list[int], cost: float) -> Tensor:
        """The budget `[N, 2]` of a family at a cost."""
        each = [self.at(family, cost, self.share[None, :, None, i].expand(1, -1, len(self.length))) for i in (0, 1)]
        return torch.stack(each, -1)[0]

    def plan(self, kind: Tensor, budget: Tensor) -> Calibration:
        """The calibration with other kinds `[n]` and budgets `[n, N, 2]`."""
        tensors = dict(self.calibration.tensors)
        heads = tensors["heads.kind"].shape[1]
        kinds, budgets = tensors["heads.kind"].clone(), tensors["heads.budget"].clone()
        kinds[self.layers] = kind.view(-1, heads).to(kinds.dtype)
        budgets[self.layers] = budget.view(-1, heads, *budget.shape[1:]).to(budgets.dtype)
        return replace(self.calibration, tensors=tensors | {"heads.kind": kinds, "heads.budget": budgets})

    def searched(self, cost: float, objective: str = "error") -> tuple[Calibration, float]:
        """As the pass would have it at another cost."""
        loss = {"error": self.error.sqrt(), "squares": self.error, "recall": 1 - self.recall}[objective].clamp(min=0)
        allowed = (self.recall >= Heads().minimum_recall) | (self.kind == DENSE)[:, None]
        choice, _ = choose(self.kind, loss, self.cost, allowed, cost)  # [n, N]
        n, last = torch.arange(len(choice)), torch.arange(choice.shape[1])
        recall = self.recall[n[:, None], choice, last]
        self.paid = self.cost[n[:, None], choice, last][:, -1]
        return self.plan(self.kind[choice[:, 0]], self.share[choice]), float(recall[:, -1].mean())

    def each_head(self, cost: float) -> tuple[Calibration, float]:
        families = self.families()
        recall = torch.stack([self.at(members, cost, self.recall) for members in families.values()], 1)  # [n, F, N]
        best = recall[..., -1].argmax(1)
        return self._of(families, best, cost), float(recall[torch.arange(len(best)), best, -1].mean())

    def random_kinds(self, cost: float) -> tuple[Calibration, float]:
        families = self.families()
        recall = torch.stack([self.at(members, cost, self.recall) for members in families.values()], 1)
        drawn = torch.randint(len(families), (len(recall),), generator=torch.Generator().manual_seed(0))
        return self._of(families, drawn, cost), float(recall[torch.arange(len(drawn)), drawn, -1].mean())

    def one_budget(self, cost: float) -> tuple[Calibration, float]:
        families = self.families()
        slash = min(key for key in families if key[0] == VERTICAL_SLASH)  # one column for seven diagonals
        which = torch.full((len(self.recall),), list(families).index(slash))
        return self._of(families, which, cost), float(self.at(families[slash], cost, self.recall)[:, -1].mean())

    def _of(self, families: dict[tuple[int, float], list[int]], which: Tensor, cost: float) -> Calibration:
        kinds = torch.tensor([kind for kind, _ in families])
        shares = torch.stack([self.shares(members, cost) for members in families.values()])
        return self.plan(kinds[which], shares[which])


def drawn_heads(calibration: Calibration, seed: int) -> Calibration:
    """Streaming heads by lot."""
    rank = calibration.tensors["retrieval.rank"].clone()
    count = int((rank >= 0).sum())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(rank.dtype)
    rank[rank >= 0] = order
    return replace(calibration, tensors=calibration.tensors | {"retrieval.rank": rank})


def drawn_channels(calibration: Calibration) -> Calibration:
    """Channels by lot."""
    order = calibration.tensors["channels.order"]
    drawn = torch.rand(order.shape, generator=torch.Generator().manual_seed(0)).argsort(-1).to(order.dtype)
    return replace(calibration, tensors=calibration.tensors | {"channels.order": drawn})


class Ran:
    """A stream whose blocks have run, for another comparison with its logits."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def blocks(self, batches: Any) -> Iterable[Any]:
        return ()

    def logits(self) -> Iterable[Tensor]:
        return self.stream.logits()


class Bench:
    """A model, and what is measured of it under a plan."""

    def __init__(self, arguments: argparse.Namespace):
        self.source = open_source(arguments.model)
        tokenizer = tokenizer_of(self.source)
        ids = load_tokens(arguments.eval, tokenizer, chat_template="auto").ids
        self.windows = windows(ids, arguments.window, arguments.windows)
        self.base = Stream(self.source)
        for _ in self.base.blocks(list(self.windows.split(1))):
            pass
        self.model = loaded_model(self.source, None, None, "cpu")
        length, count = arguments.seqlen, arguments.passkeys
        self.prompts = prompts_of(tokenizer, ids, length, count, domain="eval", seed=0)

    def perplexity(self, plan: AttentionPlan | None) -> dict[str, float]:
        """Of the plan as in prefill."""
        if plan is None:
            scored = evaluate(Ran(self.base), None, self.windows)
            return {"perplexity": scored["perplexity"]}
        stream = Stream(self.source)
        with stream.skeleton.replace_attention(planned(plan, stream.skeleton)):
            scored = evaluate(stream, Ran(self.base), self.windows)
        return {name: scored[name] for name in ("perplexity", "ppl_ratio", "kl", "top1")}

    def passkeys(self, plan: AttentionPlan | None) -> dict[str, float]:
        caches: list[PlanCache] = []

        def new_cache() -> PlanCache | None:
            if plan is None:
                return None
            caches.append(PlanCache(self.model))
            return caches[-1]

        if plan is not None:
            attach(self.model, plan)
        try:
            found = passkeys(self.model, self.prompts, new_cache)
        finally:
            detach(self.model)
        row = {"accuracy": found["accuracy"], "accuracy_stderr": found["accuracy_stderr"]}
        if caches:
            row |= {"cache_bytes": caches[-1].nbytes, "dense_cache_bytes": caches[-1].dense_nbytes}
        return row


def prefill_cost(plan: AttentionPlan | None, paid: Tensor | None, tokens: int) -> float:
    """Query-key products of a prompt of so many tokens, of those of dense attention: mean over all query heads. `paid
    [n]` is what each costs that follows a pattern; None: dense."""
    if plan is None:
        return 1.0
    whole, found = tokens * (tokens + 1) / 2, []
    for index, layer in enumerate(plan.layers):
        if layer is None:
            found += [1.0] * plan.layout[index].heads
            continue
        heads = [1.0] * layer.heads if paid is None or layer.patterns is None else paid[len(found) :][: layer.heads]
        each = [float(cost) for cost in heads]
        for one, sink, recent in zip(layer.streams, layer.sink.tolist(), layer.recent.tolist()):
            seen = min(sink + recent, tokens)
            for query in layer.query_heads([one]):
                each[query] = (seen * (seen + 1) / 2 + (tokens - seen) * seen) / whole
        found += each
    return sum(found) / len(found)


def rows(
    calibration: Calibration, curves: Curves, costs: list[float], shares: list[float]
) -> dict[str, Callable[[], Any]]:
    """`{name: () -> (plan, recall or None, whether prefill is concerned)}`."""
    made: dict[str, Callable[[], Any]] = {"dense": lambda: (None, None, True)}
    ways = {
        "heads": curves.searched,
        "heads by recall": partial(curves.searched, objective="recall"),
        "heads by squares": partial(curves.searched, objective="squares"),
        "each head": curves.each_head,
        "one budget": curves.one_budget,
        "random kinds": curves.random_kinds,
    }
    for cost in costs:
        for name, way in ways.items():

            def heads(way: Callable = way, cost: float = cost) -> Any:
                changed, recall = way(cost)
                return AttentionPlan.of(changed, use=("heads",)), recall, True

            made[f"{name} {cost:g}"] = heads
    for share in shares:
        for name, ranked in (("retrieval", calibration), ("random retrieval", drawn_heads(calibration, 0))):

            def retrieval(ranked: Calibration = ranked, share: float = share) -> Any:
                return AttentionPlan.of(ranked, use=("retrieval",), sparsity=share), None, True

            made[f"{name} {share:g}"] = retrieval
        for cost in costs:

            def both(share: float = share, cost: float = cost) -> Any:
                return (
                    AttentionPlan.of(curves.searched(cost)[0], use=("heads", "retrieval"), sparsity=share),
                    None,
                    True,
                )

            made[f"retrieval {share:g}, heads {cost:g}"] = both
    made["channels"] = lambda: (AttentionPlan.of(calibration, use=("channels",)), None, False)
    made["random channels"] = lambda: (AttentionPlan.of(drawn_channels(calibration), use=("channels",)), None, False)
    made["whole plan"] = lambda: (AttentionPlan.of(calibration), None, True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--costs", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5])
    parser.add_argument("--rows", nargs="*", help="which rows; all by default")
    for name, default in (("window", 4096), ("windows", 8), ("passkeys", 64), ("seqlen", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    done = found.get("rows", {})
    calibration = Calibration.load(arguments.calibration)
    curves = Curves(calibration)
    made = rows(calibration, curves, arguments.costs, arguments.shares)
    wanted = [name for name in arguments.rows or made if name not in done]
    if unknown := [name for name in wanted if name not in made]:
        sys.exit(f"there is no row {unknown[0]!r}; there is {', '.join(made)}")
    if not wanted:
        return
    bench = Bench(arguments)
    for name in wanted:
        print(name, flush=True)
        plan, recall, prefill = made[name]()
        row = {} if recall is None else {"recall": recall}
        if name.startswith(("dense", "heads", "retrieval", "random retrieval")):
            row["prefill_cost"] = prefill_cost(plan, curves.paid, arguments.window)
        row |= bench.perplexity(plan) if prefill else {}
        done[name] = row | bench.passkeys(plan)
        settings = {one: getattr(arguments, one) for one in ("window", "windows", "passkeys", "seqlen")}
        whole = {
            "model": Path(arguments.model).name,
            "text": Path(arguments.eval).name,
            "settings": settings,
            "calibration": {one: about["settings"] for one, about in calibration.facts["passes"].items()},
            "machine": machine(),
            "rows": done,
        }
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
