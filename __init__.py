"""acc: calibrate and compress language models, offline, and say what it cost.

`import acc` costs nothing: neither torch nor transformers is loaded. It only makes sure that, once transformers is
there,
its `from_pretrained` recognises checkpoints that acc wrote.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AttentionPlan", "PlanCache", "__version__", "attach", "detach", "load"]

if TYPE_CHECKING:
    from .formats.attention import PlanCache, attach, detach
    from .formats.attention_plan import AttentionPlan
    from .formats.hf import load

_HOMES = {
    "AttentionPlan": "formats.attention_plan",
    "PlanCache": "formats.attention",
    "attach": "formats.attention",
    "detach": "formats.attention",
    "load": "formats.hf",
}

_QUANTIZERS = "transformers.quantizers.auto"


class _RegisterAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads `transformers.quantizers.auto` as usual, then registers acc in it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        self.inner, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        self.inner.exec_module(module)
        importlib.import_module(f"{__name__}.formats.hf")


if _QUANTIZERS in sys.modules:
    importlib.import_module(f"{__name__}.formats.hf")
else:
    sys.meta_path.insert(0, _RegisterAfterImport())


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
