"""`x Wᵀ` for a stack of experts whose weights are grouped integers, rows of `x` sorted by expert."""

from __future__ import annotations

from torch import Tensor

from .grouped import grouped


def grouped_experts(
    x: Tensor, ends: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """`x [N, I]` -> `[N, O]`, row by row through the expert of the row.

    ends int32 `[E]`: the rows before `ends[0]` are for expert 0, those from there to `ends[1]` for expert 1, and so on;
    rows past the last end are for no expert and give zeros. The operands are those of `grouped`, stacked as
    formats/base.py stacks: concatenated on dim 0, so codes `[E · ceil(I / 32), bits, O]`, scale `[E · G, O]`.
    """
    experts = len(ends)
    each_codes, each_scale = codes.chunk(experts), scale.chunk(experts)
    each_zero = [None] * experts if zero is None else zero.chunk(experts)
    y = x.new_zeros(len(x), codes.shape[-1])
    begin = 0
    for i, end in enumerate(ends.tolist()):
        weight = each_codes[i], each_scale[i], each_zero[i]
        y[begin:end] = grouped(x[begin:end], *weight, bits=bits, group_size=group_size)
        begin = end
    return y
