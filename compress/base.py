"""What a method is: its own validated configuration, and one function from a weight to a packed weight; and what a
rewrite is, which gives the weights another form before."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..calibrate.base import Statistic
from ..calibrate.evaluate import fingerprint_ids
from ..calibrate.stream import Stream
from ..formats.base import PackedWeight, Scheme, format_of
from ..formats.source import Rewritten, Source
from ..registry import lookup

Event = Callable[..., None]  # event("damping_retry", damp_percent=0.02): lands in the tensor's line of report.jsonl


class Method(BaseModel):
    """A way to make one matrix smaller. Frozen, so that an instance that exists is legal and stays so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[tuple[str, ...]] = ()  # statistics of the matrix' input, by name: files of `calibrate/`
    format: ClassVar[str]  # the file of `formats/` that `compress` returns
    refine: ClassVar[int] = 0  # steps of learned rounding that `acc quantize` lets follow, unless it is told otherwise

    def prepare(self, statistics: dict[str, Statistic], event: Event) -> Any:
        """What matrices that share one input share, e.g. a factor of the inverse Hessian; computed once for all of
        them."""
        return None

    def compress(self, weight: Tensor, prepared: Any, event: Event) -> PackedWeight:
        """`weight [O, I]` fp32, not to be modified -> packed, with statistics already rounded as stored."""
        raise NotImplementedError

    def alternatives(self, bits: float) -> list[Self]:
        """Settings of different sizes, from well below to well above so many stored bits per weight, that a budget for
        the whole model chooses among; the other fields stay."""
        return [self]

    def compress_all(self, weights: list[Tensor], prepared: list[Any], events: list[Event]) -> list[PackedWeight]:
        """The same for matrices with equally many inputs; a method that gains from taking several at once overrides
        it."""
        return [self.compress(*one) for one in zip(weights, prepared, events, strict=True)]

    def planned(self, shape: tuple[int, int]) -> tuple[Scheme, dict[str, int]]:
        """How a matrix `[O, I]` would be packed, told before any data exists: its scheme, and the counts that
        `PackedWeight.nbytes` takes.

        Here the scheme of a small random matrix, packed without data, stands for all; a method whose packed size
        depends on the data, or whose scheme depends on the shape, overrides this. Raises ValueError for a shape that
        it cannot take.
        """
        return dict(_probe(self)), {}  # pyright: ignore[reportArgumentType] - frozen models are hashable

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that a matrix `[O, I]` would take on disk, companions included. Errors as in `planned`."""
        scheme, counts = self.planned(shape)
        return format_of(scheme).nbytes(shape, scheme, **counts)


@functools.cache
def _probe(method: Method) -> Scheme:
    """The scheme that a method gives a small matrix of whose input nothing is known."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    statistics = {name: lookup("calibrate", name)(weight.shape[1]) for name in method.needs}
    return method.compress(weight, method.prepare(statistics, _ignore), _ignore).scheme


def _ignore(kind: str, **figures: Any) -> None:
    """An event that nobody needs to know."""


def around(bits: float) -> range:
    """Bits per code that a mix of so many stored bits may use."""
    bits = min(max(bits, 2), 8)
    return range(max(math.floor(bits) - 1, 2), min(math.ceil(bits) + 1, 8) + 1)


def scale_dtype(largest: float, event: Event) -> torch.dtype:
    """float16 for scales, unless even the largest would overflow it or lose digits to underflow."""
    if largest == 0 or 2**-18 <= largest <= torch.finfo(torch.float16).max:
        return torch.float16
    event("scale_dtype", dtype="bfloat16", largest_scale=largest)
    return torch.bfloat16


TOLERANCE = (
    1e-3  # of `Rewrite.prove`; what is left in fp32 is 1e-6 to 1e-5 of the logits, a wrong rewrite leaves about 1
)


class Rewrite(BaseModel):
    """A way to write down the same model with other weights, done before any method sees them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def name(self) -> str:
        """What a recipe calls it: the name of its file."""
        return type(self).__module__.rpartition(".")[2]

    def rewrite(self, source: Source, dtype: torch.dtype | None = None) -> Rewritten:
        """The same model, its tensors computed one at a time and rounded to their own type, or given in `dtype`.

        Raises ValueError naming the family when it would not be the same."""
        raise NotImplementedError

    @torch.no_grad()
    def prove(self, source: Source, device: str = "cpu") -> float:
        """Runs a few tokens through both models in fp32, one block at a time -> how far the logits are apart.

        Relative, and the median of all positions, as a router near a tie may choose otherwise for one of them. Raises
        ValueError naming the family when it is more than rounding."""
        logits = []
        for model in (source, self.rewrite(source, torch.float32)):
            stream = Stream(model, dtype=torch.float32, device=device)
            vocabulary = stream.skeleton.model.get_input_embeddings().num_embeddings
            for _ in stream.blocks([fingerprint_ids(vocabulary)]):
                pass
            logits.append(next(iter(stream.logits()))[0].cpu())
        before, after = (each - each.mean(-1, keepdim=True) for each in logits)
        apart = float(((after - before).norm(dim=-1) / before.norm(dim=-1)).median())
        if not apart <= TOLERANCE:
            raise ValueError(
                f"{source.config.get('model_type')}: {self.name} does not leave this model as it is: its logits move by"
                f" {100 * apart:.2g}%; go on without it"
            )
        return apart
