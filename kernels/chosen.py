"""The tokens that a decoding step attends to: the first, the last, and those with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor


def chosen(score: Tensor, *, tokens: int, sink: int, recent: int) -> Tensor:
    """The tokens to attend to: int32 `[B, Hkv, N]`, ascending, by `score [B, Hkv, S]`; `N = min(S, max(tokens, sink +
    recent))`.

    The first `sink` and the last `recent` tokens, the newest among them, are always in and count towards `tokens`. The
    others are those with the highest scores; of equal scores the earlier ones, and NaN is the lowest. All tokens where
    there are no more than N.

    Raises ValueError where `recent` is less than 1: the newest token has to be seen.
    """
    free, length = left_to_scores(tokens, sink, recent), score.shape[-1]
    position = torch.arange(length, dtype=torch.int32, device=score.device)
    if length <= free + sink + recent:
        return position.expand(score.shape).contiguous()
    always = torch.cat([position[:sink], position[length - recent :]]).expand(*score.shape[:2], -1)
    if free == 0:
        return always.contiguous()
    middle = highest(score[..., sink : length - recent], free) + sink
    return torch.cat([always[..., :sink], middle, always[..., sink:]], dim=-1)


def left_to_scores(tokens: int, sink: int, recent: int) -> int:
    """How many tokens the scores choose. Raises ValueError where the newest could be left out."""
    if recent < 1 or sink < 0:
        raise ValueError(f"recent={recent} and sink={sink}: a token attends to itself, so recent is 1 or more, sink 0")
    return max(tokens - sink - recent, 0)


def highest(score: Tensor, count: int) -> Tensor:
    """Where the `count` highest of each row of `score [..., S]` stand, `count < S`: int32 `[..., count]`, ascending; of
    equal ones the first. Nothing waits for a GPU."""
    score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    lowest = score.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, level = score > lowest, score == lowest
    spare = count - above.sum(-1, keepdim=True)
    kept = above | (level & (level.cumsum(-1, dtype=torch.int32) <= spare))
    nth = torch.arange(1, count + 1, dtype=torch.int32, device=score.device).expand(*score.shape[:-1], count)
    return torch.searchsorted(kept.cumsum(-1, dtype=torch.int32), nth.contiguous(), out_int32=True)
