"""Chosen keys against a masked softmax in float64, by the same tensors; the Triton kernel against the definition."""

import pytest
import torch
from acc.kernels.attention_index import (
    adaptive_index,
    block_index,
    estimate_blocks,
    estimate_vertical_slash,
    stack,
    streaming_index,
    vertical_slash_index,
)
from acc.kernels.attention_sparse import attention_sparse
from acc.kernels.base import pick

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

pytestmark = pytest.mark.usefixtures("poison")


def inputs(batch, heads, key_heads, rows, keys, width, value_width=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + keys + width)
    key_shape = batch, key_heads, keys, width
    shapes = (batch, heads, rows, width), key_shape, (*key_shape[:3], value_width or width)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def poisoned(index):
    """The same index; what lies behind the counts is no offset and no column."""
    counts = index.block_count, index.column_count
    for count, tensor in zip(counts, (index.block_offset, index.column_index), strict=True):
        tensor[torch.arange(tensor.shape[-1], device=count.device) >= count[..., None]] = 1 << 30
    return index


def index_of(kind, query, key, scaling=0.3):
    """An index of small budgets, so that most keys are left out."""
    (batch, heads, rows, _), keys = query.shape, key.shape[2]
    number = torch.arange(heads, device=query.device)
    if kind == "vertical-slash":
        sums = estimate_vertical_slash(query, key, scaling=scaling)
        return vertical_slash_index(*sums, 66 + 5 * number, 1 + 3 * number, rows)
    if kind == "blocks":
        return block_index(estimate_blocks(query, key, scaling=scaling), 1 + number, rows, keys)
    if kind == "streaming":
        return streaming_index(3 * number, 1 + 60 * number, rows, keys, batch)
    if kind == "adaptive":
        return adaptive_index(query, key, scaling=scaling, gamma=0.3, tau=0.5, min_budget=64)
    dense = streaming_index(0 * number[:1], 0 * number[:1] + keys, rows, keys, batch)
    parts = [([0], dense)]
    for i, other in enumerate(("vertical-slash", "blocks", "streaming")):
        if i + 1 < heads:
            index = index_of(other, query, key)
            parts.append(([i + 1], type(index)(*(tensor[:, i + 1 : i + 2] for tensor in index))))
    return stack(parts)


def masked(query, key, value, index, scaling):
    """Softmax in float64 over the keys that the index names for each row."""
    (batch, heads, rows, _), keys = query.shape, key.shape[2]
    group = heads // key.shape[1]
    out = torch.zeros(batch, heads, rows, value.shape[-1], dtype=torch.float64, device=query.device)
    for b in range(batch):
        for h in range(heads):
            for t in range(rows):
                r, p = t // 64, keys - rows + t
                offsets = index.block_offset[b, h, r, : index.block_count[b, h, r]].tolist()
                seen = [j for o in offsets for j in range(o, o + 64)]
                seen += index.column_index[b, h, r, : index.column_count[b, h, r]].tolist()
                seen = [j for j in seen if 0 <= j <= p]
                k, v = (x[b, h // group, seen].double() for x in (key, value))
                out[b, h, t] = torch.softmax(scaling * k @ query[b, h, t].double(), 0) @ v
    return out


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


KINDS = ["vertical-slash", "blocks", "streaming", "adaptive", "several"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 300), (50, 50), (130, 130), (100, 263)], ids=str)
def test_equals_the_masked_softmax(rows, keys, kind):
    query, key, value = inputs(2, 4, 2, rows, keys, 16, 24)
    index = poisoned(index_of(kind, query, key))
    actual = attention_sparse(query, key, value, *index, scaling=0.3)
    assert_close(actual, masked(query, key, value, index, 0.3), 2e-6)


def test_slices_do_not_change_the_result(monkeypatch):
    query, key, value = inputs(1, 4, 2, 150, 200, 16)
    index = index_of("several", query, key)
    whole = attention_sparse(query, key, value, *index, scaling=0.3)
    monkeypatch.setattr("acc.kernels.attention_sparse.AT_ONCE", 1)
    assert torch.equal(attention_sparse(query, key, value, *index, scaling=0.3), whole)


