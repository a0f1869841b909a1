"""The Triton kernel for bit planes equals its torch definition: on a GPU where there is one, else interpreted."""

import pytest
import torch
from acc.formats.bcq import BcqWeight
from acc.kernels import bcq_triton
from acc.kernels.base import pick

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.usefixtures("poison")


def made(shape, bits=3, group_size=32, scales="free", scale_dtype="float16", seed=0):
    """A weight of random planes, and `x` for it has to be drawn apart."""
    rows, columns = shape
    draw = torch.Generator().manual_seed(rows + columns + seed)
    groups = 1 if group_size == -1 else -(-columns // group_size)
    dtype = getattr(torch, scale_dtype)
    scheme = {"bits": bits, "group_size": group_size, "scales": scales, "scale_dtype": scale_dtype}
    codes = torch.randint(0, 1 << bits, shape, generator=draw)
    if scales == "codes":
        scale = torch.randint(0, 256, (groups, bits, rows), generator=draw, dtype=torch.uint8)
        offset = torch.randint(0, 256, (groups, rows), generator=draw, dtype=torch.uint8)
        stat = (torch.rand(2, rows, generator=draw) / 100).to(dtype)
        return BcqWeight.encode(codes, scale, offset, stat, scheme)
    size = (groups, rows) if scales == "even" else (groups, bits, rows)
    scale = (torch.rand(size, generator=draw) + 0.1).to(dtype)
    offset = (torch.randint(-8, 8, (groups, rows), generator=draw) + 0.5).to(dtype)
    return BcqWeight.encode(codes, scale, offset, None, scheme)


def check(monkeypatch, weight, lead, dtype):
    x = torch.randn(*lead, weight.shape[1], generator=torch.Generator().manual_seed(9)).to(dtype).to(DEVICE)
    operands = {k: None if t is None else t.to(DEVICE) for k, t in weight.operands().items()}
    results = []
    for forced in ("reference", "triton"):
        monkeypatch.setenv("ACC_KERNELS", forced)
        results.append(pick("bcq", device=DEVICE, **weight.numbers())(x, **operands, **weight.numbers()))
    expected, actual = results
    assert actual.shape == expected.shape == (*lead, weight.shape[0])
    assert actual.dtype == dtype
    assert torch.isfinite(actual).all()
    if expected.numel():
        error = (actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_number_of_planes(monkeypatch, bits):
    for tokens in (1, 2):
        check(monkeypatch, made((13, 40), bits=bits), (tokens,), torch.float32 if tokens == 1 else torch.float16)


@pytest.mark.parametrize(
    ("shape", "tokens", "dtype"),
    [
        ((1, 8), 1, torch.float32),
        ((7, 33), 2, torch.bfloat16),
        ((63, 100), 17, torch.bfloat16),
        ((100, 300), 1, torch.bfloat16),
        ((7, 1100), 1, torch.float16),
        ((7, 500), 3, torch.float32),
        ((2000, 7), 1, torch.float16),
        ((17, 96), 64, torch.float16),
    ],
    ids=str,
)
def test_odd_shapes_in_every_type(monkeypatch, shape, tokens, dtype):
    check(monkeypatch, made(shape), (tokens,), dtype)


@pytest.mark.parametrize("scales", ["free", "codes", "even"])
@pytest.mark.parametrize("group_size", [8, 24, 32, 128, -1, 5])
def test_group_sizes_and_what_is_stored_of_them(monkeypatch, scales, group_size):
    weight = made((9, 150), group_size=group_size, scales=scales)
    for tokens in (1, 5):
        check(monkeypatch, weight, (tokens,), torch.float32 if tokens == 1 else torch.float16)


def test_batch_dimensions_and_more_rows_than_fit_at_once(monkeypatch):
    weight = made((11, 40))
    for lead in ((), (2, 3), (2, 0), (1, 1, 1)):
        check(monkeypatch, weight, lead, torch.float16)
    monkeypatch.setattr(bcq_triton, "TOKENS_AT_ONCE", 64)
    check(monkeypatch, weight, (100,), torch.float16)


@pytest.mark.parametrize("tokens", [1, 4])
def test_massive_activations_do_not_overflow(monkeypatch, tokens):
    """Partial sums are far outside of float16; the result is not."""
    weight = made((5, 256), scale_dtype="bfloat16")
    (weight.scale.mul_(1e-4), weight.offset.mul_(1e-4))
    x = 1e4 * torch.ones(tokens, 256, device=DEVICE).half()
    operands = {k: None if t is None else t.to(DEVICE) for k, t in weight.operands().items()}
    monkeypatch.setenv("ACC_KERNELS", "triton")
    y = pick("bcq", device=DEVICE)(x, **operands, **weight.numbers())
    torch.testing.assert_close(y.float(), x.float() @ weight.dequantize().to(DEVICE).T, rtol=2e-3, atol=1e-2)


def test_equal_calls_give_equal_bits(monkeypatch):
    weight = made((37, 1290))
    operands = {k: None if t is None else t.to(DEVICE) for k, t in weight.operands().items()}
    monkeypatch.setenv("ACC_KERNELS", "triton")
    product = pick("bcq", device=DEVICE)
    for tokens in (1, 3):
        x = torch.randn(tokens, 1290, device=DEVICE).half()
        assert torch.equal(product(x, **operands, **weight.numbers()), product(x, **operands, **weight.numbers()))


def test_the_operator_is_what_its_schema_and_fake_say():
    weight = made((20, 64), scales="codes")
    tensors = [t.to(DEVICE) for t in (weight.codes, weight.scale, weight.offset, weight.stat)]
    arguments = (torch.randn(3, 64, device=DEVICE), *tensors, *weight.numbers().values())
    assert list(weight.numbers()) == ["bits", "group_size"]
    torch.library.opcheck(bcq_triton.bcq_product, arguments, test_utils=("test_schema", "test_faketensor"))


def test_refusals_say_why():
    assert "not made for xpu" in str(bcq_triton.refuses("xpu"))
    weight = made((8, 64))
    with pytest.raises(ValueError, match="float64"):
        bcq_triton.bcq(torch.randn(2, 64).double(), **weight.operands(), **weight.numbers())
