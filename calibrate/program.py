"""Integer programs, solved by HiGHS without a word: now and then it writes to standard output by itself."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult
from scipy.optimize import milp as solve


def milp(
    c: np.ndarray,
    *,
    integrality: np.ndarray,
    bounds: Bounds,
    constraints: Sequence[LinearConstraint],
    options: dict[str, float | bool],
) -> OptimizeResult:
    """`scipy.optimize.milp`, with nothing on standard output: there a verb's JSON document may stand."""
    with _silence():
        return solve(c, integrality=integrality, bounds=bounds, constraints=constraints, options=options)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """File descriptor 1 leads nowhere inside; libraries in C write to it, not to `sys.stdout`."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed: nobody reads it
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
