"""`x Wᵀ` for a weight of 8-bit integers with one scale per row (arXiv 2208.07339)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

STEP = 7.874015718698502e-3  # 1 / 127, the factor that bitsandbytes multiplies by


def int8(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """`x [..., I]` -> `x Wᵀ [..., O]` in `x.dtype`, summed in fp32. codes int8 `[O, I]`, absmax float `[O]`."""
    return F.linear(x.float(), int8_weight(codes, absmax)).to(x.dtype)


def int8_weight(codes: Tensor, absmax: Tensor) -> Tensor:
    """`W [O, I] = code · absmax / 127` in fp32."""
    return codes * absmax[:, None] * STEP
