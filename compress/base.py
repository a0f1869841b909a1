"""What a method is: its own validated configuration, and one function from a weight to a packed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..calibrate.base import Statistic
from ..formats.base import PackedWeight

Event = Callable[..., None]  # event("damping_retry", damp_percent=0.02): lands in the tensor's line of report.jsonl


class Method(BaseModel):
    """A way to make one matrix smaller. Frozen, so that an instance that exists is legal and stays so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[tuple[str, ...]] = ()  # statistics of the matrix' input, by name: files of `calibrate/`
    format: ClassVar[str]  # the file of `formats/` that `compress` returns

    def prepare(self, statistics: dict[str, Statistic], event: Event) -> Any:
        """What matrices that share one input share, e.g. a factor of the inverse Hessian; computed once for all of
        them."""
        return None

    def compress(self, weight: Tensor, prepared: Any, event: Event) -> PackedWeight:
        """`weight [O, I]` fp32, not to be modified -> packed, with statistics already rounded as stored."""
        raise NotImplementedError

    def compress_all(self, weights: list[Tensor], prepared: list[Any], events: list[Event]) -> list[PackedWeight]:
        """The same for matrices with equally many inputs; a method that gains from taking several at once overrides
        it."""
        return [self.compress(*one) for one in zip(weights, prepared, events, strict=True)]
