"""The C++ twin of the torch definitions for CPUs: compiled on the user's machine at the first use, kept on disk.

A scheme's numbers are compiled in, so each takes one to two seconds once. Libraries lie in
`$XDG_CACHE_HOME/acc/kernels`, by default `~/.cache/acc/kernels`, under a hash of all that made them: source, numbers,
compiler, and the processor's features.

`torch.compile` of the same sums was measured beside it: one to two times as fast as a dense product, and 8 to 13
seconds for each shape of matrix at the first use.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .base import Product, computed_in

SOURCE = Path(__file__).with_name("packed_cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
POINTERS = (
    "codes", "scale", "scale_codes", "zero_codes", "stat", "perm", "outlier_count", "outlier_start", "outlier_column",
    "outlier_value", "offset",
)  # fmt: skip
FEW = 16  # tokens up to which decoding for each product beats decoding the whole matrix first
SMALL = 1 << 17  # products below which a second thread costs more than it saves


class Weight(ctypes.Structure):
    """`struct Weight` of the source."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("perm_wide", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


class Compiled:
    """`x -> x Wᵀ`. Where C++ cannot follow (gradients, `torch.compile`, other devices) `reference` runs.

    `tensors` are those `struct Weight` points to, by name; they are kept alive, and nothing is copied.
    """

    def __init__(
        self, library: ctypes.CDLL, shape: tuple[int, int], tensors: dict[str, Tensor | None], reference: Product
    ):
        self.library, self.reference, self.tensors = library, reference, tensors
        self.rows, self.columns = shape
        self.perm = tensors.get("perm")
        assert all(t is None or t.is_contiguous() for t in tensors.values())
        pointers = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
        wide = self.perm is not None and self.perm.dtype == torch.int32
        self.weight = Weight(rows=self.rows, columns=self.columns, perm_wide=wide, **pointers)
        self.address = ctypes.addressof(self.weight)

    @property
    def kept(self) -> list[Tensor]:
        """What this takes beside the packed weight."""
        start = self.tensors.get("outlier_start")
        return [] if start is None else [start]

    def __call__(self, x: Tensor) -> Tensor:
        followed = x.requires_grad and torch.is_grad_enabled()
        if followed or torch.compiler.is_compiling() or x.device.type != "cpu":
            return self.reference(x)
        if x.shape[-1] != self.columns:
            raise ValueError(f"x has {x.shape[-1]} features, the weight takes {self.columns}")
        if x.dtype not in (torch.float32, torch.bfloat16):
            return self(x.float()).to(x.dtype)
        tokens = x.numel() // self.columns
        if tokens > FEW:
            return self._many(x)
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.rows))
        threads = torch.get_num_threads() if tokens * self.rows * self.columns >= SMALL else 1
        self.library.acc_product(self.address, x.data_ptr(), y.data_ptr(), tokens, x.dtype == torch.bfloat16, threads)
        return y

    def _many(self, x: Tensor) -> Tensor:
        """Decodes the matrix for this product only, to the type of `x` if the processor has products of that."""
        dtype = computed_in(x.dtype, "cpu")
        weight = x.new_empty(self.columns, self.rows, dtype=dtype)
        narrowed = dtype == torch.bfloat16
        self.library.acc_weight(self.address, weight.data_ptr(), narrowed, torch.get_num_threads())
        # not F.linear, which is 4 times slower on a transposed weight in bfloat16
        y = (x if self.perm is None else x[..., self.perm.long()]).to(dtype) @ weight
        return y.to(x.dtype)


def library(**numbers: int) -> ctypes.CDLL:
    """The source compiled with these macros. Raises OSError without a compiler, or with what it says when it fails."""
    found = _library(**numbers)
    if isinstance(found, str):
        raise OSError(found)
    return found


@cache
def _library(**numbers: int) -> ctypes.CDLL | str:
    """A failure is remembered too: a model asks once per weight."""
    compiler = _compiler()
    if compiler is None:
        return "there is no C++ compiler (g++, clang++ or c++; $CXX names another)"
    command = [compiler, *FLAGS, *(f"-D{name}={value}" for name, value in sorted(numbers.items()))]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    made_of = repr((SOURCE.read_text(encoding="utf-8"), command, version, _processor()))
    path = _folder() / f"packed-{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(partial), str(SOURCE)], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{Path(compiler).name} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}"
        partial.replace(path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    loaded.acc_product.argtypes = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3)
    loaded.acc_weight.argtypes = (*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2)
    return loaded


@cache
def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@cache
def _folder() -> Path:
    """Where libraries are kept, a folder that only its owner can write to; a temporary one where there is none."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acc" / "kernels"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat() if folder.is_dir() else None
    if status is not None and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return folder
    made = tempfile.TemporaryDirectory(prefix="acc-kernels-")
    atexit.register(made.cleanup)
    return Path(made.name)


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared between machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor() + platform.machine()
