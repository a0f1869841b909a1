"""Files of other sparse-attention runtimes: what of a calibration each can hold, how it is written and read."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..registry import lookup, typed
from .calibration import Calibration
from .model import AttentionLayer

PREFIX = "runtime_"


@dataclass(frozen=True)
class Brought:
    """What such a file says, in the terms of acc's own passes."""

    tensors: dict[str, Tensor]  # by `pass.tensor`
    passes: dict[str, dict[str, Any]]  # settings and summary of each, for `calibration.json`
    notes: list[str] = field(default_factory=list)  # for the user: what was odd about it


class Runtime(ABC):
    """How another runtime wants what acc calibrated. A subclass is one file `runtime_<name>.py` of this folder, which
    `acc export --to <name>` and `acc calibrate --from <name>` find."""

    options: ClassVar[Mapping[str, str]] = {}  # that `write` knows, and what they are

    @classmethod
    @abstractmethod
    def write(cls, calibration: Calibration, options: Mapping[str, Any]) -> tuple[dict[str, bytes], list[str]]:
        """Its files by name, exactly as it reads them, and notes for the user: what could not be said in them.

        `options` are some of the class' own, e.g. `sparsity`, given anew. Raises ValueError when the calibration lacks
        the pass that they are made of, and for an option's value that cannot be."""

    @classmethod
    @abstractmethod
    def read(cls, path: Path, layers: list[AttentionLayer]) -> Brought:
        """The same for a file, or folder, of that runtime, for a model with these layers.

        Raises ValueError for what does not fit the model or is malformed, naming layer and head."""


def runtimes() -> dict[str, str]:
    """`{name: what it is}` of every runtime, spelled as on the command line."""
    return typed("formats", "Runtime", PREFIX)


def runtime(name: str) -> type[Runtime]:
    """The runtime of this name. Raises ValueError with the nearest names when there is none."""
    known = runtimes()
    if name.replace("_", "-") not in known:
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(f"there is no runtime {name!r}; there is {', '.join(near) or 'none'}")
    return lookup("formats", PREFIX + name, "Runtime")
