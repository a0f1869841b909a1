"""Sparse decoding: labels, selection and exact attention over what was selected, against loops in float64.

The Triton kernels equal their torch definitions: on a GPU where there is one, else in Triton's interpreter.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from acc.kernels import attention_gather_triton, attention_label_triton, attention_select_triton, chosen_triton
from acc.kernels.attention_gather import attention_gather
from acc.kernels.attention_label import attention_label
from acc.kernels.attention_select import attention_select
from acc.kernels.base import pick
from acc.kernels.chosen import chosen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of a rounding to that type
STEP = ["attention_label", "attention_select", "chosen", "attention_gather"]

pytestmark = pytest.mark.usefixtures("poison")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def channels_of(kv_heads, dim, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(dim, generator=generator)[:count] for _ in range(kv_heads)])


def step_of(key, channels, bits):
    """The step `[Hkv, C]` with which no key is beyond the codes."""
    most = key.float().abs().amax((0, 2)).gather(1, channels.to(key.device))
    return most / (2 ** (min(bits, 8) - 1) - 1)


def numbers_of(label, scale, bits):
    """What labels stand for, float64 `[B, Hkv, S, C]`, read byte by byte as the docstring describes them."""
    if bits == 16:
        return label.double()
    codes = label.int()
    if bits == 4:
        codes = torch.cat([codes % 16, codes // 16], dim=-1)
    return (codes.double() - 2 ** (bits - 1)) * scale.double()[:, None]


def mass_by_loops(query, numbers, channels, scaling):
    """The attention that each token gets from its group, float64 `[B, Hkv, S]`."""
    (batch, kv_heads, length, _), heads = numbers.shape, query.shape[1]
    mass = torch.zeros(batch, kv_heads, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h * kv_heads // heads
            score = [scaling * query[b, h, channels[kv]].double() @ numbers[b, kv, s] for s in range(length)]
            mass[b, kv] += torch.stack(score).softmax(0)
    return mass


def attention_by_loops(query, key, value, sets, scaling):
    """Attention of each query over the tokens in `sets[b][kv]` up to its own position, float64 `[B, H, T, Dv]`."""
    (batch, heads, count, _), (kv_heads, length) = query.shape, key.shape[1:3]
    out = torch.zeros(batch, heads, count, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h * kv_heads // heads
            for t in range(count):
                seen = [j for j in sets[b][kv] if j <= length - count + t]
                keys, values = key[b, kv, seen].double(), value[b, kv, seen].double()
                out[b, h, t] = (scaling * keys @ query[b, h, t].double()).softmax(0) @ values
    return out


def error(actual, expected):
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def problem(batch=1, kv_heads=2, group=2, length=40, dim=16, count=1, dim_v=None, dtype=torch.float32, seed=0):
    """query `[B, H, T, D]`, key and value."""
    return (
        random(batch, kv_heads * group, count, dim, seed=seed).to(dtype),
        random(batch, kv_heads, length, dim, seed=seed + 1).to(dtype),
        random(batch, kv_heads, length, dim_v or dim, seed=seed + 2).to(dtype),
    )


# Labels


@pytest.mark.parametrize("bits", [4, 8])
def test_a_label_is_within_half_a_step_or_at_the_end_of_the_codes(bits):
    _, key, _ = problem(length=50)
    channels = channels_of(2, 16, 6)
    scale = 0.4 * step_of(key, channels, bits)  # some keys are beyond
    label = attention_label(key, channels, scale, bits=bits)
    assert label.dtype == torch.uint8
    assert label.shape == (1, 2, 50, 6 * bits // 8)
    exact = key.gather(3, channels[None, :, None].expand(1, -1, 50, -1)).double()
    step = scale.double()[:, None]
    end = (2 ** (bits - 1) - 1) * step
    inside = exact.abs() <= end
    assert 0 < inside.float().mean() < 1
    away = (numbers_of(label, scale, bits) - exact).abs()
    assert (away <= step * 0.500001)[inside].all()
    assert torch.equal(numbers_of(label, scale, bits)[~inside], (end * exact.sign())[~inside])


def test_ties_go_to_even_and_what_is_no_number_to_zero():
    key = torch.tensor([0.5, 1.5, -0.5, -2.5, torch.nan, torch.inf, -torch.inf, 3.0]).view(1, 1, 1, 8)
    scale = torch.ones(1, 8)
    scale[0, 7] = 0
    for function in (attention_label, attention_label_triton.attention_label):
        label = function(key.to(DEVICE), torch.arange(8, device=DEVICE)[None], scale.to(DEVICE), bits=8)
        assert (label.int() - 128).flatten().tolist() == [0, 2, 0, -2, 0, 127, -127, 0]


def test_labels_that_do_not_exist_are_refused():
    _, key, _ = problem()
    with pytest.raises(ValueError, match="labels of 2 bits: expected 4, 8 or 16"):
        attention_label(key, channels_of(2, 16, 4), torch.ones(2, 4), bits=2)
    with pytest.raises(ValueError, match="3 channels do not"):
        attention_label(key, channels_of(2, 16, 3), torch.ones(2, 3), bits=4)


# Scores


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_scores_are_the_expected_attention_of_the_group(bits, group):
    query, key, _ = problem(batch=2, group=group, length=33)
    channels = channels_of(2, 16, 6)
    scale = step_of(key, channels, bits)
    label = attention_label(key, channels, scale, bits=bits)
    score = attention_select(query[:, :, 0], label, channels, scale, bits=bits, scaling=0.3)
    expected = mass_by_loops(query[:, :, 0], numbers_of(label, scale, bits), channels, 0.3)
    assert error(score, expected) < 1e-6
    torch.testing.assert_close(score.sum(-1), torch.full((2, 2), float(group)))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_order_of_channels_does_not_matter(bits):
    query, key, _ = problem(length=33)
    channels = channels_of(2, 16, 8)
    scale = step_of(key, channels, bits)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    scores = []
    for chosen_channels, steps in ((channels, scale), (channels[:, order], scale[:, order])):
        label = attention_label(key, chosen_channels, steps, bits=bits)
        scores.append(attention_select(query[:, :, 0], label, chosen_channels, steps, bits=bits, scaling=0.25))
    torch.testing.assert_close(*scores)


def mass_kept(query, key, index, scaling):
    """Of the exact attention of each query head, summed over all, what falls on `index [B, Hkv, N]`."""
    batch, dim = query.shape[0], query.shape[-1]
    grouped = query.view(batch, key.shape[1], -1, dim).double()
    mass = (scaling * grouped @ key.double().mT).softmax(-1)
    return mass.gather(3, index.long()[:, :, None].expand(-1, -1, grouped.shape[2], -1)).sum().item()


@pytest.mark.parametrize("seed", range(5))
def test_with_all_channels_no_set_keeps_more_attention(seed):
    """A head that looks at a few tokens beside one that looks everywhere: the best of `score - maximum` loses."""
    query, key, _ = problem(group=2, length=200, seed=seed)
    query[:, ::2] *= 6  # the first head of each group is sharp, the second is not
    query[:, 1::2] *= 0.2
    query = query[:, :, 0]
    channels = torch.arange(16).expand(2, -1)
    label = attention_label(key, channels, torch.ones(2, 16), bits=16)
    score = attention_select(query, label, channels, torch.ones(2, 16), bits=16, scaling=0.25)
    kept = mass_kept(query, key, score.topk(12).indices, 0.25)
    exact = 0.25 * query.view(1, 2, 2, 16) @ key.mT
    best_of_heads = (exact - exact.amax(-1, keepdim=True)).amax(2)
    assert kept > mass_kept(query, key, best_of_heads.topk(12).indices, 0.25)
    for other in range(20):
        generator = torch.Generator().manual_seed(other)
        swapped = score.topk(12).indices.clone()
        swapped[..., other % 12] = torch.randint(200, (1,), generator=generator)
        unique = [len(set(row.tolist())) == 12 for row in swapped.flatten(0, 1)]
        if all(unique):
            assert kept >= mass_kept(query, key, swapped, 0.25) - 1e-12


def test_planted_channels_find_the_planted_tokens():
    query, key, value = problem(kv_heads=2, group=2, length=300, dim=32)
    query, key = 0.1 * query, 0.1 * key
    planted = channels_of(2, 32, 4)
    needles = torch.tensor([[17, 120, 250], [3, 99, 201]])
    for kv in range(2):
        query[0, 2 * kv : 2 * kv + 2, 0, planted[kv]] = 6
        key[0, kv][needles[kv][:, None], planted[kv]] = 6
    scale = step_of(key, planted, 4)
    label = attention_label(key, planted, scale, bits=4)
    score = attention_select(query[:, :, 0], label, planted, scale, bits=4, scaling=32**-0.5)
    index = chosen(score, tokens=8, sink=1, recent=2)
    for kv in range(2):
        assert set(needles[kv].tolist()) <= set(index[0, kv].tolist())
    sparse = attention_gather(query, key, value, index, scaling=32**-0.5)
    dense = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert error(sparse, dense) < 0.02


# The chosen tokens


def chosen_by_loops(score, tokens, sink, recent):
    length = len(score)
    always = {j for j in range(length) if j < sink or j >= length - recent}
    number = min(length, max(tokens, sink + recent))
    rank = sorted(set(range(length)) - always, key=lambda j: (-score[j], j))
    return sorted(always | set(rank[: number - len(always)]))


@pytest.mark.parametrize("way", ["reference", "triton"])
@pytest.mark.parametrize("length", [1, 8, 9, 133])
@pytest.mark.parametrize(("tokens", "sink", "recent"), [(8, 2, 3), (4, 2, 2), (1, 4, 4), (9, 0, 1), (0, 0, 1)])
def test_chosen_are_the_first_the_last_and_the_best(monkeypatch, way, length, tokens, sink, recent):
    monkeypatch.setenv("ACC_KERNELS", way)
    score = random(2, length)
    score = torch.stack([score, score.round(), 0 * score, score.abs().log().where(score > 0, -torch.inf)])
    index = pick("chosen", device=DEVICE)(score.to(DEVICE), tokens=tokens, sink=sink, recent=recent)
    assert index.dtype == torch.int32
    assert index.tolist() == [[chosen_by_loops(row.tolist(), tokens, sink, recent) for row in heads] for heads in score]
    assert (index[..., -1] == length - 1).all()


@pytest.mark.parametrize("way", ["reference", "triton"])
def test_a_score_that_is_no_number_chooses_no_token_that_is_not_there(monkeypatch, way):
    monkeypatch.setenv("ACC_KERNELS", way)
    score = random(1, 2, 50)
    score[0, 0, 10:30] = torch.nan
    score[0, 1] = torch.nan
    index = pick("chosen", device=DEVICE)(score.to(DEVICE), tokens=12, sink=1, recent=1)
    assert not set(range(10, 30)) & set(index[0, 0].tolist())
    assert index[0, 1].tolist() == [*range(11), 49]


@pytest.mark.parametrize("function", [chosen, chosen_triton.chosen])
def test_the_newest_token_cannot_be_left_out(function):
    with pytest.raises(ValueError, match="recent=0"):
        function(random(1, 1, 9), tokens=4, sink=1, recent=0)


@pytest.mark.parametrize("length", [64, 500])
def test_all_channels_at_16_bits_choose_the_exact_best(length):
    query, key, _ = problem(group=1, length=length)
    channels = channels_of(2, 16, 16)
    label = attention_label(key, channels, torch.ones(2, 16), bits=16)
    score = attention_select(query[:, :, 0], label, channels, torch.ones(2, 16), bits=16, scaling=0.25)
    index = chosen(score, tokens=20, sink=2, recent=4)
    exact = (query.double() @ key.double().mT)[:, :, 0]
    expected = [[chosen_by_loops(row.tolist(), 20, 2, 4) for row in heads] for heads in exact]
    assert index.tolist() == expected


# Attention over the chosen tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "count", "dim_v"), [(1, 1, 16), (4, 1, 24), (2, 3, 16), (1, 16, 8)])
def test_attention_over_some_tokens(dtype, group, count, dim_v):
    query, key, value = problem(batch=2, group=group, count=count, dim_v=dim_v, dtype=dtype)
    index = chosen(random(2, 2, 40), tokens=24, sink=2, recent=16)
    out = attention_gather(query, key, value, index, scaling=0.2)
    assert out.dtype == dtype
    assert error(out, attention_by_loops(query, key, value, index.tolist(), 0.2)) < TOLERANCE[dtype]


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_budget_of_all_tokens_is_dense_attention(length, bits):
    query, key, value = problem(length=length, group=4)
    channels = channels_of(2, 16, 4)
    scale = step_of(key, channels, bits)
    label = attention_label(key, channels, scale, bits=bits)
    score = attention_select(query[:, :, 0], label, channels, scale, bits=bits, scaling=0.25)
    sparse = attention_gather(query, key, value, chosen(score, tokens=40, sink=4, recent=8), scaling=0.25)
    dense = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert error(sparse, dense) < 1e-6


def in_larger_memory(tensor, layout):
    """The same numbers as a view of memory that holds NaN, or the greatest integer, all around them."""
    batch, heads, length, dim = tensor.shape
    shape = (batch + 1, heads + 1, length + 5, dim + 3 * (layout == "wide"))
    if layout == "tokens first":
        view = tensor.new_empty(batch + 1, length + 5, heads + 1, dim).transpose(1, 2)
    else:
        view = tensor.new_empty(shape)
    view = view[:batch, :heads, :length, :dim]
    return view.copy_(tensor)


@pytest.mark.parametrize("way", ["reference", "triton"])
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "wide"])
def test_memory_beyond_the_tokens_is_never_read(monkeypatch, way, layout):
    monkeypatch.setenv("ACC_KERNELS", way)
    functions = {op: pick(op, device=DEVICE) for op in STEP}
    query, key, value = (t.to(DEVICE) for t in problem(batch=2, length=37, group=2))
    channels = channels_of(2, 16, 4).to(DEVICE)
    scale = step_of(key, channels, 8)
    results = []
    for place in (lambda t: t.contiguous(), lambda t: in_larger_memory(t, layout)):
        label = functions["attention_label"](place(key), channels, scale, bits=8)
        score = functions["attention_select"](query[:, :, 0], place(label), channels, scale, bits=8, scaling=0.25)
        index = functions["chosen"](score, tokens=16, sink=1, recent=4)
        out = functions["attention_gather"](query, place(key), place(value), index, scaling=0.25)
        results.append((label, score, index, out))
    for compact, apart in zip(*results, strict=True):
        assert torch.isfinite(apart).all()
        assert torch.equal(compact, apart)


# The Triton kernels


def both(op, monkeypatch, *tensors, **numbers):
    """The results of the reference and of the kernel; the kernel's twice, the same bits."""
    tensors = [tensor.to(DEVICE) for tensor in tensors]
    monkeypatch.setenv("ACC_KERNELS", "reference")
    expected = pick(op, device=DEVICE)(*tensors, **numbers)
    monkeypatch.setenv("ACC_KERNELS", "triton")
    kernel = pick(op, device=DEVICE)
    actual = kernel(*tensors, **numbers)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, kernel(*tensors, **numbers))
    return expected, actual


