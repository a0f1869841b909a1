"""What a run would write, told from the headers of the files alone: no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..calibrate.stream import Stream
from ..formats.base import Entry, format_of
from .recipe import Recipe, Step

OVERHEAD = 128  # bytes of a safetensors header for each tensor, about


def sizes(chosen: Mapping[str, Step], stream: Stream) -> dict[str, int]:
    """Bytes on disk of every tensor of the model, companions included, where `chosen` says which step packs which.

    Exact, but for what only the data decides: see `Method.planned`. Raises ValueError naming a tensor that its step's
    method or format cannot take.
    """
    skeleton, source = stream.skeleton, stream.source
    found = {name: 0 if name in chosen else source.info(name).nbytes for name in source.names()}
    known: dict[tuple[int, tuple[int, int]], int] = {}
    blocks = [skeleton.matrices(index) for index in range(len(skeleton.layers))]
    for matrix in (matrix for block in [*blocks, skeleton.outer_matrices()] for matrix in block):
        step = chosen.get(matrix.tensor)
        if step is None:
            continue
        key = id(step), matrix.shape
        if key not in known:
            try:
                known[key] = step.settings.planned_bytes(matrix.shape)
            except ValueError as error:
                raise ValueError(f"{matrix.name} {matrix.shape}: {error}; leave it out with --ignore") from None
        found[matrix.tensor] += known[key]
    return found


def planned_entries(chosen: Mapping[str, Step], stream: Stream) -> dict[str, Entry]:
    """How each packed tensor would be described: shape and scheme, before any data."""
    skeleton = stream.skeleton
    blocks = [skeleton.matrices(index) for index in range(len(skeleton.layers))]
    found: dict[str, Entry] = {}
    stacked = Counter(m.tensor for block in blocks for m in block if m.part is not None)
    for matrix in (matrix for block in [*blocks, skeleton.outer_matrices()] for matrix in block):
        if matrix.tensor in chosen and matrix.tensor not in found:
            scheme, _ = chosen[matrix.tensor].settings.planned(matrix.shape)
            stack = stacked.get(matrix.tensor)
            found[matrix.tensor] = Entry(format_of(scheme), matrix.shape, scheme, stack, matrix.transposed)
    return found


def with_bits(recipe: Recipe, bits: int) -> Recipe:
    """The same recipe with so many bits per code in every step that has such a setting.

    Raises ValueError for bits that a method does not know."""
    steps = [step.flat() | ({"bits": bits} if hasattr(step.settings, "bits") else {}) for step in recipe.steps]
    changed = Recipe.from_dict({"steps": steps})
    return recipe.model_copy(update={"steps": changed.steps})
