"""What holds for every format: what is written is what was declared, and what is read back is what was written."""

import json

import pytest
import torch
from acc.calibrate.hessian import Hessian
from acc.formats.base import format_of
from acc.registry import listing, lookup
from safetensors.torch import load_file, save_file

METHODS = {name: lookup("compress", name) for name in listing("compress", "Method")}
SHAPES = [(16, 64), (33, 40), (1, 8), (130, 300)]


def silent(*_, **__):
    pass


def example(format_name, shape):
    """A packed weight of the format, made by a method that makes it."""
    for method in METHODS.values():
        if method.format == format_name:
            generator = torch.Generator().manual_seed(shape[0])
            statistics = {"hessian": Hessian(shape[1])}
            statistics["hessian"].update(torch.randn(3 * shape[1], shape[1], generator=generator))
            weight = 0.05 * torch.randn(shape, generator=generator)
            return method().compress(weight, method().prepare(statistics, silent), silent)
    pytest.skip(f"no method makes {format_name}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", listing("formats"))
def test_layout_is_what_was_encoded(name, shape):
    packed = example(name, shape)
    assert packed.shape == shape
    assert packed.name == name == packed.scheme["format"]
    assert format_of(packed.scheme) is type(packed)
    layout = type(packed).layout(packed.shape, packed.scheme)
    tensors = packed.tensors()
    assert layout.keys() == tensors.keys()
    assert "" in tensors
    for suffix, (size, dtype) in layout.items():
        assert tensors[suffix].dtype == dtype
        assert len(size) == tensors[suffix].dim()
        assert all(n in (None, m) for n, m in zip(size, tensors[suffix].shape, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", listing("formats"))
def test_the_same_bits_after_a_round_trip_through_a_file(tmp_path, name, shape):
    packed = example(name, shape)
    save_file({f"w{suffix}": tensor for suffix, tensor in packed.tensors().items()}, tmp_path / "w.safetensors")
    read = {key.removeprefix("w"): tensor for key, tensor in load_file(tmp_path / "w.safetensors").items()}
    scheme = json.loads(json.dumps(packed.scheme))
    again = type(packed).from_tensors(read, shape, scheme)
    again.check()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(again.dequantize(dtype), packed.dequantize(dtype))
        assert torch.equal(packed.dequantize(dtype), packed.dequantize().to(dtype))
    assert again.dequantize().is_contiguous()


@pytest.mark.parametrize("name", listing("formats"))
def test_stacked_matrices_come_apart_again(name):
    parts = [example(name, (33, 40)) for _ in range(3)]
    cls = type(parts[0])
    for part, again in zip(parts, cls.unstack(cls.stack(parts), 3, (33, 40), parts[0].scheme), strict=True):
        again.check()
        assert torch.equal(part.dequantize(), again.dequantize())
    stacked = cls.stack(parts)
    with pytest.raises(ValueError, match=r"does not split in 3 parts|expected"):
        cls.unstack(stacked | {"": stacked[""][:-1]}, 3, (33, 40), parts[0].scheme)


@pytest.mark.parametrize("name", listing("formats"))
def test_missing_extra_and_misshapen_tensors_are_named(name):
    packed = example(name, (33, 40))
    tensors, cls = packed.tensors(), type(packed)
    for suffix in tensors:
        rest = {s: t for s, t in tensors.items() if s != suffix}
        with pytest.raises(ValueError, match="difference"):
            cls.from_tensors(rest, packed.shape, packed.scheme)
        with pytest.raises(ValueError, match="expected"):
            cls.from_tensors(tensors | {suffix: tensors[suffix].double()}, packed.shape, packed.scheme)
        with pytest.raises(ValueError, match="expected"):
            cls.from_tensors(tensors | {suffix: tensors[suffix][None]}, packed.shape, packed.scheme)
    with pytest.raises(ValueError, match="_other"):
        cls.from_tensors(tensors | {"_other": tensors[""]}, packed.shape, packed.scheme)


@pytest.mark.parametrize("name", listing("formats"))
def test_check_finds_what_is_not_finite(name):
    packed = example(name, (33, 40))
    packed.check()
    floats = [s for s, t in packed.tensors().items() if t.is_floating_point() and t.numel()]
    for suffix in floats:
        for bad in (torch.nan, torch.inf):
            tensors = {s: t.clone() for s, t in packed.tensors().items()}
            tensors[suffix].view(-1)[-1] = bad
            with pytest.raises(ValueError, match=name):
                type(packed).from_tensors(tensors, packed.shape, packed.scheme).check()


@pytest.mark.parametrize("name", listing("formats"))
def test_stored_bits_are_the_nominal_ones_but_for_padding_and_bookkeeping(name):
    packed = example(name, (130, 300))
    outliers = packed.tensors().get("_outlier_value", torch.empty(0)).numel()
    nominal = packed.nominal_bits(packed.shape, packed.scheme, outliers=outliers)
    assert nominal <= packed.stored_bits <= 1.15 * nominal


@pytest.mark.parametrize("name", listing("formats"))
def test_a_scheme_from_disk_is_not_trusted(name):
    packed = example(name, (33, 40))
    cls = type(packed)
    for key, value in packed.scheme.items():
        rest = {k: v for k, v in packed.scheme.items() if k != key}
        if key != "format":
            with pytest.raises((ValueError, KeyError)):
                cls.from_tensors(packed.tensors(), packed.shape, rest)
        if key == "bits" or key.endswith("dtype"):
            bad = 9 if isinstance(value, int) else "load"
            with pytest.raises((ValueError, KeyError)):
                cls.layout(packed.shape, rest | {key: bad})