def in_types(sizes, length):
    """Each size in every type, but a long one, for which the interpreter takes a while."""
    return [(size, dtype) for size in sizes for dtype in (DTYPES if size[length] < 100 else DTYPES[2:])]


# batch, KV heads, query heads per KV head, tokens, head dimension, channels
SIZES = [(1, 1, 1, 1, 8, 4), (1, 2, 4, 7, 16, 6), (2, 4, 1, 63, 12, 2), (1, 1, 2, 2000, 16, 8), (1, 4, 2, 100, 40, 34)]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("size", "dtype"), in_types(SIZES, 3), ids=str)
def test_labels_and_scores_of_the_kernels(monkeypatch, size, bits, dtype):
    batch, kv_heads, group, length, dim, count = size
    query, key, _ = problem(batch, kv_heads, group, length, dim, dtype=dtype)
    channels = channels_of(kv_heads, dim, count)
    scale = 0.7 * step_of(key, channels, bits)
    expected, label = both("attention_label", monkeypatch, key, channels, scale, bits=bits)
    assert torch.equal(expected, label)
    settings = {"bits": bits, "scaling": dim**-0.5}
    expected, score = both("attention_select", monkeypatch, query[:, :, 0], label, channels, scale, **settings)
    # on a GPU a query is rounded to 11 bits beside codes, and nothing more beside numbers of its own type
    assert error(score, expected) < (1e-5 if DEVICE == "cpu" else 5e-3)


