"""The Triton kernels equal their torch definitions: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from acc.formats.base import stack
from acc.formats.grouped import GroupedWeight
from acc.formats.spqr import SpQRWeight
from acc.kernels import launch_triton
from acc.kernels.base import pick

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A tile of the weight is rounded to the type of x, and the interpreter rounds to bfloat16 towards zero.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.usefixtures("poison")


def random(*shape, below=None, seed=0):
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    if below is None:
        return torch.randn(shape, generator=generator)
    return torch.randint(0, below, shape, generator=generator)


def grouped_weight(shape, bits=3, group_size=16, symmetric=False, scale_dtype="float16", seed=0):
    rows, columns = shape
    groups = 1 if group_size == -1 else -(-columns // group_size)
    scheme = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
    scale = (random(groups, rows, seed=seed).abs() + 0.1).to(DTYPES[scale_dtype])
    zero = None if symmetric else random(groups, rows, below=1 << bits, seed=seed)
    return GroupedWeight.encode(random(rows, columns, below=1 << bits, seed=seed), scale, zero, scheme)


def spqr_weight(
    shape, bits=3, group_size=16, scale_bits=3, zero_bits=3, stat_group_size=16, stat_dtype="float16",
    permuted=True, outliers=0.02, seed=0,
):  # fmt: skip
    """`outliers`: their share, or the pairs (row, column) of each."""
    rows, columns = shape
    groups = -(-columns // group_size)
    scheme = {
        "bits": bits, "group_size": group_size, "scale_bits": scale_bits, "zero_bits": zero_bits,
        "stat_group_size": stat_group_size, "order": "act_order" if permuted else "identity", "stat_dtype": stat_dtype,
    }  # fmt: skip
    if isinstance(outliers, float):
        outliers = (random(rows, columns, seed=seed + 1).abs().flatten() < outliers).nonzero()
        outliers = torch.cat([outliers // columns, outliers % columns], dim=1)
    stat = (random(groups, -(-rows // stat_group_size), 4, seed=seed).abs() + 0.1).to(DTYPES[stat_dtype])
    perm = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)) if permuted else None
    return SpQRWeight.encode(
        random(rows, columns, below=1 << bits, seed=seed),
        random(groups, rows, below=1 << scale_bits, seed=seed),
        random(groups, rows, below=1 << zero_bits, seed=seed),
        stat,
        perm,
        (outliers[:, 0], outliers[:, 1], 3 * random(len(outliers), seed=seed)),
        scheme,
    )


def operands(weight):
    """What the functions of kernels/ take for a weight, in two parts: tensors and numbers."""
    tensors = {field: getattr(weight, field) for field in weight.suffixes}
    return {k: None if t is None else t.to(DEVICE) for k, t in tensors.items()}, weight.numbers()


def both(op, monkeypatch, x, **arguments):
    """The results of the reference and of the kernel."""
    results = []
    for forced in ("reference", "triton"):
        monkeypatch.setenv("ACC_KERNELS", forced)
        results.append(pick(op, device=DEVICE)(x.to(DEVICE), **arguments))
    return results


def assert_close(expected, actual):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.isfinite(actual).all()
    if expected.numel():
        error = (actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)
        assert error < TOLERANCE[expected.dtype]


def check(op, monkeypatch, weight, rows, dtype=None):
    """Unless told a type, tiles are tried in float16: those of float32 are smaller, and the interpreter slow."""
    tensors, numbers = operands(weight)
    x = random(rows, weight.shape[1], seed=9).to(dtype or (torch.float32 if rows == 1 else torch.float16))
    assert_close(*both(op, monkeypatch, x, **tensors, **numbers))


MAKERS = {"grouped": grouped_weight, "spqr": spqr_weight}
# shape of the weight, and the rows and type of inputs to try; the interpreter is slow, so each is tried with a few
PROBLEMS = [
    ((1, 8), [(1, "float32"), (1, "bfloat16"), (7, "float16"), (63, "float32")]),
    ((7, 33), [(1, "float16"), (2, "bfloat16"), (100, "float16")]),
    ((63, 100), [(1, "bfloat16"), (63, "bfloat16")]),
    ((100, 300), [(1, "float32"), (7, "float16")]),
    ((7, 2000), [(1, "float16")]),
    ((7, 500), [(3, "float32")]),
    ((130, 64), [(1, "float16"), (17, "float16")]),
    ((7, 7), [(1, "float16"), (63, "float16")]),
    ((100, 63), [(1, "float16"), (7, "bfloat16")]),
    ((2000, 7), [(1, "float16")]),
]


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("op", MAKERS)
def test_every_number_of_bits(monkeypatch, op, bits, rows):
    check(op, monkeypatch, MAKERS[op]((13, 70), bits=bits), rows)


@pytest.mark.parametrize(("shape", "inputs"), PROBLEMS, ids=str)
@pytest.mark.parametrize("op", MAKERS)
def test_odd_shapes_in_every_type(monkeypatch, op, shape, inputs):
    weight = MAKERS[op](shape)
    for rows, dtype in inputs:
        check(op, monkeypatch, weight, rows, dtype=DTYPES[dtype])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("group_size", [8, 16, 32, 40, 64, 128, -1])
@pytest.mark.parametrize("op", MAKERS)
def test_group_sizes(monkeypatch, op, group_size, rows):
    if op == "spqr" and group_size == -1:
        group_size = 2048
    check(op, monkeypatch, MAKERS[op]((9, 170), group_size=group_size), rows)


def test_many_rows(monkeypatch):
    check("grouped", monkeypatch, grouped_weight((7, 33)), 2000)
    monkeypatch.setattr(launch_triton, "TOKENS_AT_ONCE", 64)
    check("spqr", monkeypatch, spqr_weight((7, 33)), 100, dtype=torch.float16)


@pytest.mark.parametrize("rows", [1, 3])
def test_symmetric_grid(monkeypatch, rows):
    weight = grouped_weight((20, 90), bits=4, symmetric=True)
    check("grouped", monkeypatch, weight, rows)
    turned = weight.scale * (1 - 2 * random(*weight.scale.shape, below=2)).half()  # scales of both signs
    check("grouped", monkeypatch, replace(weight, scale=turned), rows)


@pytest.mark.parametrize(("bits", "stat_group_size"), [(1, 2), (2, 3), (3, 8), (5, 100), (6, 16), (8, 7)])
def test_statistics_of_any_bits_and_rows(monkeypatch, bits, stat_group_size):
    settings = {"scale_bits": bits, "zero_bits": 9 - bits, "stat_group_size": stat_group_size}
    for rows in (1, 2):
        check("spqr", monkeypatch, spqr_weight((43, 40), **settings), rows)


def row_of(columns, *missing):
    found = [c for c in range(columns) if c not in missing]
    return torch.tensor([[1, c] for c in found])


@pytest.mark.parametrize(
    "outliers",
    [torch.zeros(0, 2, dtype=torch.long), row_of(300), row_of(300, 17), row_of(300, 17, 270), row_of(256, 3, 4)],
    ids=["none", "full row", "255 of 256", "255 and 43", "254 of 256"],
)
def test_outliers(monkeypatch, outliers):
    check("spqr", monkeypatch, spqr_weight((40, 300), outliers=outliers), 1)
    check("spqr", monkeypatch, spqr_weight((40, 300), outliers=outliers, permuted=False), 2)


@pytest.mark.parametrize("op", MAKERS)
def test_large_weights_do_not_overflow_float16(monkeypatch, op):
    kind = {"grouped": "scale_dtype", "spqr": "stat_dtype"}[op]
    weight = MAKERS[op]((12, 64), bits=8, **{kind: "bfloat16"})
    (weight.scale if op == "grouped" else weight.stat[..., 0]).mul_(1 << 10)
    tensors, numbers = operands(weight)
    x = 1e-5 * random(4, 64, seed=9).half()
    assert_close(*both(op, monkeypatch, x, **tensors, **numbers))


@pytest.mark.parametrize("op", MAKERS)
def test_equal_calls_give_equal_bits_and_batch_dimensions_stay(monkeypatch, op):
    tensors, numbers = operands(MAKERS[op]((37, 290)))
    monkeypatch.setenv("ACC_KERNELS", "triton")
    product = pick(op, device=DEVICE)
    for lead in ((290,), (2, 2, 290), (2, 0, 290)):
        x = random(*lead).half().to(DEVICE)
        y = product(x, **tensors, **numbers)
        assert y.shape == (*lead[:-1], 37)
        assert torch.equal(y, product(x, **tensors, **numbers))
    wide = random(1, 2, 580).half().to(DEVICE)[..., ::2]
    assert torch.equal(product(wide, **tensors, **numbers), product(wide.contiguous(), **tensors, **numbers))


# Several weights


@pytest.mark.parametrize("lead", [(1,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("op", MAKERS)
def test_weights_that_share_an_input(monkeypatch, op, lead):
    weights = [MAKERS[op]((rows, 140), seed=rows) for rows in (70, 33, 33)]
    parts = [operands(weight) for weight in weights]
    tensors = {kind: [part[0][kind] for part in parts] for kind in parts[0][0]}
    x = random(*lead, 140, seed=9).half()
    expected, actual = both(f"{op}_shared", monkeypatch, x, **tensors, **parts[0][1])
    for a, b in zip(expected, actual, strict=True):
        assert_close(a, b)
    if op == "grouped":
        monkeypatch.setattr(launch_triton, "TOKENS_AT_ONCE", 3)
        for a, b in zip(expected, both(f"{op}_shared", monkeypatch, x, **tensors, **parts[0][1])[1], strict=True):
            assert_close(a, b)


@pytest.mark.parametrize(
    "sizes",
    [[0, 1, 0, 1, 0, 0, 0, 0], [1], [3, 0, 18], [0, 0], [2, 0]],
    ids=["a row here and there", "one expert", "uneven", "no rows for any", "too few for vectors"],
)
@pytest.mark.parametrize("op", MAKERS)
def test_experts(monkeypatch, op, sizes):
    weights = [MAKERS[op]((37, 140), seed=i) for i in range(len(sizes))]
    fields = {suffix: field for field, suffix in weights[0].suffixes.items()}
    tensors = {fields[suffix]: tensor.to(DEVICE) for suffix, tensor in stack(weights).items()}
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).int()
    for spare in (0, 2):  # rows that are for no expert
        x = random(sum(sizes) + spare, 140, seed=9).half()
        assert_close(*both(f"{op}_experts", monkeypatch, x, ends=ends, **tensors, **weights[0].numbers()))


# rows of each weight, columns, rows of x
SHARED = [((1, 7), 63, 100), ((63, 1, 7), 7, 1), ((100, 7), 100, 7), ((7, 1), 2000, 1)]


def several(op, rows, columns):
    """Weights of which, where the format has them, one has no outliers and one a full row of them."""
    special = [torch.zeros(0, 2, dtype=torch.long), row_of(columns) * torch.tensor([0, 1])]
    extra = [{"outliers": outliers} if op == "spqr" else {} for outliers in special] + [{}] * len(rows)
    return [MAKERS[op]((count, columns), seed=i, **extra[i]) for i, count in enumerate(rows)]


@pytest.mark.parametrize(("rows", "columns", "tokens"), SHARED, ids=str)
@pytest.mark.parametrize("op", MAKERS)
def test_weights_that_share_an_input_at_odd_shapes(monkeypatch, op, rows, columns, tokens):
    parts = [operands(weight) for weight in several(op, rows, columns)]
    tensors = {kind: [part[0][kind] for part in parts] for kind in parts[0][0]}
    x = random(tokens, columns, seed=9).to(torch.float32 if tokens == 1 else torch.float16)
    expected, actual = both(f"{op}_shared", monkeypatch, x, **tensors, **parts[0][1])
    for a, b in zip(expected, actual, strict=True):
        assert_close(a, b)


# shape of each weight, rows of x for each expert
STACKS = [((7, 63), [0, 0, 1, 0]), ((1, 2000), [0, 1]), ((100, 7), [7, 0, 0]), ((7, 7), [0, 63]), ((63, 100), [5, 2])]
MANY = [("grouped", (7, 33), [37, 63]), ("grouped", (1, 7), [1999, 1]), ("spqr", (1, 33), [37, 63])]


@pytest.mark.parametrize(("op", "shape", "sizes"), [(op, *case) for op in MAKERS for case in STACKS] + MANY, ids=str)
def test_experts_at_odd_shapes(monkeypatch, op, shape, sizes):
    weights = several(op, [shape[0]] * len(sizes), shape[1])
    fields = {suffix: field for field, suffix in weights[0].suffixes.items()}
    tensors = {fields[suffix]: tensor.to(DEVICE) for suffix, tensor in stack(weights).items()}
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).int()
    x = random(sum(sizes), shape[1], seed=9).to(torch.float32 if sum(sizes) == 1 else torch.float16)
    assert_close(*both(f"{op}_experts", monkeypatch, x, ends=ends, **tensors, **weights[0].numbers()))


# As an operator


@pytest.mark.parametrize("op", MAKERS)
def test_compiles_as_one_graph(monkeypatch, op):
    tensors, numbers = operands(MAKERS[op]((20, 64)))
    monkeypatch.setenv("ACC_KERNELS", "triton")
    product = pick(op, device=DEVICE)

    def double(x):
        return 2 * product(x + 1, **tensors, **numbers)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager", dynamic=True)
    for lead in ((2,), (3,), (2, 4)):
        x = random(*lead, 64).half().to(DEVICE)
        assert torch.equal(compiled(x), double(x))
    torch._dynamo.reset()


def test_the_operator_is_what_its_schema_and_fake_say():
    tensors, numbers = operands(spqr_weight((20, 64)))
    lists = [[tensors[k]] for k in launch_triton.Operands._fields]
    arguments = (random(3, 64).to(DEVICE), None, *lists, *numbers.values())
    assert list(numbers) == ["bits", "group_size", "scale_bits", "zero_bits", "stat_group_size"]
    torch.library.opcheck(launch_triton.packed_product, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("op", MAKERS)
def test_cuda_graph(monkeypatch, op, rows):
    tensors, numbers = operands(MAKERS[op]((100, 600)))
    monkeypatch.setenv("ACC_KERNELS", "triton")
    product, x = pick(op, device=DEVICE), random(rows, 600).to(DEVICE)
    product(x, **tensors, **numbers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x, **tensors, **numbers)
    x.copy_(random(rows, 600, seed=1))
    graph.replay()
    assert torch.equal(y, product(x, **tensors, **numbers))


def test_what_is_remembered_of_a_weight_follows_it():
    weight = spqr_weight((40, 600))
    count = weight.outlier_count.clone()
    first = launch_triton.outlier_starts(count, 600)
    assert launch_triton.outlier_starts(count.detach(), 600) is first
    assert first.shape == (3, 2)
    assert first.flatten()[0] == 0
    assert first.flatten()[2] == count[0].sum()
    count[0, 0] += 1
    changed = launch_triton.outlier_starts(count, 600)
    assert changed.flatten()[2] == first.flatten()[2] + 1
    before = len(launch_triton._STARTS)
    del count
    launch_triton.outlier_starts(weight.outlier_count.clone(), 600)
    assert len(launch_triton._STARTS) < before + 1


def test_refusals_say_why(monkeypatch):
    assert "not made for xpu" in str(launch_triton.refuses("xpu"))
    assert launch_triton.refuses(DEVICE, bits=3, group_size=16) is None
    assert "9 bits" in str(launch_triton.refuses(DEVICE, bits=9))
    tensors, numbers = operands(grouped_weight((8, 60), group_size=12))
    monkeypatch.setenv("ACC_KERNELS", "triton")
    with pytest.raises(ValueError, match="ACC_KERNELS=reference"):
        pick("grouped", device=DEVICE)(random(2, 60).to(DEVICE), **tensors, **numbers)
    with pytest.raises(ValueError, match="float64"):
        pick("grouped", device=DEVICE)(random(2, 60).double().to(DEVICE), **tensors, **numbers)
