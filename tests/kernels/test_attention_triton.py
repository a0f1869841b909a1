"""The Triton kernels of attention compile for a GPU that this machine does not have, and fit on it."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class NoGPU(DriverBase):
    def __init__(self): pass
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    @classmethod
    def is_active(cls): return True
    def get_active_torch_device(self): return torch.device("cpu")
    def map_python_to_cpp_type(self, type_): return "int"
    def get_benchmarker(self): return None


class Compiled:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid): return self.launch
    def launch(self, **arguments):
        kernel = self.kernel.warmup(grid=(1,), **arguments)
        print(self.kernel.__name__, "mma" in kernel.asm["ptx"], kernel.metadata.shared)


driver.set_active(NoGPU())
from acc.kernels import attention_sparse_triton, attention_streaming_triton
from acc.kernels.attention_index import streaming_index

attention_sparse_triton.sparse_kernel = Compiled(attention_sparse_triton.sparse_kernel)
attention_streaming_triton.streaming_kernel = Compiled(attention_streaming_triton.streaming_kernel)
query = torch.zeros(1, 2, 128, 128, dtype=torch.bfloat16)
ones = torch.ones(2, dtype=torch.int32)
attention_streaming_triton.streaming(query, query[:, :1], query[:, :1], ones[:1], ones[:1], 1.0)
attention_sparse_triton.sparse(query, query[:, :1], query[:, :1], *streaming_index(ones, ones, 128, 128), 1.0)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the other tests compile them")
def test_compiles_for_a_gpu_that_is_not_here(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in kernels] == ["streaming_kernel", "sparse_kernel"]
    for _, on_tensor_cores, shared in kernels:
        assert on_tensor_cores == "True"
        assert int(shared) <= 99 << 10  # what a program may have on the smallest GPUs
