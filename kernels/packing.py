"""Codes of 2 to 8 bits in 32-bit words, so that a GPU unpacks two with one shift and one mask; and a plain bit stream.

Codes `[R, N]` are packed along the columns in chunks of 32: a chunk of a row takes exactly `bits` words, and rows lie
beside each other, so threads that own neighbouring rows read neighbouring words. In a chunk, column `2p` lives in the
low and column `2p + 1` in the high 16 bits of a word, at the same place: `(word >> shift) & (mask | mask << 16)` is the
pair `p`.

| bits | pairs per word (16 // bits) | left at the top of each half (16 % bits) | pairs made of what is left |
|------|-----------------------------|------------------------------------------|----------------------------|
| 2    | 8                           | 0                                        | -                          |
| 3    | 5                           | 1                                        | pair 15                    |
| 4    | 4                           | 0                                        | -                          |
| 5    | 3                           | 1                                        | pair 15                    |
| 6    | 2                           | 4                                        | pairs 12 to 15             |
| 7    | 2                           | 2                                        | pairs 14, 15               |
| 8    | 2                           | 0                                        | -                          |

Pair `p` stands in word `p // f` at shift `bits * (p % f)`, `f = 16 // bits`. The `16 % bits` bits left at the top of
the halves of words 0, 1, … are one stream each; `bits` of it at a time are the remaining pairs. No bit is wasted but
for columns padded to a multiple of 32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CHUNK = 32


@cache
def places(bits: int) -> tuple[tuple[tuple[int, int, int, int], ...], ...]:
    """For each of the 16 pairs of a chunk its pieces `(word, shift in the word, shift in the code, width)`."""
    whole, rest = 16 // bits, 16 % bits
    table = [((p // whole, bits * (p % whole), 0, bits),) for p in range(bits * whole)]
    for first in range(0, rest * bits, bits):
        pieces, done = [], 0
        while done < bits:
            word, offset = divmod(first + done, rest)
            width = min(bits - done, rest - offset)
            pieces.append((word, bits * whole + offset, done, width))
            done += width
        table.append(tuple(pieces))
    return tuple(table)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes [R, N]` of any integer type, in [0, 2^bits) -> words int32 `[ceil(N / 32), bits, R]`."""
    rows, columns = codes.shape
    chunks = -(-columns // CHUNK)
    padded = codes.new_zeros(chunks * CHUNK, rows, dtype=torch.int32)
    padded[:columns] = codes.T
    half = padded.view(chunks, 16, 2, rows)
    pairs = half[:, :, 0] | half[:, :, 1] << 16  # [C, 16, R]
    words = padded.new_zeros(chunks, bits, rows)
    for pair, pieces in enumerate(places(bits)):
        for word, shift, offset, width in pieces:
            words[:, word] |= (pairs[:, pair] >> offset & _twice(width)) << shift
    return words


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: words `[C, bits, R]` -> uint8 codes `[R, columns]`, a view contiguous by column."""
    chunks, _, rows = words.shape
    codes = words.new_empty(chunks, 16, 2, rows, dtype=torch.uint8)
    for pair, pieces in enumerate(places(bits)):
        value = torch.zeros_like(words[:, 0])
        for word, shift, offset, width in pieces:
            value |= (words[:, word] >> shift & _twice(width)) << offset
        codes[:, pair, 0] = (value & 0xFFFF).to(torch.uint8)
        codes[:, pair, 1] = (value >> 16).to(torch.uint8)
    return codes.view(chunks * CHUNK, rows)[:columns].T


def _twice(width: int) -> int:
    return ((1 << width) - 1) * 0x10001


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """`codes [G, R]` of 1 to 8 bits -> uint8 `[G, ceil(R / 8) * bits]`: per group a dense little-endian bit stream."""
    groups, rows = codes.shape
    padded = codes.new_zeros(groups, -(-rows // 8) * 8, dtype=torch.uint8)
    padded[:, :rows] = codes
    places_ = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (padded[:, :, None] >> places_ & 1).view(groups, -1, 8)  # bit k of the stream at [k // 8, k % 8]
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack_stream(stream: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack_stream`: uint8 `[G, ceil(R / 8) * bits]` -> uint8 codes `[G, R]`."""
    places_ = torch.arange(8, dtype=torch.uint8, device=stream.device)
    single = (stream[:, :, None] >> places_ & 1).view(stream.shape[0], -1, bits)  # [G, R, bits]
    weights = 2 ** torch.arange(bits, dtype=torch.uint8, device=stream.device)
    return (single * weights).sum(-1, dtype=torch.uint8)[:, :rows].contiguous()
