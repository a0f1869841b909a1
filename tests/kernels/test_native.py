"""The C++ kernels over the schemes there are: the reference's weights to the last bit; a machine without a compiler."""

from __future__ import annotations

import platform
import warnings
from dataclasses import replace

import pytest
import torch
from acc.formats.bcq import BcqWeight
from acc.formats.grouped import GroupedWeight
from acc.formats.spqr import SpQRWeight
from acc.kernels import bcq_compiled, native

SPQR = {
    "bits": 3, "group_size": 16, "scale_bits": 3, "zero_bits": 3, "stat_group_size": 16, "order": "act_order",
    "stat_dtype": "float16",
}  # fmt: skip
SPQR_SCHEMES = [
    {},
    {"bits": 2, "group_size": 8, "scale_bits": 2, "stat_dtype": "bfloat16"},
    {"bits": 4, "group_size": 64, "scale_bits": 5, "zero_bits": 8, "order": "identity"},
    {"bits": 5, "group_size": 24, "stat_group_size": 5},
    {"bits": 6, "group_size": 1000, "stat_group_size": 64},
]
GROUPED = {"bits": 4, "group_size": 128, "symmetric": False, "scale_dtype": "float16"}
GROUPED_SCHEMES = [{}, {"bits": 7, "group_size": -1}, {"bits": 8, "group_size": 7, "scale_dtype": "bfloat16"}]
GROUPED_SCHEMES += [{"bits": 3, "symmetric": True, "group_size": 32}]
BCQ = {"bits": 3, "group_size": 128, "scales": "codes", "scale_dtype": "float16"}
BCQ_SCHEMES = [{}, {"bits": 2, "group_size": 8, "scales": "free", "scale_dtype": "bfloat16"}]
BCQ_SCHEMES += [{"bits": 1, "group_size": -1, "scales": "free"}, {"bits": 4, "group_size": 36, "scales": "even"}]
SHAPES = [(1, 8), (45, 100), (16, 256), (70, 531)]

needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv("ACC_KERNELS", "compiled")


