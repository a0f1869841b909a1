"""Which keys each head reads: the estimates that choose them, and the four tensors of `attention_sparse.py`.

`R = ceil(T / 64)` blocks of query rows, `C = ceil(S / 64)` blocks of keys; the queries are the last `T` of `S` tokens,
so that block `r` of rows ends before position `S - T + 64 (r + 1)`. Everything is whole tensors over batch, heads and
blocks of rows: a loop runs only over slices that bound the memory.

Vertical-slash and block-sparse heads: Jiang et al., MInference 1.0, section 3.2 and appendix C. The online budget: Lai
et al., FlexPrefill, algorithms 1 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_sparse import BLOCK

FIRST_KEYS = BLOCK  # keys at the beginning that vertical-slash and block-sparse rows always see: attention sinks
AT_ONCE = 1 << 23  # numbers in a temporary tensor


class Index(NamedTuple):
    """What `attention_sparse` takes, in its order; int32. Only `[:count]` of offsets and columns is meant."""

    block_count: Tensor  # [B, H, R]
    block_offset: Tensor  # [B, H, R, NB]
    column_count: Tensor  # [B, H, R]
    column_index: Tensor  # [B, H, R, NC]


# Estimates


def estimate_vertical_slash(query: Tensor, key: Tensor, *, scaling: float, rows: int = BLOCK) -> tuple[Tensor, Tensor]:
    """query `[B, H, T, D]`, key `[B, Hkv, S, D]` -> the attention of the last `rows` queries, summed in two ways.

    `vertical [B, H, S]` is the mean probability of each key, `slash [B, H, S]` that of each distance, nearest first;
    both sum to 1. fp32. The keys are taken in slices, twice: first the normaliser of each row, then the sums.
    """
    batch, heads, _, width = query.shape
    key_heads, keys = key.shape[1:3]
    rows = min(rows, query.shape[2])
    query = (query[:, :, -rows:].float() * scaling).reshape(batch, key_heads, -1, width)
    position = torch.arange(keys - rows, keys, device=query.device)
    size = max(BLOCK, AT_ONCE // (batch * heads * rows))

    def logits(first: int) -> Tensor:
        part = key[:, :, first : first + size].float()
        products = (query @ part.transpose(-1, -2)).view(batch, heads, rows, -1)
        columns = torch.arange(first, first + part.shape[2], device=query.device)
        return products.masked_fill_(columns > position[:, None], -torch.inf)

    total = query.new_full((batch, heads, rows), -torch.inf)
    for first in range(0, keys, size):
        total = torch.logaddexp(total, logits(first).logsumexp(-1))
    vertical, slash = (query.new_zeros(batch, heads, keys) for _ in range(2))
    for first in range(0, keys, size):
        probability = torch.exp(logits(first) - total[..., None]) / rows
        vertical[..., first : first + size] = probability.sum(-2)
        sums = _diagonals(probability)  # of distances, the smallest that of the first row to the last column
        nearest = keys - rows - first - probability.shape[-1] + 1
        skip = max(-nearest, 0)  # columns after their row: nothing to sum
        slash[..., nearest + skip : nearest + sums.shape[-1]] += sums[..., skip:]
    return vertical, slash


def _diagonals(x: Tensor) -> Tensor:
    """`[..., M, N]` -> `[..., M + N - 1]`: sums where row minus column is `1 - N`, `2 - N`, …, `M - 1`."""
    rows, columns = x.shape[-2:]
    sheared = F.pad(x.flip(-1), (0, rows)).flatten(-2)[..., :-rows]  # each row begins one place later than the last
    return sheared.unflatten(-1, (rows, columns + rows - 1)).sum(-2)


def estimate_blocks(query: Tensor, key: Tensor, *, scaling: float) -> Tensor:
    """query `[B, H, T, D]`, key `[B, Hkv, S, D]` -> `[B, H, R, C]`: scaled products of the blocks' means, fp32.

    The last block is averaged over the tokens that it has. Blocks of keys that no row of a block may see are `-inf`.
    """
    batch, heads, rows, width = query.shape
    key_heads, keys = key.shape[1:3]
    pooled = _means(query).reshape(batch, key_heads, -1, width)
    scores = (pooled * scaling) @ _means(key).transpose(-1, -2)
    scores = scores.view(batch, heads, -(-rows // BLOCK), -(-keys // BLOCK))
    return scores.masked_fill_(~_causal(rows, keys, query.device), -torch.inf)


def _means(x: Tensor) -> Tensor:
    """`[B, H, T, D]` -> `[B, H, ceil(T / 64), D]`, fp32."""
    tokens = x.shape[2]
    sums = F.pad(x, (0, 0, 0, -tokens % BLOCK)).unflatten(2, (-1, BLOCK)).sum(3, dtype=torch.float32)
    return sums / _block_sizes(tokens, x.device)[:, None]


def _block_sizes(tokens: int, device: torch.device) -> Tensor:
    """How many of the tokens lie in each block of 64, `[ceil(T / 64)]`."""
    return (tokens - BLOCK * torch.arange(-(-tokens // BLOCK), device=device)).clamp(max=BLOCK)


# Vertical-slash and A-shaped heads: bands along the diagonal, and columns


def vertical_slash_index(
    vertical: Tensor, slash: Tensor, vertical_budget: Tensor, slash_budget: Tensor, rows: int
) -> Index:
    """vertical and slash `[B, H, S]`, budgets int `[H]` in tokens, `rows = T` -> the best columns and distances.

    The columns with the greatest sums, among them always the first 64, and the distances with the greatest sums, among
    them always 0; of equal ones the earlier column and the nearer distance. A distance `s` becomes, for each block of
    rows, the 64 keys that lie `s` before its rows, so that every token pair asked for is seen and others as well:
    ranges that would overlap follow each other without a gap instead.
    """
    columns = _best(vertical, vertical_budget, FIRST_KEYS)
    return _bands_and_columns(_cover(_best(slash, slash_budget, 1)), columns, rows)


def streaming_index(sink: Tensor, recent: Tensor, rows: int, keys: int, batch: int = 1) -> Index:
    """sink and recent int `[H]`, per query head, `rows = T`, `keys = S` -> an A-shaped head, `B = batch`.

    The sinks are exact; the window is rounded outwards to whole ranges, so that a row sees up to 126 keys more than
    `attention_streaming` shows it. `recent = S` is a dense head. Raises ValueError where `recent` is below 1.
    """
    if int(recent.min()) < 1:
        raise ValueError(f"recent is {recent.tolist()}; a head needs at least 1 recent token, its own")
    device = recent.device
    starts = torch.arange(keys + BLOCK, device=device)
    ranges = (recent.long().clamp(max=keys) + 2 * BLOCK - 2) // BLOCK  # the first of 64 rows sees 63 keys less of them
    starts = (starts % BLOCK == 0) & (starts < BLOCK * ranges[:, None])
    columns = torch.arange(keys, device=device) < sink[:, None]
    return _bands_and_columns(starts.expand(batch, -1, -1), columns.expand(batch, -1, -1), rows)


def _best(scores: Tensor, budget: Tensor, always: int) -> Tensor:
    """bool like scores `[B, H, N]`: the `budget [H]` greatest, of equal ones the first; the first `always` anyway."""
    scores = scores.clone()
    scores[..., :always] = torch.inf
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device)
    kept = rank < budget.to(scores.device).clamp(min=always)[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, kept.expand_as(order))


def _cover(distances: Tensor) -> Tensor:
    """bool `[B, H, S]`, the distances wanted, 0 among them -> bool `[B, H, S + 64]`: where ranges of 64 begin.

    Counted backwards from the end of a block of rows, distance `s` needs the keys `s + 1` to `s + 64`. The ranges are
    placed from the nearest on: the next one begins at the next distance wanted, or, if that would overlap, right after
    the last one. They are the same for each block of rows. The walk along them is taken in strides that double.
    """
    length = distances.shape[-1] + BLOCK  # also the place of those that have no next one
    place = torch.arange(length, device=distances.device)
    wanted = torch.where(F.pad(distances, (0, BLOCK)), place, length)
    later = wanted.flip(-1).cummin(-1).values.flip(-1)  # the first distance wanted from each place on
    later = F.pad(later[..., 1:], (0, 2), value=length)  # … after each place
    place = torch.arange(length + 1, device=distances.device)
    jump = torch.where(later < length, torch.maximum(later, place + BLOCK), length)
    begins = torch.zeros_like(later, dtype=torch.bool)
    begins[..., 0] = True
    for _ in range(math.ceil(math.log2(length / BLOCK + 1)) + 1):
        begins.scatter_(-1, torch.where(begins, jump, length), True)
        jump = jump.gather(-1, jump)
    return begins[..., :-1]


def _bands_and_columns(starts: Tensor, columns: Tensor, rows: int) -> Index:
    """Where ranges begin, counted backwards, bool `[B, H, S + 64]`, and the columns, bool `[B, H, S]` -> the index.

    Columns that lie in a range, or after all rows of a block, are left out of that block.
    """
    batch, heads, keys = columns.shape
    start, column = _packed(starts).contiguous(), _packed(columns)  # [B, H, NB], [B, H, NC]
    so_far = F.pad(starts.cumsum(-1, dtype=torch.int32), (BLOCK, 0))
    covered = F.pad(so_far[..., BLOCK:] > so_far[..., :-BLOCK], (1, 0))  # by distance from the end of the rows
    ends = _ends(rows, keys, columns.device)
    blocks = torch.searchsorted(start, ends.expand(batch, heads, -1).contiguous())
    offsets, counts, indices = [], [], []
    for part, count in _slices(ends, blocks, batch * heads * (start.shape[-1] + column.shape[-1])):
        nearest = count[..., None] - 1 - torch.arange(start.shape[-1], device=columns.device)  # offsets ascend
        chosen = start[:, :, None].expand(nearest.shape).gather(-1, nearest.clamp(min=0))
        offsets.append((part[:, None] - BLOCK - chosen).where(nearest >= 0, 0).int())
        distance = part[:, None] - column[:, :, None]  # [B, H, r, NC]
        reach = distance.clamp(0, covered.shape[-1] - 1)
        seen = covered[:, :, None].expand(*reach.shape[:3], -1).gather(-1, reach)
        # what fills `column` up lies at key S: after the last row, whose block it may still be before
        keep = (distance > 0) & (column[:, :, None] < keys) & ~seen
        counts.append(keep.sum(-1, dtype=torch.int32))
        indices.append(_left(keep, column[:, :, None].expand(keep.shape)).int())
    return Index(blocks.int(), torch.cat(offsets, 2), torch.cat(counts, 2), torch.cat(indices, 2))


def _packed(kept: Tensor) -> Tensor:
    """bool `[..., N]` -> the places that are kept, ascending, int64 `[..., greatest count]`, filled up with `N`."""
    places = torch.arange(kept.shape[-1], device=kept.device).expand(kept.shape)
    most = int(kept.sum(-1).max()) if kept.numel() else 0
    return _left(kept, places, most, kept.shape[-1])


def _left(kept: Tensor, values: Tensor, most: int | None = None, filler: int = 0) -> Tensor:
    """The values `[..., N]` that are kept, moved to the left: `[..., most]`, filled up with the filler."""
    most = kept.shape[-1] if most is None else most
    target = torch.where(kept, kept.cumsum(-1) - 1, most)
    out = values.new_full((*kept.shape[:-1], most + 1), filler)
    return out.scatter_(-1, target, values)[..., :most]


def _slices(ends: Tensor, blocks: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows, so many at a time that `width` numbers for each fit in a temporary tensor."""
    size = max(1, AT_ONCE // max(width, 1))
    return zip(ends.split(size), blocks.split(size, dim=2), strict=True)


def _ends(rows: int, keys: int, device: torch.device) -> Tensor:
    """The position after the last of each block of rows, int64 `[R]`; the last block is counted as if it were full."""
    return keys - rows + BLOCK * torch.arange(1, -(-rows // BLOCK) + 1, device=device)


# Block-sparse heads


def block_index(scores: Tensor, budget: Tensor, rows: int, keys: int) -> Index:
    """scores `[B, H, R, C]`, budget int `[H]` in blocks of keys -> the best blocks of each block of rows.

    The first block and those on the diagonal, two where queries and keys are not aligned, are always among them; of
    equal ones the earlier.
    """
    causal, always = _causal(rows, keys, scores.device), _always(rows, keys, scores.device)
    least = always.sum(-1)  # [R]
    wanted = torch.maximum(budget.to(scores.device)[:, None], least)[..., None]  # [H, R, 1]
    rank = torch.arange(scores.shape[-1], device=scores.device)
    kept = torch.empty_like(scores, dtype=torch.bool)
    size = max(1, AT_ONCE // max(scores[:, :, 0].numel(), 1))
    for first in range(0, scores.shape[2], size):
        part = slice(first, first + size)
        best = scores[:, :, part].masked_fill(always[part], torch.inf).masked_fill(~causal[part], -torch.inf)
        order = best.sort(dim=-1, descending=True, stable=True).indices
        kept[:, :, part].scatter_(-1, order, (rank < wanted[:, part]).expand_as(order))
    return _blocks(kept & causal)


def _blocks(kept: Tensor) -> Index:
    """bool `[B, H, R, C]` -> the index that reads these blocks of keys and no columns."""
    count = kept.sum(-1, dtype=torch.int32)
    most = int(count.max()) if count.numel() else 0
    size = max(1, AT_ONCE // max(kept[:, :, 0].numel(), 1))
    places = torch.arange(0, BLOCK * kept.shape[-1], BLOCK, device=kept.device)
    offsets = [_left(part, places.expand(part.shape), most).int() for part in kept.split(size, dim=2)]
    return Index(count, torch.cat(offsets, 2), torch.zeros_like(count), count.new_zeros(*count.shape, 0))


def _causal(rows: int, keys: int, device: torch.device) -> Tensor:
    """bool `[R, C]`: blocks of keys that some row of a block may see."""
    first = BLOCK * torch.arange(-(-keys // BLOCK), device=device)
    return first < _ends(rows, keys, device)[:, None].clamp(max=keys)


def _always(rows: int, keys: int, device: torch.device) -> Tensor:
    """bool `[R, C]`: the first block of keys, and those in which rows of the block stand themselves."""
    first = BLOCK * torch.arange(-(-keys // BLOCK), device=device)
    begin = _ends(rows, keys, device)[:, None] - BLOCK
    return _causal(rows, keys, device) & ((first == 0) | (first + BLOCK > begin))


# The budget that each prompt sets itself


def adaptive_index(
    query: Tensor, key: Tensor, *, scaling: float, gamma: float = 0.9, tau: float = 0.1, min_budget: int = 1024
) -> Index:
    """query `[B, H, T, D]`, key `[B, Hkv, S, D]` -> for each head the blocks that hold `gamma` of its attention.

    FlexPrefill: where the pooled keys predict how the last 64 rows attend, to a Jensen-Shannon distance below `tau`,
    the blocks are chosen for each block of rows from pooled queries and keys (query-aware heads), else as columns and
    diagonals from the last rows. `min_budget`, in tokens, is the least for columns, for diagonals and for a row.

    Against the official code: blocks of 64 throughout; a diagonal that straddles two blocks keeps both; a query-aware
    choice that misses `gamma` on the last rows is replaced by columns and diagonals. The blocks therefore hold at least
    `gamma` of the attention of the last 64 rows, of every head.
    """
    rows, keys = query.shape[2], key.shape[2]
    vertical, slash = (_pooled(x) for x in estimate_vertical_slash(query, key, scaling=scaling))  # [B, H, C]
    least = -(-min_budget // BLOCK)
    kept = _grid(_heaviest(vertical, gamma, least), _heaviest(slash, gamma, least), rows, keys)
    aware = _divergence(vertical, query, key, scaling) < tau
    if aware.any():
        b, h = aware.nonzero(as_tuple=True)
        pooled = estimate_blocks(query[b, h][None], key[b, h * key.shape[1] // query.shape[1]][None], scaling=scaling)
        chosen = _heaviest(torch.softmax(pooled, -1).flatten(2), gamma, 1).view_as(pooled)
        floor = _heaviest(pooled, 0.0, least) & _causal(rows, keys, query.device)
        chosen = (chosen | floor | _always(rows, keys, query.device))[0]  # [n, R, C]
        last = chosen[:, -1 if rows % BLOCK == 0 else -2 :].all(1)  # the last 64 rows may lie in two blocks
        enough = (vertical[b, h] * last).sum(-1) >= gamma
        kept[b[enough], h[enough]] = chosen[enough]
    return _blocks(kept)


def _pooled(x: Tensor) -> Tensor:
    """`[B, H, S]` -> sums over blocks of 64, `[B, H, C]`."""
    return F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)


def _heaviest(mass: Tensor, share: float, least: int) -> Tensor:
    """bool like mass `[..., N]`: the fewest entries that hold the share of the sum, at least `least` of them."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    if share > 0:
        before = ordered.double().cumsum(-1)
        before = F.pad(before[..., :-1], (1, 0)) < share * before[..., -1:]  # entries that are not superfluous
    else:
        before = torch.zeros_like(ordered, dtype=torch.bool)
    before |= torch.arange(mass.shape[-1], device=mass.device) < least
    return torch.zeros_like(before).scatter_(-1, order, before)


def _grid(columns: Tensor, diagonals: Tensor, rows: int, keys: int) -> Tensor:
    """Blocks of keys and of distances, bool `[B, H, C]` each -> the blocks `[B, H, R, C]` that hold any of both."""
    device = columns.device
    so_far = F.pad(diagonals.cumsum(-1), (1, 0))
    row = torch.arange(-(-rows // BLOCK), device=device)[:, None]
    apart = keys - rows + BLOCK * (row - torch.arange(columns.shape[-1], device=device))  # [R, C], from first to first
    near = (apart - BLOCK + 1).clamp(min=0) // BLOCK
    far = (apart + BLOCK - 1).clamp(min=0, max=keys - 1) // BLOCK
    kept = (so_far[..., far + 1] > so_far[..., near]) | columns[..., None, :]
    return kept & _causal(rows, keys, device) | _always(rows, keys, device)


def _divergence(vertical: Tensor, query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """`[B, H]`: the Jensen-Shannon distance, in nats to the power ½, of the last rows' attention to the pooled one."""
    last = query[:, :, -BLOCK:].float().mean(2, keepdim=True) * scaling
    batch, heads, _, width = last.shape
    pooled = last.view(batch, key.shape[1], -1, width) @ _means(key).transpose(-1, -2)
    predicted = torch.softmax(pooled.view(batch, heads, -1), -1)
    halves = (torch.special.entr(predicted).sum(-1) + torch.special.entr(vertical).sum(-1)) / 2  # 0 log 0 is 0
    return (torch.special.entr((predicted + vertical) / 2).sum(-1) - halves).clamp(min=0).sqrt()


# Indices of several heads


def stack(parts: Sequence[tuple[Sequence[int], Index]]) -> Index:
    """Pairs of heads and the index of these heads -> one index of all heads, for one launch.

    Raises ValueError unless the parts' heads are 0, 1, …, H - 1, each once.
    """
    heads = [head for numbers, _ in parts for head in numbers]
    if sorted(heads) != list(range(len(heads))) or any(len(n) != index.block_count.shape[1] for n, index in parts):
        raise ValueError(f"the parts of an index are for the heads {heads}; each head must come once, from 0 on")
    order = sorted(range(len(heads)), key=heads.__getitem__)
    fields = []
    for field in zip(*(index for _, index in parts), strict=True):
        widths = [max(t.shape[-1] for t in field) - t.shape[-1] if t.dim() == 4 else 0 for t in field]
        fields.append(torch.cat([F.pad(t, (0, w)) for t, w in zip(field, widths, strict=True)], 1)[:, order])
    return Index(*fields)


def cost(index: Index, rows: int) -> Tensor:
    """Query-key products of each head for `rows = T`, int64 `[B, H]`: what is computed, seen by a row or not.

    A dense head, in blocks, is `cost(streaming_index(sink, S, T, S), T)`.
    """
    each = BLOCK * index.block_count.long() + index.column_count
    return (each * _block_sizes(rows, each.device)).sum(-1)
