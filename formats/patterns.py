"""From a head's kind and budget to the keys that it reads: the one place, for the calibration and for the runtime.

A kind says how a head attends in prefill. A budget is two numbers of tokens: for streaming heads the first tokens and
the most recent ones, for vertical-slash heads columns and diagonals, for block-sparse heads the keys that a row reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention_index import (
    Index,
    adaptive_index,
    block_index,
    cost,
    estimate_blocks,
    estimate_vertical_slash,
    stack,
    streaming_index,
    vertical_slash_index,
)
from ..kernels.attention_sparse import BLOCK

KINDS = ("dense", "streaming", "vertical_slash", "blocks")  # a kind is stored as its place here
DENSE, STREAMING, VERTICAL_SLASH, BLOCKS = range(4)
FLOORS = (BLOCK, 2 * BLOCK)  # tokens: no budget is less, however short the prompt
ADAPTIVE_FLOOR = 4 * BLOCK  # tokens that an online budget gives columns, diagonals and rows at least


def budget_at(length: Tensor, budget: Tensor, tokens: int) -> Tensor:
    """length int `[N]` ascending, budget `[..., N, 2]` as shares of a context -> int32 `[..., 2]`, in tokens.

    Between two lengths the shares are interpolated over the logarithm of the length; shorter and longer contexts have
    those of the nearest. At least `FLOORS`, at most `tokens`.
    """
    at = length.double().log2()
    here = torch.tensor(float(tokens), dtype=torch.float64).log2().clamp(at[0], at[-1])
    above = int(torch.searchsorted(at, here).clamp(max=len(at) - 1))
    below = max(above - 1, 0)
    part = 0.0 if above == below else float((here - at[below]) / (at[above] - at[below]))
    share = budget[..., below, :].double().lerp(budget[..., above, :].double(), part) if part else budget[..., above, :]
    floors = torch.tensor(FLOORS, device=budget.device)
    return (share.double() * tokens).round().long().maximum(floors).clamp(max=tokens).int()


@dataclass(frozen=True)
class Estimate:
    """What patterns of a prompt are chosen by; `None` where no head asks for it. `T` rows, the last of `S` keys."""

    batch: int
    rows: int
    keys: int
    device: torch.device
    vertical: Tensor | None  # [B, H, S], the mean probability of each key, of the last 64 rows
    slash: Tensor | None  # [B, H, S], the same of each distance, nearest first
    blocks: Tensor | None  # [B, H, R, C], scores of blocks of keys for blocks of rows

    @classmethod
    def of(cls, query: Tensor, key: Tensor, *, scaling: float, kinds: set[int] | None = None) -> Estimate:
        """query `[B, H, T, D]`, key `[B, Hkv, S, D]`; `kinds` are those that will be asked for, by default all."""
        kinds = set(range(len(KINDS))) if kinds is None else kinds
        vertical = slash = blocks = None
        if VERTICAL_SLASH in kinds:
            vertical, slash = estimate_vertical_slash(query, key, scaling=scaling)
        if BLOCKS in kinds:
            blocks = estimate_blocks(query, key, scaling=scaling)
        return cls(len(query), query.shape[2], key.shape[2], query.device, vertical, slash, blocks)

    def index(self, kind: int, budget: Tensor, heads: Tensor) -> Index:
        """The keys that `heads [h]`, all of one kind, read with the budgets int `[h, 2]`; of `B = 1` where nothing
        was estimated."""
        first, second = budget.unbind(-1)
        if kind == DENSE:
            return streaming_index(first * 0, first * 0 + self.keys, self.rows, self.keys)
        if kind == STREAMING:
            return streaming_index(first, second, self.rows, self.keys)
        if kind == BLOCKS:
            assert self.blocks is not None
            return block_index(self.blocks[:, heads], -(-first // BLOCK), self.rows, self.keys)
        assert self.vertical is not None
        assert self.slash is not None
        return self._vertical_slash(self.vertical[:, heads], self.slash[:, heads], first, -(-second // BLOCK))

    def mixed(self, kind: Tensor, budget: Tensor) -> Index:
        """kind uint8 `[H]`, budget int `[H, 2]` in tokens -> what the heads, each of its own kind, read.

        Raises ValueError for a kind that there is not."""
        kinds = sorted(set(kind.tolist()))
        if kinds[0] < 0 or kinds[-1] >= len(KINDS):
            raise ValueError(f"heads are of the kinds {kinds}; there are 0 to {len(KINDS) - 1}: {', '.join(KINDS)}")
        parts: list[tuple[list[int], Index]] = []
        for one in kinds:
            heads = (kind == one).nonzero()[:, 0]
            at = heads.to(self.device)
            index = self.index(one, budget.to(self.device)[at], at)
            parts.append((heads.tolist(), Index(*(field.expand(self.batch, *field.shape[1:]) for field in index))))
        return stack(parts)

    def _vertical_slash(self, vertical: Tensor, slash: Tensor, columns: Tensor, bands: Tensor) -> Index:
        """As MInference, with three differences. Of diagonals whole bands are chosen, by what a band holds, as one
        that is chosen by itself costs a band all the same; the two nearest always, so that the first rows of a block
        see their neighbours too. Keys that the last rows see in the bands nearest to them are no columns, however much
        they are looked at: it says nothing of the rows before. And what columns explain of a diagonal does not speak
        for it."""
        bands = bands.clamp(max=-(-self.keys // BLOCK))
        far = self._beyond(vertical, _first(_tiles(slash), bands))
        tiles = _tiles((slash - spread(far * _first(far, columns))).clamp(min=0))
        slash = slash.new_full(slash.shape, -1.0)
        slash[..., ::BLOCK] = tiles
        return vertical_slash_index(self._beyond(vertical, _first(tiles, bands)), slash, columns, bands, self.rows)

    def _beyond(self, vertical: Tensor, tiles: Tensor) -> Tensor:
        """vertical `[B, h, S]` without the keys that the last rows see in those of the bands, bool `[B, h, C]`, that
        follow each other from the nearest on."""
        near = BLOCK * tiles.long().cumprod(-1).sum(-1, keepdim=True)
        return vertical.masked_fill(torch.arange(self.keys, device=self.device) >= self.keys - near, 0.0)


def _tiles(slash: Tensor) -> Tensor:
    """slash `[..., S]` -> `[..., C]`: what bands are ranked by, the two nearest before all others."""
    mass = band_mass(slash)
    mass[..., :2] = torch.inf
    return mass


def _first(scores: Tensor, count: Tensor) -> Tensor:
    """scores `[B, H, N]`, count int `[H]` -> bool `[B, H, N]`: the greatest so many, of equal ones the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, (rank < count[:, None]).expand_as(order))