def spqr(rows: int, columns: int, outliers: float = 0.03, **scheme) -> SpQRWeight:
    scheme, draw = SPQR | scheme, torch.Generator().manual_seed(rows + columns)
    groups = -(-columns // scheme["group_size"])
    dtype = getattr(torch, scheme["stat_dtype"])
    place = (torch.rand(rows * columns, generator=draw) < outliers).nonzero()[:, 0]
    return SpQRWeight.encode(
        torch.randint(0, 1 << scheme["bits"], (rows, columns), generator=draw),
        torch.randint(0, 1 << scheme["scale_bits"], (groups, rows), generator=draw),
        torch.randint(0, 1 << scheme["zero_bits"], (groups, rows), generator=draw),
        torch.randn(groups, -(-rows // scheme["stat_group_size"]), 4, generator=draw).to(dtype),
        torch.randperm(columns, generator=draw) if scheme["order"] == "act_order" else None,
        (place // columns, place % columns, torch.randn(len(place), generator=draw)),
        scheme,
    )


def grouped(rows: int, columns: int, **scheme) -> GroupedWeight:
    scheme, draw = GROUPED | scheme, torch.Generator().manual_seed(rows + columns)
    groups = 1 if scheme["group_size"] == -1 else -(-columns // scheme["group_size"])
    codes = torch.randint(0, 1 << scheme["bits"], (rows, columns), generator=draw)
    zero = torch.randint(0, 1 << scheme["bits"], (groups, rows), generator=draw)
    scale = torch.rand(groups, rows, generator=draw).to(getattr(torch, scheme["scale_dtype"]))
    return GroupedWeight.encode(codes, scale, None if scheme["symmetric"] else zero, scheme)


def bcq(rows: int, columns: int, **scheme) -> BcqWeight:
    scheme, draw = BCQ | scheme, torch.Generator().manual_seed(rows + columns)
    groups = 1 if scheme["group_size"] == -1 else -(-columns // scheme["group_size"])
    codes = torch.randint(0, 1 << scheme["bits"], (rows, columns), generator=draw)
    size, dtype = (groups, scheme["bits"], rows), getattr(torch, scheme["scale_dtype"])
    if scheme["scales"] == "codes":
        numbers = (torch.randint(0, 256, n, generator=draw).byte() for n in (size, (groups, rows)))
        return BcqWeight.encode(codes, *numbers, torch.rand(2, rows, generator=draw).to(dtype), scheme)
    size = (groups, rows) if scheme["scales"] == "even" else size
    scale, offset = torch.rand(size, generator=draw).to(dtype), torch.randn(groups, rows, generator=draw).to(dtype)
    return BcqWeight.encode(codes, scale, offset, None, scheme)


def assert_product(y, x, dense):
    """`y = x denseᵀ` up to the order of sums in fp32."""
    bound = 1e-6 * dense.shape[1] ** 0.5 * (x.double().abs() @ dense.double().abs().T) + 1e-30
    assert bool(((y - x.double() @ dense.double().T).abs() <= bound).all())


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("make", "scheme"),
    [(spqr, s) for s in SPQR_SCHEMES] + [(grouped, s) for s in GROUPED_SCHEMES] + [(bcq, s) for s in BCQ_SCHEMES],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_weights_are_the_references_and_so_are_products(make, scheme, shape):
    weight = make(*shape, **scheme)
    dense = weight.dequantize()
    decoded = weight.matmul(torch.eye(shape[1]).repeat(-(-(native.FEW + 1) // shape[1]), 1))[: shape[1]]
    assert torch.equal(decoded.T, dense)  # more tokens than few: the matrix is decoded, rounding outliers as well
    for tokens in (0, 1, 2, 4, 7, native.FEW):
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
        assert_product(weight.matmul(x), x, dense)
        assert torch.equal(weight.matmul(x), weight.matmul(x))
    strided = torch.randn(shape[1], 3).T
    torch.testing.assert_close(weight.matmul(strided), weight.matmul(strided.contiguous()), rtol=0, atol=0)


@needs_compiler
@pytest.mark.parametrize("lookup", [0, 8])
def test_ways_to_multiply_by_planes_that_were_measured(lookup):
    weight = bcq(45, 100, group_size=24, bits=2, scales="free")
    product = bcq_compiled.prepare(100, lookup=lookup, **weight.operands(), **weight.numbers())
    assert torch.equal(product(torch.eye(100)).T, weight.dequantize())
    for tokens in (1, 3):
        x = torch.randn(tokens, 100, generator=torch.Generator().manual_seed(tokens))
        assert_product(product(x), x, weight.dequantize())


@needs_compiler
def test_a_block_full_of_outliers():
    """255 stands for all 256 of them."""
    for columns in (256, 255, 300):
        weight = spqr(9, columns, outliers=1.0)
        x = torch.randn(1, columns)
        assert_product(weight.matmul(x), x, weight.dequantize())


@needs_compiler
def test_more_threads_give_the_same_bits():
    weight, x = spqr(600, 576), torch.randn(1, 576)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(weight.matmul(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
def test_gradients_and_torch_compile_go_through_the_reference():
    weight, x = spqr(8, 64), torch.randn(2, 64, requires_grad=True)
    weight.matmul(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(2, -1))
    compiled = torch.compile(weight.matmul, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_product(compiled(x), x.detach(), weight.dequantize())


@needs_compiler
def test_what_would_be_read_out_of_bounds_is_an_error():
    weight = spqr(20, 100)
    count = weight.outlier_count.clone()
    count[0, 3] += 1
    wrong = [
        {"outlier_count": count},
        {"outlier_value": weight.outlier_value[1:]},
        {"outlier_column": weight.outlier_column + 100},
        {"perm": torch.full_like(weight.perm.int(), 100).to(torch.uint16)},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="acc verify"):
            replace(weight, **change).matmul(torch.randn(1, 100))
    with pytest.raises(ValueError, match="99 features"):
        weight.matmul(torch.randn(1, 99))


@pytest.fixture
def other_compiler(monkeypatch, tmp_path):
    """`other_compiler(path or None)`: nothing is compiled yet, and this is the compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def choose(path):
        for function in (native._library, native._folder):
            function.cache_clear()
        monkeypatch.setattr(native, "_compiler", lambda: path)

    yield choose
    for function in (native._library, native._folder):
        function.cache_clear()


def failing(tmp_path):
    path = tmp_path / "c++"
    path.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("kind", ["none", "failing"])
def test_without_a_compiler_the_reference_runs_and_says_so_once(monkeypatch, tmp_path, other_compiler, kind):
    other_compiler(None if kind == "none" else failing(tmp_path))
    reason = "no C" if kind == "none" else "no such flag"
    with pytest.raises(ValueError, match=f"ACC_KERNELS=compiled, but .*{reason}"):
        spqr(8, 64).matmul(torch.randn(1, 64))
    monkeypatch.delenv("ACC_KERNELS")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for seed in range(3):
            weight, x = spqr(8, 64 + seed), torch.randn(1, 64 + seed)
            assert_product(weight.matmul(x), x, weight.dequantize())
    assert len(said) == 1
    assert reason in str(said[0].message)
    assert "ACC_KERNELS=cache" in str(said[0].message)


@needs_compiler
def test_libraries_are_kept_where_only_the_owner_writes(monkeypatch, tmp_path, other_compiler):
    found = native._compiler()
    other_compiler(found)
    spqr(8, 64).matmul(torch.randn(1, 64))
    kept = list((tmp_path / "acc" / "kernels").iterdir())
    assert [path.suffix for path in kept] == [".so"]
    other_compiler(failing(tmp_path / "acc"))  # another compiler is another library
    with pytest.raises(ValueError, match="no such flag"):
        spqr(8, 64).matmul(torch.randn(1, 64))
    other_compiler(found)
    made = kept[0].stat().st_mtime_ns
    spqr(8, 64).matmul(torch.randn(1, 64))
    assert kept[0].stat().st_mtime_ns == made
    (tmp_path / "acc" / "kernels").chmod(0o777)
    other_compiler(found)
    assert native._folder() != tmp_path / "acc" / "kernels"
    spqr(8, 64).matmul(torch.randn(1, 64))


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a flag for x86")
def test_processors_without_wide_vectors(monkeypatch, other_compiler):
    other_compiler(native._compiler())
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx512f"))
    for weight in (
        spqr(45, 100),
        spqr(70, 531, scale_bits=5),
        grouped(45, 300),
        bcq(45, 300),
        bcq(7, 100, group_size=8),
    ):
        assert weight._product.library.acc_lanes() == 8
        x = torch.randn(3, weight.shape[1])
        assert_product(weight.matmul(x), x, weight.dequantize())
