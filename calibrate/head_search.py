"""What patterns lose: their recall and output error at sampled rows, and the assignment that loses least at a cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import coo_array
from torch import Tensor

from ..formats.patterns import BLOCK, BLOCKS, DENSE, STREAMING, VERTICAL_SLASH
from ..kernels.attention_index import Index
from .base import causal_scores
from .program import milp

ROW_BLOCKS = 8  # blocks of rows that are scored of a prompt, evenly spaced; those with answers besides
STRIDE = 4  # of a block's rows every so many are scored: neighbours lose alike
SPLITS = (1 / 8, 1 / 2, 7 / 8)  # of a vertical-slash budget, the share of columns
AT_ONCE = 1 << 24  # numbers in a temporary tensor
GAP = 1e-3  # how near to the best an assignment has to be proved, relative
SECONDS = 60.0  # for proving it


def candidates(levels: int) -> tuple[Tensor, Tensor]:
    """kind uint8 `[K]` and budget `[K, 2]`, as shares of the context: dense, then each kind at about equal costs.

    A level keeps 1/2, 1/4, … of the context per row: as a window, as keys of chosen blocks, as columns and bands."""
    found = [(DENSE, (1.0, 1.0))]
    for level in range(1, levels + 1):
        share = 0.5**level
        found.append((STREAMING, (0.0, share)))
        found += [(VERTICAL_SLASH, (share * part, share * (1 - part))) for part in SPLITS]
        found.append((BLOCKS, (share, 0.0)))
    kind, budget = zip(*found, strict=True)
    return torch.tensor(kind, dtype=torch.uint8), torch.tensor(budget)


def scored_blocks(tokens: int, asked: Sequence[tuple[int, int]] = ()) -> list[int]:
    """Which blocks of 64 rows are scored: some of those before the last 64 rows, which patterns are estimated from.

    Evenly spaced, the last of them included; and those that predict the tokens of the spans `asked`."""
    whole = (tokens - BLOCK) // BLOCK
    step = max(1, -(-whole // ROW_BLOCKS))
    answers = {(at - 1) // BLOCK for start, stop in asked for at in range(start, stop)}
    return sorted({*range(whole - 1, -1, -step), *(block for block in answers if 0 <= block < whole)})


def coverage(index: Index, blocks: Sequence[int], keys: int) -> Tensor:
    """What rows of these blocks may see besides causality: bool `[H, len(blocks), S]`, of an index with `B = 1`."""
    block_count, block_offset, column_count, column_index = (field[0][:, list(blocks)] for field in index)
    device = block_offset.device
    given = torch.arange(block_offset.shape[-1], device=device) < block_count[..., None]
    places = block_offset[..., None] + torch.arange(BLOCK, device=device)  # [H, r, NB, 64]
    places = torch.where(given[..., None] & (places >= 0) & (places < keys), places, keys).flatten(2)
    given = torch.arange(column_index.shape[-1], device=device) < column_count[..., None]
    places = torch.cat([places, torch.where(given, column_index, keys)], -1).long()
    seen = torch.zeros(*places.shape[:2], keys + 1, dtype=torch.bool, device=device)
    return seen.scatter_(-1, places, True)[..., :keys]


def score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Sequence[Index],
    *,
    scaling: float,
    projection: Tensor | None,
    blocks: Sequence[int],
    stride: int = STRIDE,
) -> tuple[Tensor, Tensor]:
    """query `[H, T, D]`, key `[Hkv, T, D]`, value `[Hkv, T, Dv]`, K indices for all heads -> what each head loses.

    `recall [H, K]` is the attention that is kept, `error [H, K]` what the sparse output of one head is off by,
    `‖W_h (o_sparse - o_dense)‖² / ‖W o_dense‖²` with the head's part of `projection [hidden, H * Dv]` (of the layer's
    output; the values themselves where it is None). fp64 means over every `stride`-th row of `blocks`.
    The dense attention of a tile of rows is computed once and reused; nothing of `[T, T]` is ever held.
    """
    heads, tokens = query.shape[:2]
    width = value.shape[-1]
    seen = torch.stack([coverage(index, blocks, tokens) for index in indices], 1)  # [H, K, r, T]
    weight = None if projection is None else projection.float()
    gram = None if weight is None else _grams(weight, heads)  # [H, Dv, Dv]
    lost = query.new_zeros(2, heads, len(indices), dtype=torch.float64)
    count = 0
    for at, block in enumerate(blocks):
        rows = torch.arange(BLOCK * block + stride - 1, min(BLOCK * (block + 1), tokens), stride, device=query.device)
        end = int(rows[-1]) + 1
        probability = causal_scores(query[:, rows], key[:, :end], rows, scaling).softmax(-1)  # [H, t, end]
        dense = _mix(probability[:, None], value[:, :end])[:, 0]  # [H, t, Dv]
        whole = dense.transpose(0, 1).reshape(len(rows), heads * width)
        size = (whole if weight is None else whole @ weight.T).square().sum(-1)  # [t]
        for part in _parts(len(indices), probability.numel()):
            kept = probability[:, None] * seen[:, part, at, None, :end]  # [H, k, t, end]
            held = kept.sum(-1)  # [H, k, t]
            delta = _mix(kept, value[:, :end]) / held[..., None].clamp(min=1e-30) - dense[:, None]
            squares = delta if gram is None else delta @ gram[:, None]
            error = (squares * delta).sum(-1).clamp(min=0) / size.clamp(min=1e-30)
            lost[0, :, part] += held.sum(-1, dtype=torch.float64)
            lost[1, :, part] += error.sum(-1, dtype=torch.float64)
        count += len(rows)
    recall, error = lost / count
    return recall, error


def _parts(total: int, width: int) -> list[slice]:
    size = max(1, AT_ONCE // width)
    return [slice(start, start + size) for start in range(0, total, size)]


def _grams(weight: Tensor, heads: int) -> Tensor:
    """weight `[hidden, H * Dv]` -> `[H, Dv, Dv]`, by which a head's output is as long as the projection makes it."""
    slices = weight.unflatten(-1, (heads, -1)).transpose(0, 1)  # [H, hidden, Dv]
    return slices.transpose(1, 2) @ slices


