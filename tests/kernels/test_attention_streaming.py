"""Sinks and a window against an explicit mask in float64; the Triton kernel against the definition."""

import pytest
import torch
from acc.kernels.attention_streaming import attention_streaming
from acc.kernels.base import pick

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

pytestmark = pytest.mark.usefixtures("poison")


def inputs(batch, heads, key_heads, rows, keys, width, value_width=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + keys + width)
    shapes = (
        (batch, heads, rows, width),
        (batch, key_heads, keys, width),
        (batch, key_heads, keys, value_width or width),
    )
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def masked(query, key, value, mask, scaling):
    """Softmax over the keys that the mask `[H, T, S]` shows, in float64."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    logits = scaling * query.double() @ key.transpose(-1, -2)
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), -1) @ value


def visible(sink, recent, rows, keys, group):
    """bool `[H, T, S]`, by the definition, one pair after the other."""
    mask = torch.zeros(len(sink) * group, rows, keys, dtype=torch.bool)
    for h in range(len(sink) * group):
        for t in range(rows):
            p = keys - rows + t
            for j in range(p + 1):
                mask[h, t, j] = j < sink[h // group] or p - j < recent[h // group]
    return mask.to(DEVICE)


def settings(sink, recent, scaling=0.3):
    integers = {"dtype": torch.int32, "device": DEVICE}
    return {"sink": torch.tensor(sink, **integers), "recent": torch.tensor(recent, **integers), "scaling": scaling}


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


WINDOWS = [((0, 0), (1, 5)), ((4, 130), (64, 1)), ((1, 70), (100, 33)), ((0, 9999), (9999, 7)), ((3, 64), (128, 300))]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 90), (7, 7), (65, 180), (150, 150)], ids=str)
def test_equals_the_mask(rows, keys, window):
    tensors = inputs(2, 4, 2, rows, keys, 16, 24)
    actual = attention_streaming(*tensors, **settings(*window))
    mask = visible(*window, rows, keys, 2)
    assert_close(actual, masked(*tensors, mask, 0.3), 2e-6)


def test_a_window_of_all_keys_is_dense():
    query, key, value = inputs(2, 6, 2, 333, 333, 16)
    actual = attention_streaming(query, key, value, **settings([0, 5], [333, 400], scaling=0.25))
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(actual, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["reference", "triton"])
def test_chunks_equal_the_whole(monkeypatch, way):
    monkeypatch.setenv("ACC_KERNELS", way)
    function = pick("attention_streaming", DEVICE, head_dim=16)
    query, key, value = inputs(1, 2, 1, 140, 140, 16)
    window = settings([5], [70])
    whole = function(query, key, value, **window)
    for begin, end in ((0, 1), (1, 70), (130, 131)):
        part = function(query[:, :, begin:end], key[:, :, :end], value[:, :, :end], **window)
        torch.testing.assert_close(part, whole[:, :, begin:end], rtol=1e-5, atol=1e-6)


def test_the_definition_has_the_gradient_of_the_mask():
    tensors = [x.requires_grad_() for x in inputs(1, 4, 2, 70, 90, 16)]
    weight = torch.randn(1, 4, 70, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    actual = torch.autograd.grad((attention_streaming(*tensors, **settings([3, 0], [20, 64])) * weight).sum(), tensors)
    mask = visible([3, 0], [20, 64], 70, 90, 2)
    expected = torch.autograd.grad((masked(*tensors, mask, 0.3) * weight).sum(), tensors)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_head_without_a_window_and_queries_without_keys_are_refused():
    with pytest.raises(ValueError, match="at least 1 recent token"):
        attention_streaming(*inputs(1, 2, 2, 5, 5, 16), **settings([1, 1], [3, 0]))
    with pytest.raises(ValueError, match="must be the last of the keys' tokens"):
        attention_streaming(*inputs(1, 2, 2, 6, 5, 16), **settings([1, 1], [3, 1]))


# The Triton kernel

# heads, key heads, rows, keys, head_dim, the values' head_dim, type, sinks and windows
PROBLEMS = [
    (2, 1, 1, 1, 16, 16, "float32", (0,), (1,)),
    (4, 1, 1, 300, 64, 64, "float16", (4,), (100,)),
    (4, 2, 7, 70, 16, 40, "float32", (3, 0), (20, 1)),
    (2, 2, 63, 63, 80, 64, "bfloat16", (70, 3), (9, 63)),
    (2, 1, 100, 229, 32, 32, "float16", (65,), (66,)),
    (4, 2, 200, 200, 24, 16, "float32", (130, 1), (1, 150)),
    (2, 2, 200, 450, 16, 32, "bfloat16", (9999, 64), (3, 129)),
    (1, 1, 130, 130, 256, 256, "float16", (2,), (40,)),
    (1, 1, 40, 400, 128, 128, "float16", (10,), (9999,)),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_equals_the_definition(monkeypatch, problem):
    heads, key_heads, rows, keys, width, value_width, dtype, sink, recent = problem
    dtype = getattr(torch, dtype)
    tensors = inputs(2 if rows < 10 else 1, heads, key_heads, rows, keys, width, value_width, dtype)
    monkeypatch.setenv("ACC_KERNELS", "triton")
    function = pick("attention_streaming", DEVICE, head_dim=width)
    assert function is not attention_streaming
    actual = function(*tensors, **settings(sink, recent))
    assert actual.dtype == dtype
    assert_close(actual, attention_streaming(*tensors, **settings(sink, recent)).double(), TOLERANCE[dtype])


def test_strides_and_equal_calls(monkeypatch):
    """What the models hand over is `[B, T, H, D]`, transposed."""
    monkeypatch.setenv("ACC_KERNELS", "triton")
    function = pick("attention_streaming", DEVICE, head_dim=16)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(2, 2, 1, 40, 50, 16)]
    window = settings([3], [20])
    actual = function(*tensors, **window)
    assert torch.equal(actual, function(*tensors, **window))
    assert torch.equal(actual, function(*(x.contiguous() for x in tensors), **window))
    wide = [torch.cat([x, x], -1)[..., ::2] for x in tensors]
    assert_close(function(*wide, **window), attention_streaming(*wide, **window).double(), 2e-6)


def test_the_operator_is_what_its_schema_and_fake_say():
    from acc.kernels.attention_streaming_triton import streaming

    window = settings([3, 0], [20, 64])
    arguments = (*inputs(1, 4, 2, 20, 30, 16, 24), window["sink"], window["recent"], 0.5)
    torch.library.opcheck(streaming, arguments, test_utils=("test_schema", "test_faketensor"))


def test_types_and_devices_that_it_has_no_kernel_for(monkeypatch):
    monkeypatch.setenv("ACC_KERNELS", "triton")
    with pytest.raises(ValueError, match="head_dim is 320"):
        pick("attention_streaming", DEVICE, head_dim=320)
    with pytest.raises(ValueError, match=r"query is torch\.float64"):
        pick("attention_streaming", DEVICE)(*(x.double() for x in inputs(1, 1, 1, 4, 4, 16)), **settings([0], [1]))
    monkeypatch.delenv("ACC_KERNELS")
    if DEVICE == "cpu":
        assert pick("attention_streaming", DEVICE, head_dim=64) is attention_streaming