# batch, KV heads, query heads per KV head, queries, tokens, chosen, head dimension, that of values
GATHERS = [
    (1, 1, 1, 1, 1, 1, 8, 8), (1, 2, 4, 1, 7, 7, 16, 24), (2, 4, 1, 1, 63, 33, 12, 12),
    (1, 2, 2, 1, 2000, 1000, 16, 16), (1, 2, 4, 3, 100, 63, 40, 16), (1, 1, 2, 16, 100, 37, 16, 80),
    (1, 1, 5, 16, 40, 20, 16, 16),
    (1, 1, 1, 1, 50, 40, 200, 256),
]  # fmt: skip


@pytest.mark.parametrize(("size", "dtype"), in_types(GATHERS, 4), ids=str)
def test_attention_of_the_kernel(monkeypatch, size, dtype):
    batch, kv_heads, group, count, length, tokens, dim, dim_v = size
    query, key, value = problem(batch, kv_heads, group, length, dim, count, dim_v, dtype)
    index = chosen(random(batch, kv_heads, length), tokens=tokens, sink=1, recent=min(count, length))
    expected, actual = both("attention_gather", monkeypatch, query, key, value, index, scaling=dim**-0.5)
    assert error(actual, expected) < TOLERANCE[dtype]


def test_chosen_of_the_kernel(monkeypatch):
    """Over several splits, with scores of every size, of which many are equal, some zeros of either sign, some NaN."""
    monkeypatch.setattr(chosen_triton, "BLOCK_S", 512)
    score = random(4, 1301)
    score[1] = 1 + 1e-6 * score[0]  # of which only the last bits differ
    score[2] = (4 * score[2]).round()
    score[3] = (1e30 * score[3]).where(score[3] > -1.5, torch.nan)
    small = torch.stack([score[0].softmax(-1), score[0].sign() * 0.0, -score[1], score[2] * 1e-42])
    for made in (score[None], small[None]):
        expected, actual = both("chosen", monkeypatch, made, tokens=500, sink=4, recent=32)
        assert torch.equal(expected, actual)


