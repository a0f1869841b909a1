"""What several benches share: the machine, acc's kernels without an installation, times on a GPU. Needs torch alone."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("acc-toolkit", "torch", "triton", "transformers", "safetensors", "bitsandbytes")


def acc_module(name: str) -> ModuleType:
    """A module of this repository's kernels, whatever the repository's folder is called and installed or not."""
    if "acc" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "acc", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["acc"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["acc"])
    return importlib.import_module(f"acc.kernels.{name}")


def machine() -> dict[str, Any]:
    """What the figures depend on, with the versions of those packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def event_seconds(function: Callable[[], object]) -> float:
    """The time of one call between CUDA events."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def gpu_seconds(function: Callable[[], object], calls: int = 30, graph: bool = True) -> float:
    """The median of one call's time between CUDA events, the L2 cache overwritten before each; `graph` replays it."""
    for _ in range(3):
        function()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        function = captured.replay
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(calls):
        flush.zero_()
        times.append(event_seconds(function))
    return statistics.median(times)


def copy_bandwidth(seconds: Callable[..., float], device: str = "cuda", mib: int = 1024) -> float:
    """GB/s, read and written, of a large copy; `seconds` takes the time of a function."""
    source = torch.zeros(mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), graph=False) / 1e9
