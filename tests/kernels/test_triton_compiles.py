"""The Triton kernels compile for GPUs that this machine does not have: the interpreter accepts more than the compiler.

What comes out is PTX; the code that sums a matrix product there must sum on the tensor cores.
"""

import os
import subprocess
import sys

import pytest
import torch

HEAD = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class NoGPU(DriverBase):
    def __init__(self): pass
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
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
        ptx = kernel.asm["ptx"]
        print(self.kernel.__name__, "mma" in ptx, "ld.global.v4" in ptx, kernel.metadata.shared)


driver.set_active(NoGPU())
"""

PRODUCT = (
    HEAD
    + """
from acc.kernels import launch_triton
from acc.kernels.packing import pack

for name in ("gather_kernel", "vector_kernel", "tile_kernel", "finish_kernel"):
    setattr(launch_triton, name, Compiled(getattr(launch_triton, name)))

rows, columns, groups = 256, 512, 32
codes = torch.zeros(16, 3, rows, dtype=torch.int32)
stream = torch.zeros(groups, rows // 8 * 3, dtype=torch.uint8)
stat = torch.zeros(groups, rows // 16, 4, dtype=torch.float16)
perm = torch.arange(columns).to(torch.uint16)
count = torch.zeros(2, rows, dtype=torch.uint8)
count[0, 0] = 1
spqr = [codes], [stream], [stream], [stat], [perm], [count], [count[0, :1]], [stat[0, 0, :1]]
two = [kind * 2 for kind in spqr]
launch_triton.packed_product(torch.zeros(1, columns, dtype=torch.bfloat16), None, *two, 3, 16, 3, 3, 16)
ends = torch.tensor([9, 16], dtype=torch.int32)
stacked = [[torch.cat([kind[0]] * 2)] for kind in spqr]
launch_triton.packed_product(torch.zeros(16, columns, dtype=torch.float16), ends, *stacked, 3, 16, 3, 3, 16)
"""
)

PLANES = (
    HEAD
    + """
from acc.kernels import bcq_triton

for name in ("vector_kernel", "tile_kernel", "finish_kernel"):
    setattr(bcq_triton, name, Compiled(getattr(bcq_triton, name)))

codes = torch.zeros(16, 3, 256, dtype=torch.int32)
free = torch.zeros(4, 3, 256, dtype=torch.float16), torch.zeros(4, 256, dtype=torch.float16), None
codes8 = free[0].byte(), free[1].byte(), torch.zeros(2, 256, dtype=torch.float16)
even = torch.zeros(32, 256, dtype=torch.bfloat16), torch.zeros(32, 256, dtype=torch.bfloat16), None
for tokens, stored, group in ((1, free, 128), (16, codes8, 128), (1, even, 16), (4, even, 16)):
    x = torch.zeros(tokens, 512, dtype=torch.bfloat16)
    bcq_triton.bcq_product(x, codes, *stored, 3, group)
"""
)

DECODE = (
    HEAD
    + """
from acc.kernels import attention_gather_triton, attention_label_triton, attention_select_triton, chosen_triton

for module, names in (
    (attention_label_triton, ["label_kernel"]),
    (attention_select_triton, ["mass_kernel", "score_kernel"]),
    (attention_gather_triton, ["gather_kernel", "merge_kernel"]),
    (chosen_triton, ["digit_kernel", "count_kernel", "place_kernel"]),
):
    for name in names:
        setattr(module, name, Compiled(getattr(module, name)))

for dtype, dim, bits, queries in (
    (torch.bfloat16, 128, 4, 1), (torch.float16, 96, 16, 16), (torch.bfloat16, 256, 8, 1), (torch.float32, 64, 16, 3)
):
    key = torch.zeros(1, 8, 4096, dim, dtype=dtype)
    query = torch.zeros(1, 32, queries, dim, dtype=dtype)
    channels, scale = torch.arange(32).expand(8, 32), torch.ones(8, 32)
    label = attention_label_triton.label_op(key, channels, scale, bits)
    attention_select_triton.select_op(query[:, :, 0], label, channels, scale, bits, 0.1)
    index = torch.zeros(1, 8, 256, dtype=torch.int32)
    attention_gather_triton.gather_op(query, key, key, index, 0.1)
chosen_triton.chosen_op(torch.zeros(1, 8, 4096), 200, 4, 32)
"""
)


ATTENTION = (
    HEAD
    + """
from acc.kernels import attention_sparse_triton, attention_streaming_triton
from acc.kernels.attention_index import streaming_index

attention_sparse_triton.sparse_kernel = Compiled(attention_sparse_triton.sparse_kernel)
attention_streaming_triton.streaming_kernel = Compiled(attention_streaming_triton.streaming_kernel)
query = torch.zeros(1, 2, 128, 128, dtype=torch.bfloat16)
ones = torch.ones(2, dtype=torch.int32)
attention_streaming_triton.streaming(query, query[:, :1], query[:, :1], ones[:1], ones[:1], 1.0)
attention_sparse_triton.sparse(query, query[:, :1], query[:, :1], *streaming_index(ones, ones, 128, 128), 1.0)
"""
)


def compiled(script, tmp_path):
    """For each launch the kernel's name, whether it multiplies on tensor cores, whether it reads words by fours, and
    the bytes of shared memory that it needs."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, "90"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the other tests compile them")
def test_compiles_for_a_gpu_that_is_not_here(tmp_path):
    kernels = compiled(PRODUCT, tmp_path)
    assert [name for name, *_ in kernels] == [
        "vector_kernel", "finish_kernel", "gather_kernel", "tile_kernel", "finish_kernel"
    ]  # fmt: skip
    assert kernels[0][2] == "True", "neighbouring rows' words are read four at a time"
    assert kernels[3][1] == "True", "tiles are multiplied on the tensor cores"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the other tests compile them")
def test_bit_planes_compile_for_a_gpu_that_is_not_here(tmp_path):
    kernels = [line for line in compiled(PLANES, tmp_path) if line[0] != "finish_kernel"]
    assert [name for name, *_ in kernels] == ["vector_kernel", "tile_kernel"] * 2
    assert all(on_tensor_cores == "True" for name, on_tensor_cores, *_ in kernels if name == "tile_kernel")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the other tests compile them")
def test_sparse_decoding_compiles_for_a_gpu_that_is_not_here(tmp_path):
    kernels = compiled(DECODE, tmp_path)
    names = ["label_kernel", "mass_kernel", "score_kernel", "gather_kernel", "merge_kernel"]
    assert [name for name, *_ in kernels] == names * 4 + ["digit_kernel"] * 3 + ["count_kernel", "place_kernel"]
    for name, on_tensor_cores, *_ in kernels[:15]:  # the others are in float32, whose products are exact
        assert (on_tensor_cores == "True") == (name in ("mass_kernel", "score_kernel", "gather_kernel")), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the other tests compile them")
def test_sparse_prefill_compiles_for_a_gpu_that_is_not_here(tmp_path):
    kernels = compiled(ATTENTION, tmp_path)
    assert [name for name, *_ in kernels] == ["streaming_kernel", "sparse_kernel"]
    for _, on_tensor_cores, _, shared in kernels:
        assert on_tensor_cores == "True"
        assert int(shared) <= 99 << 10  # what a program may have on the smallest GPUs