def test_more_splits_than_tokens_and_scores_far_from_zero(monkeypatch):
    query, key, value = problem(kv_heads=1, group=2, length=130)
    index = chosen(random(1, 1, 130), tokens=129, sink=1, recent=1)
    expected, actual = both("attention_gather", monkeypatch, 100 * query, key, value, index, scaling=3.0)
    assert error(actual, expected) < 1e-4
    channels = channels_of(1, 16, 16)
    label = attention_label(key, channels, torch.ones(1, 16), bits=16)
    arguments = (100 * query[:, :, 0], label, channels, torch.ones(1, 16))
    expected, actual = both("attention_select", monkeypatch, *arguments, bits=16, scaling=3.0)
    assert error(actual, expected) < 1e-4


def test_the_operators_are_what_their_schemas_and_fakes_say():
    query, key, value = (t.to(DEVICE) for t in problem())
    channels, scale = channels_of(2, 16, 4).to(DEVICE), torch.full((2, 4), 0.5, device=DEVICE)
    index = chosen(random(1, 2, 40).to(DEVICE), tokens=9, sink=1, recent=1)
    tests = ("test_schema", "test_faketensor")
    for bits in (4, 16):
        label = attention_label(key, channels, scale, bits=bits)
        torch.library.opcheck(attention_label_triton.label_op, (key, channels, scale, bits), test_utils=tests)
        arguments = (query[:, :, 0], label, channels, scale, bits, 0.25)
        torch.library.opcheck(attention_select_triton.select_op, arguments, test_utils=tests)
    torch.library.opcheck(chosen_triton.chosen_op, (random(1, 2, 40).to(DEVICE), 9, 1, 1), test_utils=tests)
    torch.library.opcheck(attention_gather_triton.gather_op, (query, key, value, index, 0.25), test_utils=tests)