def _mix(probability: Tensor, value: Tensor) -> Tensor:
    """probability `[H, k, t, n]`, value `[Hkv, n, Dv]` -> `[H, k, t, Dv]`."""
    grouped = probability.reshape(len(value), -1, value.shape[1])
    return (grouped @ value.float()).view(*probability.shape[:3], -1)


def least_cost(kind: Tensor, cost: Tensor, allowed: Tensor) -> Tensor:
    """kind `[K]`, cost and allowed `[n, K, N]` -> `[N]`: the mean cost of the cheapest assignment of kinds."""
    cheapest = [
        cost.masked_fill(~(allowed & (kind == one)[:, None]), torch.inf).amin(1) for one in kind.unique().tolist()
    ]  # of each kind, [n, N]
    best = torch.stack(cheapest).sum(-1).argmin(0)
    return torch.stack(cheapest)[best, torch.arange(len(best))].mean(0)


def assign(kind: Tensor, loss: Tensor, cost: Tensor, allowed: Tensor, limit: Tensor) -> Tensor:
    """Which candidate each head gets at each length, `[n, N]`: the least sum of losses, proved by one integer program.

    Of `K` candidates of kinds `[K]`, for `n` heads and `N` lengths: loss, cost and allowed `[n, K, N]`. A head is of
    one kind at all lengths; its cost is on average at most `limit [N]`. Raises ValueError when that cannot be, and
    when the solver (HiGHS) finds no assignment in time.
    """
    heads, lengths = len(loss), loss.shape[2]
    if bool((least_cost(kind, cost, allowed) > limit).any()):
        raise ValueError(f"no assignment of kinds costs as little as {limit.tolist()}; allow a greater cost")
    h, k, b = (allowed & ~_dominated(kind, loss, cost, allowed)).nonzero(as_tuple=True)
    values = loss.double()[h, k, b].numpy()
    kinds, of_kind = kind.unique(return_inverse=True)
    h, k, b, of_kind = (x.numpy() for x in (h, k, b, of_kind))
    made, own = len(h), heads * len(kinds)
    # each kind of a head takes one candidate per length, or none: as many as the head is of that kind
    rows = (h * len(kinds) + of_kind[k]) * lengths + b
    owner = np.repeat(np.arange(own), lengths)
    same = coo_array(
        (
            np.concatenate([np.ones(made), -np.ones(own * lengths)]),
            (np.concatenate([rows, np.arange(own * lengths)]), np.concatenate([np.arange(made), made + owner])),
        ),
        shape=(own * lengths, made + own),
    )
    single = (np.ones(own), (np.repeat(np.arange(heads), len(kinds)), made + np.arange(own)))
    costs = (cost.double()[h, k, b].numpy() / limit.double().numpy()[b] / heads, (b, np.arange(made)))
    scale = values.max() or 1.0
    found = milp(
        np.concatenate([values / scale, np.zeros(own)]),
        integrality=np.ones(made + own),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(same.tocsr(), 0, 0),
            LinearConstraint(coo_array(single, shape=(heads, made + own)).tocsr(), 1, 1),
            LinearConstraint(coo_array(costs, shape=(lengths, made + own)).tocsr(), -np.inf, 1),
        ],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS, "presolve": False},
    )
    if found.x is None:
        raise ValueError(f"no assignment was found within {SECONDS:.0f} seconds ({found.message}); try fewer levels")
    chosen = found.x[:made] > 0.5
    choice = torch.zeros(heads, lengths, dtype=torch.long)
    choice[torch.from_numpy(h[chosen]), torch.from_numpy(b[chosen])] = torch.from_numpy(k[chosen])
    return choice


