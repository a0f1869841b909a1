"""`x Wᵀ` for a stack of experts whose weights are SpQR's, rows of `x` sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from .spqr import outliers_per_row, spqr


def spqr_experts(
    x: Tensor,
    ends: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    stat: Tensor,
    perm: Tensor | None,
    outlier_count: Tensor,
    outlier_column: Tensor,
    outlier_value: Tensor,
    *,
    bits: int,
    group_size: int,
    scale_bits: int,
    zero_bits: int,
    stat_group_size: int,
) -> Tensor:
    """`x [N, I]` -> `[N, O]`, row by row through the expert of the row.

    ends int32 `[E]`: the rows before `ends[0]` are for expert 0, those from there to `ends[1]` for expert 1, and so on;
    rows past the last end are for no expert and give zeros. The operands are those of `spqr`, stacked as
    formats/base.py stacks: concatenated on dim 0, so codes `[E · ceil(I / 32), bits, O]`, perm `[E · I]`; each expert's
    outliers follow those of the expert before.
    """
    experts, columns = len(ends), x.shape[-1]
    counts = outlier_count.chunk(experts)
    sizes = torch.stack([outliers_per_row(count, columns).sum() for count in counts]).tolist()
    even = [kind.chunk(experts) for kind in (codes, scale, zero, stat)]
    perms = [None] * experts if perm is None else perm.chunk(experts)
    y = x.new_zeros(len(x), codes.shape[-1])
    begin = 0
    for end, *weight in zip(
        ends.tolist(), *even, perms, counts, outlier_column.split(sizes), outlier_value.split(sizes), strict=True
    ):
        y[begin:end] = spqr(
            x[begin:end], *weight, bits=bits, group_size=group_size, scale_bits=scale_bits, zero_bits=zero_bits,
            stat_group_size=stat_group_size,
        )  # fmt: skip
        begin = end
    return y
