"""What a run would write, told from the headers of the files alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping

from ..calibrate.stream import Stream
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


def with_bits(recipe: Recipe, bits: int) -> Recipe:
    """The same recipe with so many bits per code in every step that has such a setting.

    Raises ValueError for bits that a method does not know."""
    steps = [step.flat() | ({"bits": bits} if hasattr(step.settings, "bits") else {}) for step in recipe.steps]
    changed = Recipe.from_dict({"steps": steps})
    return recipe.model_copy(update={"steps": changed.steps})