def choose(kind: Tensor, loss: Tensor, cost: Tensor, allowed: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Which candidate each head gets at each length, `[n, N]`, at the mean cost `share`; and the least cost at each
    length `[N]`, which is the limit where it is more than that. Shapes and errors as of `assign`.

    Kinds are those that lose least at the greatest length, for which sparse attention is meant: in short prompts the
    least budgets of some kinds cost much, and to keep to the limit there would take those kinds away from all prompts
    (measured on SmolLM2-135M: 0.905 instead of 0.957 of the attention kept at 4096 tokens).
    """
    slack = 1 + 1e-6
    everywhere = [(allowed & (kind == one)[:, None]).any(1).all(-1) for one in kind.tolist()]  # of each kind, [n]
    possible = allowed & torch.stack(everywhere, 1)[..., None]
    last = slice(-1, None)
    longest = loss[..., last], cost[..., last], possible[..., last]
    limit = least_cost(kind, longest[1], longest[2]).mul(slack).clamp(min=share)
    best = assign(kind, *longest, limit)  # [n, 1]
    allowed = allowed & (kind == kind[best])[..., None]
    least = least_cost(kind, cost, allowed)
    return assign(kind, loss, cost, allowed, least.mul(slack).clamp(min=share)), least


def _dominated(kind: Tensor, loss: Tensor, cost: Tensor, allowed: Tensor) -> Tensor:
    """bool `[n, K, N]`: where another candidate of the kind loses no more and costs no more (of equals, the first)."""
    found = torch.zeros_like(allowed)
    for one in range(len(kind)):
        for other in (kind == kind[one]).nonzero()[:, 0].tolist():
            if other == one:
                continue
            no_worse = (loss[:, other] <= loss[:, one]) & (cost[:, other] <= cost[:, one]) & allowed[:, other]
            equal = (loss[:, other] == loss[:, one]) & (cost[:, other] == cost[:, one])
            found[:, one] |= no_worse & (~equal if other > one else True)
    return found


def margins(kind: Tensor, loss: Tensor, cost: Tensor, allowed: Tensor, choice: Tensor) -> Tensor:
    """`[n]`: how much more a head would lose, over all lengths, as the best of the other kinds at no greater cost.

    Where such a kind has nothing so cheap, its cheapest counts; dense is compared with nothing."""
    heads, _, lengths = loss.shape
    at = (torch.arange(heads)[:, None], choice, torch.arange(lengths))
    own, price = loss[at], cost[at]
    best = torch.full((heads,), torch.inf, dtype=loss.dtype)
    for one in kind.unique().tolist():
        if one == DENSE:
            continue
        mine = allowed & (kind == one)[:, None]
        cheap = loss.masked_fill(~mine | (cost > price[:, None] + 1e-9), torch.inf).amin(1)
        cheapest = loss.gather(1, cost.masked_fill(~mine, torch.inf).argmin(1, keepdim=True))[:, 0]
        other = torch.where(cheap.isfinite(), cheap, cheapest).sum(-1)
        best = torch.where((kind[choice[:, 0]] != one) & (other < best), other, best)
    return torch.where(best.isfinite(), best - own.sum(-1), 0.0)
