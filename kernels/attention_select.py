"""How much each cached token matters to a query, by the labels of the keys, and the tokens that matter most.

Selection by a few channels of the keys is Double Sparsity (arXiv 2408.07092, section 3); its official code takes one
set of tokens per query head, which reads the keys of a KV head once per query head. Here a KV group shares one set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_label import check_labels


def attention_select(
    query: Tensor, label: Tensor, channels: Tensor, scale: Tensor, *, bits: int, scaling: float
) -> Tensor:
    """What part of its group's attention each cached token takes, by its label: float32 `[B, Hkv, S]`.

    `query [B, H, D]` of the newest token, `label [B, Hkv, S, ·]` as `attention_label` makes it from `channels` int64
    `[Hkv, C]`, `scale` float `[Hkv, C]` and `bits`. A query head `h` expects the score `s_h = scaling · q_C · k_C`.

    The score of a token is `sum over the group of softmax(s_h)`: the attention mass that the group's heads give it,
    `H / Hkv` over all tokens. As mass adds up over tokens, the tokens with the highest scores hold at least as much of
    the expected mass as any other set of their number, also where one head looks at few tokens and another at many.
    The best of `s_h - max s_h` over the heads does not: there a head that looks everywhere outbids all others.
    """
    check_labels(channels, bits)
    batch, kv_heads = label.shape[:2]
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1]).float() * scaling
    group = grouped.shape[2]
    chosen_query = grouped.gather(3, channels[None, :, None].expand(batch, kv_heads, group, -1))  # [B, Hkv, G, C]
    if bits != 16:
        chosen_query = chosen_query * scale[:, None].float()
    chosen_query = chosen_query.flatten(0, 1)
    if bits == 4:  # a byte is low + 16 · high
        low, high = chosen_query.chunk(2, dim=-1)
        score = high / 16 @ label.flatten(0, 1).float().mT
        score = torch.baddbmm(score, low - high / 16, (label & 15).flatten(0, 1).float().mT)
    else:
        score = chosen_query @ label.flatten(0, 1).float().mT  # [B · Hkv, G, S]
    # the codes' offset adds the same to every score of a head, so the softmax does not see it
    return score.softmax(-1).sum(1).view(batch, kv_heads, -1)


def chosen(score: Tensor, *, tokens: int, sink: int, recent: int) -> Tensor:
    """The tokens to attend to: int32 `[B, Hkv, N]`, ascending, by `score [B, Hkv, S]`; `N = min(S, max(tokens, sink +
    recent))`.

    The first `sink` and the last `recent` tokens, the newest among them, are always in and count towards `tokens`. The
    others are those with the highest scores; of equal scores the earlier ones, and NaN is the lowest. All tokens where
    there are no more than N.

    Raises ValueError where `recent` is less than 1: the newest token has to be seen.
    """
    if recent < 1 or sink < 0:
        raise ValueError(f"recent={recent} and sink={sink}: a token attends to itself, so recent is 1 or more, sink 0")
    length = score.shape[-1]
    position = torch.arange(length, dtype=torch.int32, device=score.device)
    free = max(tokens, sink + recent) - sink - recent
    if length <= free + sink + recent:
        return position.expand(score.shape).contiguous()
    always = torch.cat([position[:sink], position[length - recent :]]).expand(*score.shape[:2], -1)
    if free == 0:
        return always.contiguous()
    middle = highest(score[..., sink : length - recent], free) + sink
    return torch.cat([always[..., :sink], middle, always[..., sink:]], dim=-1)


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