def test_one_step_compiles_as_one_graph(monkeypatch):
    monkeypatch.setenv("ACC_KERNELS", "triton")
    label_of, select, choose, gather = (pick(op, device=DEVICE) for op in STEP)
    channels, scale = channels_of(2, 16, 4).to(DEVICE), torch.full((2, 4), 0.5, device=DEVICE)

    def step(query, key, value):
        label = label_of(key, channels, scale, bits=4)
        score = select(query[:, :, 0], label, channels, scale, bits=4, scaling=0.25)
        return gather(query, key, value, choose(score, tokens=12, sink=2, recent=3), scaling=0.25)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (40, 41):
        operands = [t.to(DEVICE) for t in problem(length=length)]
        assert torch.equal(compiled(*operands), step(*operands))
    torch._dynamo.reset()


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_cuda_graph(monkeypatch):
    monkeypatch.setenv("ACC_KERNELS", "triton")
    label_of, select, choose, gather = (pick(op, device=DEVICE) for op in STEP)
    query, key, value = (t.to(DEVICE) for t in problem(length=500))
    channels, scale = channels_of(2, 16, 4).to(DEVICE), torch.full((2, 4), 0.5, device=DEVICE)

    def step():
        label = label_of(key, channels, scale, bits=4)
        score = select(query[:, :, 0], label, channels, scale, bits=4, scaling=0.25)
        return gather(query, key, value, choose(score, tokens=60, sink=2, recent=3), scaling=0.25)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    key.copy_(random(*key.shape, seed=5))
    graph.replay()
    assert torch.equal(out, step())


