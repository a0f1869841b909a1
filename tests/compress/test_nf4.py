"""NF4 and LLM.int8's weights: bitsandbytes' own numbers, and what double quantisation costs."""

from __future__ import annotations

import pytest
import torch
from acc.calibrate.hessian import Hessian
from acc.compress.int8 import Int8
from acc.compress.nf4 import Nf4
from acc.kernels.nf4 import dynamic_map, levels

functional = pytest.importorskip("bitsandbytes.functional")
SHAPES = [(64, 128), (33, 40), (130, 300), (1, 8)]


def silent(*_, **__):
    pass


def weight_of(shape):
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


def test_the_tables_are_bitsandbytes():
    assert torch.equal(levels(), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_bit_for_bit_what_bitsandbytes_makes(shape):
    weight = weight_of(shape)
    packed = Nf4().compress(weight, None, silent)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(packed.codes, codes.flatten())
    assert torch.equal(packed.absmax, state.absmax)
    assert torch.equal(packed.dequantize(), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_double_quantisation_codes_fit_the_scales_as_stored(shape):
    """Plain loops in float64: every code is the nearest there is, for the scale that the file holds."""
    weight = weight_of(shape)
    packed = Nf4(double_quant=True).compress(weight, None, silent)
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed.nested_absmax, state.state2.absmax)
    assert torch.equal(packed.offset[0], state.offset)
    table, tree = levels().double().tolist(), dynamic_map().double().tolist()
    dense, flat = packed.dequantize().double().flatten(), weight.double().flatten()
    for place in range(0, len(flat), 7):
        block = place // 64
        scale = tree[int(packed.absmax[block])] * float(packed.nested_absmax[block // 256]) + float(packed.offset)
        best = min(abs(level * scale - float(flat[place])) for level in table)
        assert abs(float(dense[place]) - float(flat[place])) <= best + 1e-7


def gathered(x):
    statistic = Hessian(x.shape[1])
    statistic.update(x)
    return {"hessian": statistic}


@pytest.mark.parametrize("double", [False, True])
def test_activation_aware_errs_less_at_the_output(double):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(800, 192, generator=generator) @ torch.randn(192, 192, generator=generator)
    x = x * torch.exp(torch.randn(192, generator=generator))
    weight = weight_of((48, 192))
    errors = []
    for aware in (False, True):
        method = Nf4(double_quant=double, activation_aware=aware)
        assert method.needs == (("hessian",) if aware else ())
        packed = method.compress(weight, method.prepare(gathered(x), silent), silent)
        errors.append(float((x.double() @ (packed.dequantize() - weight).double().T).square().sum()))
    assert errors[1] < 0.6 * errors[0]


def test_activation_aware_is_the_textbook_loop():
    """The inverse of what remains, explicitly and in float64, column after column."""
    x = torch.randn(500, 128, generator=torch.Generator().manual_seed(1))
    weight = weight_of((4, 128))
    method = Nf4(activation_aware=True)
    packed = method.compress(weight, method.prepare(gathered(x), silent), silent)
    hessian = 2 * (x.double().T @ x.double()) / len(x)
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(128)
    left, scales = weight.double().clone(), packed.absmax.double().view(4, 2)
    table, made = levels().double(), torch.empty(4, 128, dtype=torch.float64)
    for j in range(128):
        inverse = torch.linalg.inv(hessian[j:, j:])
        scale = scales[:, j // 64]
        made[:, j] = table[(left[:, j, None] / scale[:, None] - table).abs().argmin(1)] * scale
        left[:, j:] -= ((left[:, j] - made[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    assert float((packed.dequantize().double() - made).abs().max()) < 1e-6
    greatest = weight.abs().view(4, 2, 64).amax(-1)
    assert ((0.69 < scales / greatest) & (scales / greatest < 1.06)).all()


def test_blocks_that_end_in_the_next_row_are_rounded_and_said_to_be():
    events = []
    method = Nf4(activation_aware=True)
    weight = weight_of((33, 40))
    prepared = method.prepare(gathered(torch.randn(90, 40)), silent)
    packed = method.compress(weight, prepared, lambda kind, **fields: events.append((kind, fields["reason"])))
    assert events == [("rounding", "40 inputs are no multiple of 64")]
    assert torch.equal(packed.codes, Nf4().compress(weight, None, silent).codes)


def test_int8_is_bit_for_bit_what_bitsandbytes_makes():
    weight = weight_of((64, 96)).half()
    packed = Int8().compress(weight, None, silent)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight)
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.absmax, absmax)
    assert torch.equal(packed.dequantize(), functional.int8_vectorwise_dequant(codes, absmax))


def test_each_knows_one_width():
    for method, bits in ((Nf4, 4), (Int8, 8)):
        assert method().bits == bits
        with pytest.raises(ValueError, match=f"Input should be {bits}"):
            method(bits=3)
