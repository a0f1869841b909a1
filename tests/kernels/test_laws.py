"""Every format's product equals the dense product with what it dequantises to, at odd shapes and in every type."""

import gc
import weakref
from pathlib import Path

import acc.kernels.base
import pytest
import torch
import torch.nn.functional as F
from acc.calibrate.hessian import Hessian
from acc.kernels.base import WAYS
from acc.registry import listing, lookup

KERNELS = Path(acc.kernels.base.__file__).parent
ON_CPU = [way for way in WAYS if way != "triton"]
SHAPES = [(1, 8), (7, 33), (16, 64), (45, 100), (64, 300)]


def packed(method, rows, columns, **settings):
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(2 * columns, columns, generator=generator)
    statistics = {"hessian": Hessian(columns)}
    statistics["hessian"].update(x)
    chosen = lookup("compress", method)(**settings)
    weight = 0.1 * torch.randn(rows, columns, generator=generator)
    return chosen.compress(weight, chosen.prepare(statistics, lambda *_, **__: None), lambda *_, **__: None)


@pytest.mark.parametrize("way", ON_CPU)
@pytest.mark.parametrize("method", listing("compress", "Method"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_product_equals_dense_product(poison, monkeypatch, way, method, shape, dtype):
    monkeypatch.setenv("ACC_KERNELS", way)
    weight = packed(method, *shape)
    dense = weight.dequantize()
    assert dense.shape == shape
    assert torch.isfinite(dense).all()
    if way == "compiled" and not (KERNELS / f"{weight.name}_compiled.py").exists():
        with pytest.raises(ValueError, match=f"{weight.name} has no kernel for the CPU"):
            weight.matmul(torch.ones(shape[1]))
        pytest.skip("no compiled kernel, and it says so")
    for lead in ((), (1,), (5,), (2, 3), (17,)):
        x = torch.randn(*lead, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        y = weight.matmul(x)
        assert y.dtype == dtype
        assert y.shape == (*lead, shape[0])
        expected = F.linear(x.float(), dense).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * shape[1] ** 0.5 * 0.1)


@pytest.mark.parametrize("way", ["cache", "compiled"])
@pytest.mark.parametrize("tokens", [3, 17])
def test_many_tokens_go_through_float32_where_there_are_no_products_of_16_bits(monkeypatch, products, way, tokens):
    products(False)
    monkeypatch.setenv("ACC_KERNELS", way)
    weight = packed("spqr", 45, 100)
    x = torch.randn(2, tokens, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    multiplied, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: multiplied.append(x.dtype) or linear(x, w))
    y = weight.matmul(x)
    assert y.dtype == torch.bfloat16
    assert multiplied == ([torch.float32] if way == "cache" else [])
    kept = weight.dequantize(torch.bfloat16).float()
    right = linear(x.float(), kept) if way == "cache" else weight.matmul(x.float())
    assert torch.equal(y, right.bfloat16())


@pytest.mark.parametrize("way", ON_CPU)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_negative_scale_is_multiplied_with(monkeypatch, way, bits):
    monkeypatch.setenv("ACC_KERNELS", way)
    weight = packed("gptq", 45, 100, bits=bits, group_size=32, grid="full_range")
    assert (weight.scale < 0).any()
    assert (weight.scale > 0).any()
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(weight.matmul(x), F.linear(x, weight.dequantize()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", listing("compress", "Method"))
def test_a_way_that_does_not_exist_is_an_error(monkeypatch, method):
    monkeypatch.setenv("ACC_KERNELS", "fastest")
    with pytest.raises(ValueError, match="expected one of reference, cache"):
        packed(method, 8, 32).matmul(torch.randn(2, 32))


@pytest.mark.parametrize("method", listing("compress", "Method"))
def test_the_cache_holds_one_type_and_dies_with_its_weight(monkeypatch, method):
    monkeypatch.setenv("ACC_KERNELS", "cache")
    weight = packed(method, 8, 32)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 32).to(dtype)
        assert torch.equal(weight.matmul(x), F.linear(x, weight.dequantize(dtype)))
        kept = weight._product.weight
        weight.matmul(x)
        assert weight._product.weight is kept
    gc.disable()
    gone = weakref.ref(kept)
    del weight, kept
    assert gone() is None
    gc.enable()