@pytest.mark.parametrize("rows", [40, 300])
def test_a_budget_of_everything_is_dense(rows):
    query, key, value = inputs(1, 4, 2, rows, 300, 16)
    everything = torch.full((4,), 300, device=DEVICE)
    sums = estimate_vertical_slash(query, key, scaling=0.25)
    logits = 0.25 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    hidden = torch.arange(300, device=DEVICE) > torch.arange(300 - rows, 300, device=DEVICE)[:, None]
    dense = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1) @ value.repeat_interleave(2, 1)
    for index in (
        vertical_slash_index(*sums, everything, everything, rows),
        vertical_slash_index(*sums, everything, everything // 100, rows),  # columns alone
        block_index(estimate_blocks(query, key, scaling=0.25), everything, rows, 300),
        streaming_index(0 * everything, everything, rows, 300),
        adaptive_index(query, key, scaling=0.25, min_budget=300),
    ):
        actual = attention_sparse(query, key, value, *index, scaling=0.25)
        torch.testing.assert_close(actual, dense, rtol=1e-5, atol=1e-6)


def test_an_index_for_other_shapes_is_refused(monkeypatch):
    query, key, value = inputs(1, 2, 1, 70, 70, 16)
    index = index_of("blocks", query, key)
    with pytest.raises(ValueError, match="build the index for these shapes"):
        attention_sparse(query[:, :, 6:], key, value, *index, scaling=1.0)
    monkeypatch.setenv("ACC_KERNELS", "triton")
    with pytest.raises(ValueError, match="build the index for these shapes"):
        pick("attention_sparse", DEVICE)(query[:, :, 6:], key, value, *index, scaling=1.0)


# The Triton kernel

# kind, heads, key heads, rows, keys, head_dim, the values' head_dim, type
PROBLEMS = [
    ("vertical-slash", 2, 1, 1, 1, 16, 16, "float32"),
    ("several", 4, 1, 1, 400, 64, 64, "float16"),
    ("vertical-slash", 4, 2, 7, 300, 16, 40, "float32"),
    ("several", 4, 4, 63, 63, 80, 64, "bfloat16"),
    ("blocks", 4, 1, 100, 390, 32, 32, "float16"),
    ("vertical-slash", 4, 2, 200, 500, 24, 16, "float16"),
    ("adaptive", 2, 1, 200, 200, 16, 32, "bfloat16"),
    ("several", 4, 2, 200, 263, 16, 16, "float32"),
    ("blocks", 1, 1, 130, 330, 256, 256, "float16"),
    ("vertical-slash", 1, 1, 40, 700, 128, 128, "float16"),
    ("streaming", 2, 1, 100, 500, 16, 16, "bfloat16"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_equals_the_definition(monkeypatch, problem):
    kind, heads, key_heads, rows, keys, width, value_width, dtype = problem
    dtype = getattr(torch, dtype)
    tensors = inputs(2 if rows < 10 else 1, heads, key_heads, rows, keys, width, value_width, dtype)
    index = poisoned(index_of(kind, *tensors[:2]))
    monkeypatch.setenv("ACC_KERNELS", "triton")
    function = pick("attention_sparse", DEVICE, head_dim=width)
    assert function is not attention_sparse
    actual = function(*tensors, *index, scaling=0.3)
    assert actual.dtype == dtype
    assert_close(actual, attention_sparse(*tensors, *index, scaling=0.3).double(), TOLERANCE[dtype])


def test_strides_and_equal_calls(monkeypatch):
    """What the models hand over is `[B, T, H, D]`, transposed."""
    monkeypatch.setenv("ACC_KERNELS", "triton")
    function = pick("attention_sparse", DEVICE, head_dim=16)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(1, 4, 2, 20, 100, 16)]
    index = index_of("several", *tensors[:2])
    actual = function(*tensors, *index, scaling=1.0)
    assert torch.equal(actual, function(*tensors, *index, scaling=1.0))
    assert torch.equal(actual, function(*(x.contiguous() for x in tensors), *index, scaling=1.0))
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in index]
    assert torch.equal(actual, function(*tensors, *turned, scaling=1.0))


def test_the_operator_is_what_its_schema_and_fake_say():
    from acc.kernels.attention_sparse_triton import sparse

    query, key, value = inputs(1, 4, 2, 20, 90, 16, 24)
    arguments = (query, key, value, *index_of("several", query, key), 0.5)
    torch.library.opcheck(sparse, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_as_one_graph(monkeypatch):
    monkeypatch.setenv("ACC_KERNELS", "triton")
    function = pick("attention_sparse", DEVICE, head_dim=16)
    query, key, value = inputs(1, 2, 1, 20, 90, 16)
    index = index_of("blocks", query, key)

    def double(query):
        return 2 * function(query, key, value, *index, scaling=1.0)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query), double(query))
    torch._dynamo.reset()
