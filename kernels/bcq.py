"""`x Wᵀ` for a binary-coded weight: bit planes of plus and minus one, with a scale per plane and group of inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import CHUNK


def bcq(
    x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, stat: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """`x [..., I]` -> `x Wᵀ [..., O]` in `x.dtype`, summed in fp32. Operands as `bcq_weight` takes them."""
    weight = bcq_weight(codes, scale, offset, stat, bits=bits, group_size=group_size, columns=x.shape[-1])
    return F.linear(x.float(), weight).to(x.dtype)


def bcq_weight(
    codes: Tensor, scale: Tensor, offset: Tensor, stat: Tensor | None, *, bits: int, group_size: int, columns: int
) -> Tensor:
    """`W [O, I] = offset + Σ scale_b · B_b` in fp32, `B_b` plus or minus one; a view that is contiguous by column.

    codes int32 `[ceil(I / 32), bits, O]`: bit `k` of word `[c, b]` is 1 where `B_b` is +1 for input `32 c + k`.
    scale `[G, bits, O]` and offset `[G, O]` are floats, or uint8 codes with stat float `[2, O]`: then scale is
    `stat[0] · code`, offset `stat[1] · (code - 128)`. An even grid has scale `[G, O]`, its step: plane `b` counts
    `2^(bits - 2 - b)` steps, and its offset is in steps too.

    Summed from the first plane to the last, so that every kernel can compute the very same numbers.
    """

    def wide(values: Tensor) -> Tensor:  # [G, O] -> [I, O]
        return values.float().repeat_interleave(group_size, 0)[:columns]

    scales, middle = plane_scales(scale, offset, stat, bits)
    weight = wide(middle)
    for words, values in zip(codes.unbind(1), scales):
        values = wide(values) if values.dim() else values
        weight += torch.where(plane_bits(words)[:columns].bool(), values, -values)
    if scale.dim() == 2:
        weight *= wide(scale)
    return weight.T


def plane_scales(scale: Tensor, offset: Tensor, stat: Tensor | None, bits: int) -> tuple[list[Tensor], Tensor]:
    """What is added or taken for each plane, `[G, O]`, or `[]` for an even grid, and the offset `[G, O]`, in fp32."""
    if stat is not None:
        of_scale, of_offset = stat.float()
        return list((scale.float() * of_scale).unbind(1)), (offset.float() - 128) * of_offset
    if scale.dim() == 2:
        return [torch.tensor(2.0 ** (bits - 2 - b), device=scale.device) for b in range(bits)], offset.float()
    return list(scale.float().unbind(1)), offset.float()


def plane_bits(words: Tensor) -> Tensor:
    """Words int32 `[C, O]` of one plane -> 0 or 1 for each input and row, int32 `[32 C, O]`."""
    place = torch.arange(CHUNK, dtype=torch.int32, device=words.device)[:, None]
    return (words[:, None] >> place & 1).flatten(0, 1)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes `[O, I]` in [0, 2^bits), bit `b` for plane `b` -> words int32 `[ceil(I / 32), bits, O]`, padded with 0."""
    rows, columns = codes.shape
    chunks = -(-columns // CHUNK)
    padded = codes.new_zeros(chunks * CHUNK, rows, dtype=torch.int32)
    padded[:columns] = codes.T
    place = torch.arange(CHUNK, dtype=torch.int32, device=codes.device)[:, None]
    split = padded.view(chunks, CHUNK, rows)
    return torch.stack([((split >> b & 1) << place).sum(1, dtype=torch.int32) for b in range(bits)], 1)


def unpack_planes(words: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_planes`: words `[C, bits, O]` -> uint8 codes `[O, columns]`, a view contiguous by column."""
    codes = words.new_zeros(words.shape[0] * CHUNK, words.shape[2], dtype=torch.uint8)
    for b, plane in enumerate(words.unbind(1)):
        codes |= plane_bits(plane).to(torch.uint8) << b
    return codes[:columns].T
