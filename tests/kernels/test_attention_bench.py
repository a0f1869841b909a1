"""The bench of attention: every case is compared before it is timed, and what is wrong is not timed."""

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "bench" / "attention.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_attention", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_cases_are_right_and_counted(bench):
    dense, *others = bench.prefill(260, "cpu", 1, 1e9)
    assert dense["operations"] == 8 * 4 * 64 * 260 * 261 // 2
    assert [case["kind"].split()[0] for case in others] == ["streaming", *["vertical-slash"] * 2, *["blocks"] * 2]
    for case in [dense, *others]:
        assert case["right"]
        assert case["seconds"] > 0
        assert case["bytes"] >= dense["bytes"]


def test_a_wrong_result_is_seen_and_not_timed(bench):
    heads, key_heads, width, dtype = bench.SHAPES["cpu"]
    tensors = [torch.ones(1, count, 70, width) for count in (heads, key_heads, key_heads)]
    everything = torch.ones(1, 70, dtype=torch.bool)
    assert bench.error(torch.ones(1, heads, 70, width), tensors, 1.0, lambda h, r: everything) < 1e-5
    assert bench.error(torch.full((1, heads, 70, width), 1.1), tensors, 1.0, lambda h, r: everything) > 0.05
    case = bench.timed({"error": 0.05}, lambda: pytest.fail("was timed"), dtype, "cpu", 1, 1.0, None)
    assert case == {"error": 0.05, "right": False}
