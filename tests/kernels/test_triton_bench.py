"""The bench of the kernels: the weights it makes are real ones, and without a GPU it counts bytes and says so."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from acc.formats.grouped import GroupedWeight
from acc.formats.spqr import SpQRWeight

PATH = Path(__file__).parents[1] / "bench" / "products.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_products", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("cls", [SpQRWeight, GroupedWeight])
def test_its_weights_and_bytes_are_those_of_the_formats(bench, cls, bits):
    torch.manual_seed(bits)
    shape = (48, 576)
    scheme = {"format": cls.name, **bench.numbers(cls.name, bits)}
    scheme |= {"order": "act_order", "stat_dtype": "float16", "symmetric": False, "scale_dtype": "float16"}
    tensors = bench.random_weight(cls.name, bits, *shape, "cpu")
    weight = cls.from_tensors({cls.suffixes[name]: tensor for name, tensor in tensors.items()}, shape, scheme)
    weight.check()
    assert 8 * bench.size(tensors) / (shape[0] * shape[1]) == weight.stored_bits
    assert 0.05 < weight.dequantize().std() < 10  # of a size that no type overflows or loses
    layout = bench.layout(cls.name, bits, *shape)
    assert {name: t.dtype for name, t in tensors.items()} == {name: dtype for name, (_, dtype) in layout.items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would measure")
def test_without_a_gpu_it_counts_bytes(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, PATH, "--out", out, "--shapes", "576x576", "--bits", "3", "--rows", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "speeds need a GPU" in done.stdout
    written = json.loads(out.read_text())
    assert written["machine"]["gpu"] is None
    assert [case["format"] for case in written["cases"]] == ["spqr", "grouped"]
    assert all(case["bytes"] > case["weight_bytes"] and "ms" not in case for case in written["cases"])
