"""What holds for every method: the same bits every time, input left alone, no worse than rounding, always finite."""

import pytest
import torch
from acc.registry import listing, lookup

SHAPES = [(32, 64), (48, 96), (33, 40), (1, 8), (130, 264)]
WEIGHTS = {
    "random": lambda w: w,
    "zero": torch.zeros_like,
    "constant": lambda w: torch.full_like(w, 0.03),
    "constant rows": lambda w: w[:, :1].expand_as(w).contiguous(),
    "some rows zero": lambda w: w * (torch.arange(len(w)) % 3 > 0)[:, None],
    "one sided": lambda w: w.abs() + 0.5,
    "one huge weight": lambda w: torch.where(w == w.max(), 100.0, w),
    "tiny": lambda w: w * 1e-6,
    "vast": lambda w: w * 1e6,
}


def correlated(tokens, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    strength = torch.exp(torch.randn(features, generator=generator))
    return torch.randn(tokens, features, generator=generator) @ mix * strength


def statistics_of(method, x, features):
    made = {name: lookup("calibrate", name)(features) for name in method.needs}
    for statistic in made.values():
        statistic.update(x)
    return made


def weight_of(shape, kind="random"):
    return WEIGHTS[kind](0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])))


def compress(method, weight, x):
    events = []
    event = lambda kind, **fields: events.append((kind, fields))  # noqa: E731
    prepared = method.prepare(statistics_of(method, x, weight.shape[1]), event)
    return method.compress(weight, prepared, event), events


def output_error(packed, weight, x):
    return float((x.double() @ (packed.dequantize().double() - weight.double()).T).square().sum())


@pytest.fixture(params=listing("compress", "Method"))
def method(request):
    return lookup("compress", request.param)()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_every_time_and_input_left_alone(method, shape):
    x, weight = correlated(200, shape[1]), weight_of(shape)
    before_x, before = x.clone(), weight.clone()
    first, _ = compress(method, weight, x)
    second, _ = compress(method, weight, x)
    assert torch.equal(weight, before)
    assert torch.equal(x, before_x)
    assert first.scheme == second.scheme
    assert first.name == method.format
    for suffix, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[suffix])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 1], ids=str)
def test_no_worse_than_rounding_in_the_same_format(method, shape):
    """What knows the inputs errs less at the output than the same method that has seen none."""
    x, weight = correlated(4 * shape[1], shape[1]), weight_of(shape)
    informed, _ = compress(method, weight, x)
    ignorant, _ = compress(method, weight, x[:0])
    assert output_error(informed, weight, x) <= 1.0001 * output_error(ignorant, weight, x)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("inputs", ["random", "none", "zero", "one token", "some dead"])
def test_whatever_comes_the_result_is_finite_and_close(method, kind, inputs):
    shape = (40, 72)
    x, weight = correlated(200, shape[1]), weight_of(shape, kind)
    x = {"random": x, "none": x[:0], "zero": 0 * x, "one token": x[:1]}.get(inputs, x)
    if inputs == "some dead":
        x[:, ::5] = 0
    packed, _ = compress(method, weight, x)
    packed.check()
    dense = packed.dequantize()
    assert torch.isfinite(dense).all()
    if kind == "zero":
        assert not dense.any()
    elif inputs == "random":
        nothing = float((x.double() @ weight.double().T).square().sum())
        assert output_error(packed, weight, x) < 0.1 * nothing


def test_constant_weights_are_exact_up_to_the_scale_s_own_rounding(method):
    """At the output; single weights may differ more, where they make up for what was lost in others."""
    x = correlated(200, 64)
    for kind, at_output, each in (("constant", 2**-10, 2**-7), ("constant rows", 2**-4, 2**-2)):
        weight = weight_of((32, 64), kind)
        packed, _ = compress(method, weight, x)
        everything = float((x.double() @ weight.double().T).square().sum())
        assert output_error(packed, weight, x) <= at_output**2 * everything
        assert ((packed.dequantize() - weight).abs() <= each * weight.abs().max()).all()


def test_bfloat16_weights_are_taken(method):
    x, weight = correlated(200, 64), weight_of((32, 64)).bfloat16()
    assert torch.equal(compress(method, weight, x)[0].dequantize(), compress(method, weight.float(), x)[0].dequantize())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_known_before_any_data(method, shape):
    """Exactly, up to what only the data decides, and that exactly too once it is told."""
    packed, _ = compress(method, weight_of(shape), correlated(4 * shape[1], shape[1]))
    scheme, counts = method.planned(shape)
    made = sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors().values())
    assert scheme == packed.scheme
    assert counts.keys() == packed.counts().keys()
    assert packed.nbytes(shape, scheme, **packed.counts()) == made
    assert method.planned_bytes(shape) == packed.nbytes(shape, scheme, **counts)
