"""Causal attention to chosen ranges of 64 keys and single keys, chosen for every head and every 64 query rows."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # query rows that share an index, and the width of a range of keys
AT_ONCE = 1 << 22  # numbers in a temporary tensor


def attention_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_count: Tensor,
    block_offset: Tensor,
    column_count: Tensor,
    column_index: Tensor,
    *,
    scaling: float,
) -> Tensor:
    """query `[B, H, T, D]`, key `[B, Hkv, S, D]`, value `[B, Hkv, S, Dv]` and an index -> `[B, H, T, Dv]`.

    The index, int32, for `R = ceil(T / 64)` blocks of query rows: block_count `[B, H, R]`, block_offset
    `[B, H, R, NB]`, column_count `[B, H, R]`, column_index `[B, H, R, NC]`. A row at position `p = S - T + t` attends
    to the keys `j <= p` in the ranges `[offset, offset + 64)` of the first `block_count` offsets and to the first
    `column_count` columns, with `softmax(scaling · q kᵀ)` in fp32; the result has the type of `query`. Query head `h`
    reads key head `h // (H / Hkv)`. What follows the counts is not read.

    The offsets of a block of rows ascend; no two ranges overlap and no column lies in one (it would count twice). The
    first range may begin before key 0 and the last end past the last key: what is outside is not there. Every row sees
    a key at least. `attention_index.py` builds indices that are so, and none of it is checked here.

    Jiang et al., MInference 1.0, section 3.2 and appendix C (the kernel of the vertical-slash pattern), for any
    alignment of queries and keys.
    Raises ValueError where the index does not fit the shapes.
    """
    batch, heads, rows, _ = query.shape
    key_heads, keys = key.shape[1:3]
    if keys < rows or heads % key_heads or block_count.shape != (batch, heads, -(-rows // BLOCK)):
        raise ValueError(
            f"attention_sparse: query {tuple(query.shape)}, key {tuple(key.shape)} and an index for"
            f" {tuple(block_count.shape)} blocks of {BLOCK} rows do not fit; build the index for these shapes"
        )
    group = heads // key_heads
    out = query.new_empty(batch, heads, rows, value.shape[-1])
    for b in range(batch):
        for h in range(heads):
            index = block_count[b, h], block_offset[b, h], column_count[b, h], column_index[b, h]
            k, v = key[b, h // group].float(), value[b, h // group].float()
            out[b, h] = _head(query[b, h].float() * scaling, k, v, *index).to(query.dtype)
    return out


def _head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_count: Tensor,
    block_offset: Tensor,
    column_count: Tensor,
    column_index: Tensor,
) -> Tensor:
    """query `[T, D]`, key `[S, D]`, value `[S, Dv]` and the index of one head -> `[T, Dv]`."""
    rows, keys = query.shape[0], key.shape[0]
    position = torch.arange(keys - rows, keys, device=query.device, dtype=torch.int32)
    out = query.new_empty(rows, value.shape[-1])
    size = max(1, AT_ONCE // (BLOCK * block_offset.shape[-1] + column_index.shape[-1] + 1))
    indices = zip(*(x.split(size) for x in (block_count, block_offset, column_count, column_index)), strict=True)
    begin = 0
    for (blocks, offsets, singles, columns), first in zip(indices, position[::BLOCK].split(size), strict=True):
        named = _named(blocks, offsets, singles, columns, keys)
        counts = (named < keys).sum(1).tolist()
        lates = (named <= first[:, None]).sum(1).tolist()  # the keys from here on are not for all rows
        for seen, count, late in zip(named, counts, lates, strict=True):
            part = slice(begin, min(begin + BLOCK, rows))
            seen, begin = seen[:count], begin + BLOCK
            logits = query[part] @ key.index_select(0, seen).T
            logits[:, late:].masked_fill_(seen[late:] > position[part, None], -torch.inf)
            out[part] = torch.softmax(logits, dim=-1) @ value.index_select(0, seen)
    return out


def _named(block_count: Tensor, block_offset: Tensor, column_count: Tensor, column_index: Tensor, keys: int) -> Tensor:
    """The keys that each block of rows names, int32 `[R, NB · 64 + NC]`, ascending, filled up with `keys`."""
    within = torch.arange(BLOCK, device=block_offset.device, dtype=torch.int32)
    ranges = block_offset[..., None] + within  # [R, NB, 64]
    meant = torch.arange(block_offset.shape[-1], device=within.device) < block_count[:, None]
    ranges = ranges.where(meant[..., None] & (ranges >= 0) & (ranges < keys), keys)
    meant = torch.arange(column_index.shape[-1], device=within.device) < column_count[:, None]
    return torch.cat([ranges.flatten(1), column_index.where(meant, keys)], 1).sort(1).values