def test_a_kernel_refuses_with_a_reason(monkeypatch):
    query, key, value = problem(dtype=torch.float64)
    index = torch.zeros(1, 2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="float64"):
        attention_gather_triton.attention_gather(query, key, value, index, scaling=1.0)
    with pytest.raises(ValueError, match="float16"):
        attention_gather_triton.attention_gather(query.half(), key, value, index, scaling=1.0)
    monkeypatch.setenv("ACC_KERNELS", "triton")
    with pytest.raises(ValueError, match="heads are 320 wide, expected 256"):
        pick("attention_gather", device=DEVICE, head_dim=320)
    with pytest.raises(ValueError, match="2 bits, expected 4, 8 or 16"):
        pick("attention_select", device=DEVICE, bits=2)
    with pytest.raises(ValueError, match="mps"):
        pick("attention_label", device="mps")


# The bench


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "bench" / "attention_decode.py"
    spec = importlib.util.spec_from_file_location("bench_attention_decode", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("share", "bits"), [(1 / 4, 4), (1 / 2, 8), (1 / 4, 16)])
def test_the_bench_counts_labels_scores_and_chosen_tokens_and_times_the_parts(monkeypatch, bench, share, bits):
    monkeypatch.setenv("ACC_KERNELS", "reference")
    query, key, value = problem(group=4, length=640)
    case = bench.sparse_case(query, key, value, share, bits, bench.cpu_seconds, 1)
    assert case["tokens"] == 640 // 16
    per_head = 640 * (16 * share * (4 if bits == 16 else bits / 8) + 4) + 2 * 40 * 16 * 4
    assert case["bytes"] == 2 * per_head
    assert set(case["parts"]) == {"select", "choose", "gather"}
    assert case["seconds"] > 0


@pytest.mark.parametrize("broken", ["attention_select", "attention_gather"])
def test_the_bench_times_nothing_that_is_wrong(monkeypatch, bench, broken):
    monkeypatch.setenv("ACC_KERNELS", "reference")

    def picked(op, device, **problem):
        function = pick(op, device, **problem)
        return (lambda *a, **k: 1.02 * function(*a, **k)) if op == broken else function

    monkeypatch.setattr(bench, "pick", picked)
    case = bench.sparse_case(*problem(group=4, length=640), 1 / 4, 4, bench.cpu_seconds, 1)
    assert not case["right"]
    assert "seconds" not in case
