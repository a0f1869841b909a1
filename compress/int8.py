"""Round each row to 8-bit integers (LLM.int8's weights, arXiv 2208.07339). Needs no data."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..formats.int8 import Int8Weight
from .base import Event, Method

LEAST = 1e-38  # a row of zeros is divided by this


class Int8(Method):
    """Divides each row by its greatest weight and rounds to integers from -127 to 127.

    The weights of LLM.int8, whose codes these are, bit for bit. acc multiplies them with inputs as they come;
    bitsandbytes, which `acc export --to bnb` writes them for, rounds inputs to 8 bits too, but for the strongest.

    Limits: half the size and no more; grids of smaller groups lose less at the same bits.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    format: ClassVar[str] = "int8"

    bits: Literal[8] = Field(8, description="bits per code")

    def compress(self, weight: Tensor, prepared: Any, event: Event) -> Int8Weight:
        weight = weight.float()
        absmax = weight.abs().amax(1)
        return Int8Weight.encode((weight * (127 / absmax.clamp(min=LEAST))[:, None]).round(), absmax)
