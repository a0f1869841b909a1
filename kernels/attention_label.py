"""The label cache of sparse decoding: of each key the few channels that rank tokens best, at 4, 8 or 16 bits.

Double Sparsity (arXiv 2408.07092) selects the tokens that a query attends to by scores over `C` channels of the keys,
kept beside the cache so that selecting reads few bytes. Here the step of a channel is one number per KV head, learned
offline: no statistic of a token is stored, and codes of different tokens compare directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

LABEL_BITS = (4, 8, 16)


def attention_label(key: Tensor, channels: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Of keys `[B, Hkv, T, D]` (after rotation) the `channels` int64 `[Hkv, C]` as labels, uint8
    `[B, Hkv, T, C · bits / 8]`; for 16 bits the numbers as they are, `[B, Hkv, T, C]` in the keys' type.

    A code is `round(key / scale)`, ties to even, within ±(2^(bits-1) - 1), plus `2^(bits-1)`; `scale` float `[Hkv, C]`
    is the step of each head and channel. At 4 bits byte `i` holds channel `i` in its low and `i + C / 2` in its high
    half. Channels whose scale is 0 get the code of 0, as does what is not a number.

    Raises ValueError for other bits, and for an odd number of channels at 4 bits.
    """
    check_labels(channels, bits)
    label = key.gather(3, channels[None, :, None].expand(*key.shape[:3], -1))
    if bits == 16:
        return label
    largest = 2 ** (bits - 1) - 1
    step = scale.float().masked_fill(scale == 0, torch.inf)[:, None]
    codes = (label.float() / step).nan_to_num_(0.0).clamp_(-largest, largest).round_()
    codes = codes.add_(largest + 1).to(torch.uint8)
    if bits == 8:
        return codes
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def check_labels(channels: Tensor, bits: int) -> None:
    """Raises ValueError for labels that do not exist."""
    if bits not in LABEL_BITS:
        raise ValueError(f"labels of {bits} bits: expected 4, 8 or 16")
    if bits == 4 and channels.shape[-1] % 2:
        raise ValueError(f"labels of 4 bits lie in pairs, {channels.shape[-1]} channels do not: take one more or less")
