"""Attention sinks: which heads look at the first token, and so do nothing, in which kind of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from ..formats.model import AttentionLayer
from .attention import of_layers
from .base import Attended, Learned, Learner, Pass, Subject, causal_scores

SKIPPED = 4  # first rows: their mass is on the first tokens because there is nothing else
# where bins of distances begin: each distance below 16, then three to the octave up to 2^20; the last one is open
EDGES = torch.tensor([*range(16), *(round(16 * 2 ** (i / 3)) for i in range(48))])
SINKS = (0, 1, 2, 4, 8, 16, 32, 64)  # numbers of first tokens that a head may keep
CLASSES = ("active", "sink", "dormant")
HIDDEN = -1e30  # the score of a key that is to come: finite, as 0 times it is to be 0
SCORES = 2**22  # at most in memory at once, unless one row of all heads has more
MASSIVE = 1000.0  # times the median magnitude: an extreme channel of the residual


class Sinks(Pass):
    """What each head does with the first tokens, in every domain of text (Guo et al., arXiv 2410.13835).

    A head that has nothing to say puts its attention on the first token, whose value is close to zero. It is a sink
    where that is most of its attention, and dormant where its output is also small beside that of the layer's other
    heads (the norm of outputs tells idle heads better than the mass on the first token, arXiv 2504.03889). Classes that
    differ between domains are told: such a head works in one kind of text only. Also found: how many first and last
    tokens a head needs, distances of attention, and the residual channels in which the first token is extreme.

    Rows are sampled evenly; the first four are left out. Every `--data` is a domain.
    """

    rows: int = Field(256, ge=0, description="queries per prompt that are looked at, spread evenly; 0: all")
    tile: int = Field(128, ge=1, description="queries looked at together at most; changes memory and nothing else")
    sink_mass: float = Field(0.5, gt=0, lt=1, description="mean attention on token 0 that makes a head a sink")
    dormant_norm: float = Field(
        0.1, gt=0, description="a sink is dormant when its output norm is below this share of the layer's median head"
    )
    outside: float = Field(0.01, gt=0, lt=1, description="attention that the suggested sink and window may miss")

    def learner(self, layer: AttentionLayer) -> Domains:
        return Domains(layer, self)

    def conclude(self, subject: Subject, found: Mapping[int, dict[str, Tensor]]) -> Learned:
        """Tensors, for Dm domains in the order of `summary["domains"]` and L layers:

        `sink_mass`, `sink_mass_error` (standard error over prompts), `first4_mass`, `window64_mass`, `window256_mass`,
        `entropy` (nats), `out_norm` (of the projected output), `out_norm_ratio` (to the layer's median head) `[Dm, L,
        H]`; `value_ratio` `[Dm, L, Hkv]`, `|v_0|` over the mean of the others; `distance` `[Dm, L, H, 64]`, mass by
        distance, bins beginning at `edges` int32 `[64]`; `class` uint8 `[Dm, L, H]`, an index of `summary["classes"]`;
        `flips` bool `[L, H]`; `n_sink` and `window` int32 `[L, H]`, the fewest first and last tokens that miss no more
        than `outside` in any domain; `streams` bool `[Dm, L, Hkv]`, where 4 and 256 are enough for the whole group;
        `resid_norm` `[L, 2]` of token 0 and the median token where the layer begins; `massive_idx` int32 `[L, 8]`, the
        channels in which token 0 is largest there, `massive_val` `[L, 8]` their mean and `massive_ratio` `[L, 8]` its
        magnitude over the median of all tokens and channels.

        Layers that are left alone hold zeros."""
        domains = list(dict.fromkeys(p.domain for p in subject.prompts if p.kind in self.kinds))
        per_layer = {index: self._layer(of) for index, of in found.items()}
        names = next(iter(per_layer.values()))
        tensors = {
            name: of_layers({index: of[name] for index, of in per_layer.items()}, len(subject.layers), 0)
            for name in names
        }
        by_domain = {name: x.transpose(0, 1).contiguous() if name in BY_DOMAIN else x for name, x in tensors.items()}
        by_domain["edges"] = EDGES.int()
        return Learned(by_domain, _summary(by_domain, domains, sorted(found)), self._events(by_domain, sorted(found)))

    def _layer(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored of one layer, `[Dm, ...]` or `[...]`, from sums over its prompts."""
        prompts = found["prompts"]  # [Dm]

        def mean(name: str) -> Tensor:
            return found[name] / prompts.view(-1, *[1] * (found[name].dim() - 1))

        sink, square, out = mean("sink_mass"), mean("sink_square"), mean("out_norm")
        distance, near = mean("distance"), mean("first_distance")
        ratio = out / out.median(1, keepdim=True).values.clamp(min=torch.finfo(out.dtype).tiny)
        kind = (sink > self.sink_mass).long()
        kind += kind * (ratio < self.dormant_norm)
        beyond = outside_mass(distance, near)  # [Dm, H, sinks, edges]
        n_sink, window = smallest(beyond.amax(0), self.outside)
        kv_heads = found["value_ratio"].shape[1]
        enough = beyond[:, :, SINKS.index(4), int((EDGES == 256).nonzero())] <= self.outside
        variance = (square - sink.square()).clamp(min=0) / (prompts[:, None] - 1).clamp(min=1)
        residual = {name: found[name].sum(0) / prompts.sum() for name in ("resid_norm", "first", "median")}
        top = residual["first"].abs().topk(min(8, len(residual["first"]))).indices
        value = residual["first"][top]
        within = distance.cumsum(-1)
        return {
            "sink_mass": sink.float(),
            "sink_mass_error": variance.sqrt().float(),
            "first4_mass": mean("first4_mass").float(),
            "window64_mass": within[..., int((EDGES == 64).nonzero()) - 1].float(),
            "window256_mass": within[..., int((EDGES == 256).nonzero()) - 1].float(),
            "entropy": mean("entropy").float(),
            "out_norm": out.float(),
            "out_norm_ratio": ratio.float(),
            "value_ratio": mean("value_ratio").float(),
            "distance": distance.float(),
            "class": kind.to(torch.uint8),
            "flips": (kind != kind[:1]).any(0),
            "n_sink": n_sink.int(),
            "window": window.int(),
            "streams": enough.unflatten(1, (kv_heads, -1)).all(-1),
            "resid_norm": residual["resid_norm"].float(),
            "massive_idx": top.int(),
            "massive_val": value.float(),
            "massive_ratio": (value.abs() / residual["median"].clamp(min=torch.finfo(value.dtype).tiny)).float(),
        }

    def _events(self, tensors: Mapping[str, Tensor], open_layers: list[int]) -> tuple[str, ...]:
        if len(tensors["class"]) > 1 or not open_layers:
            return ()
        return ("one domain only: heads that work in some texts and idle in others are not found; give several --data",)


BY_DOMAIN = {
    *("sink_mass", "sink_mass_error", "first4_mass", "window64_mass", "window256_mass", "entropy", "out_norm"),
    *("out_norm_ratio", "value_ratio", "distance", "class", "streams"),
}


def _summary(tensors: Mapping[str, Tensor], domains: list[str], open_layers: list[int]) -> dict[str, Any]:
    kind, flips = tensors["class"][:, open_layers], tensors["flips"]
    norm = tensors["resid_norm"][open_layers].double()
    ratio = norm[:, 0] / norm[:, 1].clamp(min=torch.finfo(norm.dtype).tiny)
    massive = tensors["massive_ratio"] > MASSIVE
    kept = tensors["streams"].all(0)
    return {
        "domains": domains,
        "classes": list(CLASSES),
        "heads": {
            domain: {name: int((kind[i] == j).sum()) for j, name in enumerate(CLASSES)}
            for i, domain in enumerate(domains)
        },
        "flips": flips.nonzero().tolist(),
        "sink_mass": {d: round(float(tensors["sink_mass"][i, open_layers].mean()), 4) for i, d in enumerate(domains)},
        "kv_heads_that_need_4_and_256_tokens": {
            **{domain: int(tensors["streams"][i].sum()) for i, domain in enumerate(domains)},
            "all": kept.nonzero().tolist(),
        },
        "residual_of_token_0": {
            "times_the_median": round(float(ratio.max()), 2),
            "layer": open_layers[int(ratio.argmax())],
        },
        "massive_channels": sorted({int(c) for c in tensors["massive_idx"][massive]}),
    }


@dataclass
class Sums:
    """Of one domain, in fp64; each prompt counts the same. `first_distance` is by distance the mass on the first n
    tokens alone, n of `SINKS`."""

    prompts: Tensor  # []
    sink_mass: Tensor  # [H], as the next four
    sink_square: Tensor
    first4_mass: Tensor
    entropy: Tensor
    out_norm: Tensor
    distance: Tensor  # [H, bins]
    first_distance: Tensor  # [H, sinks, bins]
    value_ratio: Tensor  # [Hkv]
    resid_norm: Tensor  # [2]
    first: Tensor  # [hidden], the residual of token 0
    median: Tensor  # [] magnitude in the residual


class Domains(Learner):
    """Sums over the prompts of each domain, in the order in which domains come."""

    def __init__(self, layer: AttentionLayer, settings: Sinks):
        self.layer, self.settings = layer, settings
        self.sums: dict[str, Sums] = {}

    def see(self, attended: Attended) -> None:
        tokens = attended.query.shape[1]
        if tokens <= SKIPPED:
            raise ValueError(f"a prompt of {tokens} tokens says nothing of sinks; take a --seqlen of 64 or more")
        told = {**rows_told(attended, self.settings.rows, self.settings.tile), **tokens_told(attended)}
        domain = attended.prompt.domain
        if domain not in self.sums:
            self.sums[domain] = Sums(**{name: torch.zeros_like(x) for name, x in told.items()})
        for name, x in told.items():
            getattr(self.sums[domain], name).add_(x)

    def result(self) -> dict[str, Tensor]:
        return {f.name: torch.stack([getattr(one, f.name) for one in self.sums.values()]) for f in fields(Sums)}


def rows_told(attended: Attended, rows: int, tile: int) -> dict[str, Tensor]:
    """Means over sampled rows of a prompt, fp64 on the CPU, named as in `Sums`; softmax in fp32, in tiles of rows."""
    heads, tokens, _ = attended.query.shape
    group = heads // len(attended.key)
    key, value = attended.key.float(), attended.value.float()
    positions = sampled_rows(tokens, rows)
    told: dict[str, Tensor] = {}
    for part in positions.split(min(tile, max(SCORES // (heads * tokens), 1))):
        place = part.to(key.device)
        seen = int(part[-1]) + 1
        scores = causal_scores(attended.query[:, place], key[:, :seen], place, attended.scaling).clamp_(min=HIDDEN)
        weights = scores.softmax(-1)
        total = scores.amax(-1) - weights.amax(-1).log()  # log of the softmax's denominator
        out = (weights.view(len(key), group * len(part), seen) @ value[:, :seen]).view(heads, len(part), -1)
        distance, first = distances(weights, place)
        for name, x in {
            "sink_mass": weights[..., 0].sum(1, dtype=torch.float64),
            "first4_mass": weights[..., :4].sum((1, 2), dtype=torch.float64),
            "entropy": (total - (weights * scores).sum(-1)).sum(1, dtype=torch.float64),
            "out_norm": projected_norm(out, attended.projection).sum(1),
            "distance": distance,
            "first_distance": first,
        }.items():
            told[name] = told[name] + x if name in told else x
    told = {name: (x / len(positions)).cpu() for name, x in told.items()}
    return told | {"sink_square": told["sink_mass"].square(), "prompts": torch.ones((), dtype=torch.float64)}


def sampled_rows(tokens: int, rows: int) -> Tensor:
    """Positions int64, spread evenly over those that are not skipped; all of them where `rows` is 0 or enough."""
    if rows == 0 or rows >= tokens - SKIPPED:
        return torch.arange(SKIPPED, tokens)
    return torch.linspace(SKIPPED, tokens - 1, rows, dtype=torch.float64).round().long()


def distances(weights: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by distance, summed over rows, fp64: `[H, bins]` of all keys and `[H, sinks, bins]` of the first ones
    alone, from `weights [H, R, S]` of the rows at `position [R]`."""
    edges = EDGES.to(position.device)
    within = weights.cumsum(-1)
    # keys at distance e or more are those before position - e + 1
    beyond = (position[:, None] - edges + 1).clamp(min=0)  # [R, bins]
    counts = torch.tensor(SINKS, device=position.device)
    firsts = beyond.minimum(counts[:, None, None]).clamp(max=weights.shape[-1])  # [sinks, R, bins]

    def binned(keys: Tensor) -> Tensor:
        mass = within.gather(-1, (keys - 1).clamp(min=0).expand(len(within), -1, -1)).double()
        mass = mass.masked_fill_(keys == 0, 0).sum(1)
        return mass - functional.pad(mass[:, 1:], (0, 1))

    return binned(beyond), torch.stack([binned(one) for one in firsts], 1)


def projected_norm(out: Tensor, projection: Tensor | None) -> Tensor:
    """Norms `[H, R]` fp64 of the heads' outputs `[H, R, Dv]` where they have been projected, each head alone, by
    `[hidden, H * Dv]`."""
    if projection is None:
        return out.double().norm(dim=-1)
    heads, _, value_dim = out.shape
    weight = projection.float().view(-1, heads, value_dim).transpose(0, 1)  # [H, hidden, Dv]
    gram = weight.mT @ weight  # |W o|² = oᵀ (Wᵀ W) o
    return ((out @ gram) * out).double().sum(-1).clamp(min=0).sqrt()


def tokens_told(attended: Attended) -> dict[str, Tensor]:
    """Of values and of the residual, over all tokens of the prompt, named as in `Sums`."""
    value = attended.value.double().norm(dim=-1)  # [Hkv, T]
    residual = attended.residual.double()
    norm = residual.norm(dim=-1)
    magnitude = residual[:: max(len(residual) // 256, 1)].abs()  # a sample: medians sort
    tiny = torch.finfo(value.dtype).tiny
    return {
        "value_ratio": (value[:, 0] / value[:, 1:].mean(1).clamp(min=tiny)).cpu(),
        "resid_norm": torch.stack([norm[0], norm.median()]).cpu(),
        "first": residual[0].cpu(),
        "median": magnitude.median().cpu(),
    }


def outside_mass(distance: Tensor, first: Tensor) -> Tensor:
    """`[..., sinks, edges]`: attention that is neither on the first n tokens, n of `SINKS`, nor nearer than an edge,
    from `distance [..., bins]` and `first [..., sinks, bins]`."""
    rest = distance[..., None, :] - first
    return rest.flip(-1).cumsum(-1).flip(-1)


def smallest(outside: Tensor, allowed: float) -> tuple[Tensor, Tensor]:
    """Numbers of first tokens and of last ones, int64 `[H]`, that together are the fewest with no more than `allowed`
    of `outside [H, sinks, edges]`; the longest window there is where none is enough. At least the token itself."""
    sinks = torch.tensor(SINKS)[:, None]
    size = (sinks + EDGES.clamp(min=1)).expand(outside.shape)
    allowed_size = size.masked_fill((outside > allowed) | (EDGES == 0), int(sinks.max() + EDGES.max() + 1))
    best = allowed_size.flatten(1).argmin(1)
    chosen_sinks, chosen_window = sinks[best // len(EDGES), 0], EDGES[best % len(EDGES)]
    none = allowed_size.flatten(1).amin(1) > sinks.max() + EDGES.max()
    return chosen_sinks.masked_fill(none, 0), chosen_window.masked_fill(none, int(EDGES[-1]))
