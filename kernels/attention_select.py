"""How much each cached token matters to a query, by the labels of the keys.

Selection by a few channels of the keys is Double Sparsity (arXiv 2408.07092, section 3); its official code takes one
set of tokens per query head, which reads the keys of a KV head once per query head. Here a KV group shares one set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_label import check_labels

NUMBERS_AT_ONCE = 1 << 20  # of labels as floats: 4 MiB, which a CPU keeps in its cache


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
    tokens_at_once = max(NUMBERS_AT_ONCE // chosen_query[:, 0].numel(), 1)
    parts = [scores(chosen_query, part.flatten(0, 1), bits) for part in label.split(tokens_at_once, dim=2)]
    # the codes' offset adds the same to every score of a head, so the softmax does not see it
    return torch.cat(parts, dim=-1).softmax(-1).sum(1).view(batch, kv_heads, -1)


def scores(query: Tensor, label: Tensor, bits: int) -> Tensor:
    """`query [N, G, C]` times the codes of `label [N, S, ·]`, or its numbers: fp32 `[N, G, S]`."""
    if bits != 4:
        return query @ label.float().mT
    low, high = query.chunk(2, dim=-1)
    score = high / 16 @ label.float().mT  # a byte is low + 16 · high
    return torch.baddbmm(score, low - high / 16, (label & 15).float().mT)