def spread(vertical: Tensor) -> Tensor:
    """vertical `[..., S]`, mean probabilities of keys -> `[..., S]`: what they add to each distance if all of the last
    64 rows look at them alike."""
    nearest = F.pad(vertical.flip(-1), (0, BLOCK)).cumsum(-1, dtype=torch.float64)  # by distance from the last row
    return ((nearest[..., BLOCK - 1 : -1] - F.pad(nearest[..., : -BLOCK - 1], (1, 0))) / BLOCK).to(vertical.dtype)


def band_mass(slash: Tensor) -> Tensor:
    """slash `[..., S]`, the probability of each distance -> `[..., C]`: what a band of 64 keys, `64 m` before a block
    of 64 rows, holds of it.

    Distance `64 m + e` lies in the band in `64 - |e|` of the 64 rows."""
    blocks = F.pad(slash, (0, -slash.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    later = torch.arange(BLOCK, device=slash.device) / BLOCK
    mass = (blocks * (1 - later)).sum(-1)
    mass[..., 1:] += (blocks * later).sum(-1)[..., :-1]
    return mass


def prefill_index(
    kind: Tensor,
    budget: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    adaptive: tuple[float, float] | None = None,
) -> Index:
    """What each head reads of a prompt: the index that `attention_sparse` takes.

    kind uint8 `[H]`, budget int `[H, 2]` in tokens (see `budget_at`), query `[B, H, T, D]` of the last `T` tokens, key
    `[B, Hkv, S, D]`. Dense heads read every block. With `adaptive`, FlexPrefill's gamma and tau, the prompt itself
    sets the budget of all other heads, of whatever kind. Raises ValueError for a kind that there is not.
    """
    if adaptive is None or not bool((kind != DENSE).any()):
        return Estimate.of(query, key, scaling=scaling, kinds=set(kind.tolist())).mixed(kind, budget)
    gamma, tau = adaptive
    index = adaptive_index(query, key, scaling=scaling, gamma=gamma, tau=tau, min_budget=ADAPTIVE_FLOOR)
    dense = (kind == DENSE).nonzero()[:, 0]
    others = (kind != DENSE).nonzero()[:, 0]
    parts = [(others.tolist(), Index(*(field[:, others.to(field.device)] for field in index)))]
    if len(dense):
        whole = Estimate.of(query, key, scaling=scaling, kinds={DENSE}).mixed(kind[dense], budget[dense])
        parts.append((dense.tolist(), whole))
    return stack(parts)


def dense_cost(rows: int, keys: int) -> int:
    """Query-key products of a dense causal head, in blocks of 64, as `cost` counts those of an index."""
    one = torch.tensor([keys])
    return int(cost(streaming_index(one * 0, one, rows, keys), rows))
