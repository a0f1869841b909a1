"""Causal attention of heads that see only the first keys and the most recent ones (StreamingLLM's A shape)."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 64  # query rows taken at once: bounds the memory to [G · TILE, sink + recent + TILE] numbers


def attention_streaming(
    query: Tensor, key: Tensor, value: Tensor, sink: Tensor, recent: Tensor, *, scaling: float
) -> Tensor:
    """query `[B, H, T, D]`, key `[B, Hkv, S, D]`, value `[B, Hkv, S, Dv]` -> `[B, H, T, Dv]`.

    With sink and recent int32 `[Hkv]`, in tokens, at least 0 and 1. The queries are the last `T` of `S` tokens: row `t`
    stands at position `p = S - T + t` and attends to the keys `j <= p` with `j < sink` or `p - j < recent`, with
    `softmax(scaling · q kᵀ)` in fp32; the result has the type of `query`. `H` is a multiple of `Hkv`, and query head
    `h` reads key head `h // (H / Hkv)`. `T < S` is a later chunk of a prompt, or decoding. Keys that no row sees are
    not read.

    Xiao et al., Efficient Streaming Language Models with Attention Sinks, section 3.2; per KV head as in DuoAttention.
    Raises ValueError for a head whose `recent` is below 1: its rows would see nothing.
    """
    batch, heads, rows, _ = query.shape
    key_heads, keys = key.shape[1:3]
    if keys < rows or heads % key_heads:
        raise ValueError(
            f"attention_streaming: {rows} queries of {heads} heads on {keys} keys of {key_heads} heads: the queries"
            " must be the last of the keys' tokens, and their heads a multiple of the keys'"
        )
    sinks, window = sink.tolist(), recent.tolist()
    if min(window) < 1:
        raise ValueError(f"attention_streaming: recent is {window}; a head needs at least 1 recent token, its own")
    group = heads // key_heads
    out = query.new_empty(batch, heads, rows, value.shape[-1])
    for b in range(batch):
        for h in range(key_heads):
            mine = slice(h * group, (h + 1) * group)
            k, v = key[b, h].float(), value[b, h].float()
            for first in range(0, rows, TILE):
                part = slice(first, min(first + TILE, rows))
                q = query[b, mine, part].float() * scaling  # [G, t, D]
                out[b, mine, part] = _tile(q, k, v, keys - rows + first, sinks[h], window[h]).to(query.dtype)
    return out


def _tile(query: Tensor, key: Tensor, value: Tensor, begin: int, sink: int, recent: int) -> Tensor:
    """Rows `[G, t, D]` at the positions from `begin`, keys `[S, D]`, values `[S, Dv]` -> `[G, t, Dv]`."""
    group, rows, _ = query.shape
    end = begin + rows
    left = max(begin - recent + 1, 0)  # the first key of the window of the first row
    before = min(sink, left)
    columns = torch.cat([torch.arange(before), torch.arange(left, end)]).int().to(query.device)
    if before:
        key, value = (torch.cat([x[:before], x[left:end]]) for x in (key, value))
    else:
        key, value = key[left:end], value[left:end]
    logits = (query.reshape(group * rows, -1) @ key.T).view(group, rows, -1)
    position = torch.arange(begin, end, device=query.device, dtype=torch.int32)[:, None]
    # what all rows see lies between the keys that the last row has lost and those that the first row has yet to see
    for edge in (slice(before, before + max(end - recent - left, 0)), slice(before + begin - left, None)):
        distance = position - columns[edge]
        hidden = (distance < 0) | ((distance >= recent) & (columns[edge] >= sink))
        logits[..., edge].masked_fill_(hidden, -torch.inf)
    return torch.softmax(logits, dim=-1) @ value
