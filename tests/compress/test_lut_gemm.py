"""LUT-GEMM: its solver against brute force and plain loops, and what its settings promise."""

import itertools

import pytest
import torch
from acc.calibrate.hessian import Hessian
from acc.compress import descent, lut_gemm
from acc.compress.descent import Matrices, sweep
from acc.compress.lut_gemm import Codebook, LutGemm, Store, alternate, fit, in_order, rescale, value_of
from acc.compress.recipe import Recipe
from acc.compress.rtn import Rtn
from acc.registry import lookup


def silent(*_, **__):
    pass


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(features, seed=0):
    mix = normal(features, features, seed=seed) / features**0.5
    statistic = Hessian(features)
    statistic.update(normal(4 * features, features, seed=seed + 1) @ mix * torch.exp(normal(features, seed=seed + 2)))
    return statistic


def compress(weight, statistic=None, events=None, **settings):
    method = LutGemm(**settings)
    event = silent if events is None else lambda kind, **fields: events.append(kind)
    return method.compress(weight, method.prepare({"hessian": statistic}, event), event)


def weight_error(packed, weight):
    return float((packed.dequantize().double() - weight.double()).square().sum())


def error_of(weights, importance, scales):
    """`Σ importance · error²` of each row of `weights [g, O]` with the nearest of all sums, in fp64."""
    bits = scales.shape[1] - 1
    found = torch.full((weights.shape[1],), 0.0, dtype=torch.float64)
    for row in range(weights.shape[1]):
        own = scales[row].double()
        sums = [
            own[-1] + sum(s * a for s, a in zip(signs, own[:-1])) for signs in itertools.product((-1, 1), repeat=bits)
        ]
        off = (weights[:, row, None].double() - torch.stack(sums)).square().amin(1)
        found[row] = (off * importance.double().flatten()).sum()
    return found


# Solver


@pytest.mark.parametrize(
    ("inputs", "bits", "zero"), [(5, 1, False), (8, 1, False), (5, 2, False), (6, 2, False), (5, 2, True), (6, 2, True)]
)
def test_tiny_groups_come_close_to_the_optimum(inputs, bits, zero):
    """All sign patterns are tried, each with its weighted least squares; with a zero each scale is taken or not."""
    weights, importance = normal(inputs, 6, seed=inputs), normal(inputs, 1, seed=1).abs() + 0.2
    if zero:  # weights on both sides of it
        weights[:2] = weights[:2].abs() * torch.tensor([[1.0], [-1.0]])
    root = importance.double().sqrt()
    best = torch.full((6,), torch.inf, dtype=torch.float64)
    for pattern in itertools.product(itertools.product((-1.0, 1.0), repeat=inputs), repeat=bits):
        offset = [] if zero else [(1.0,) * inputs]
        taken = torch.tensor([*pattern, *offset], dtype=torch.float64).T
        basis = (taken + 1 if zero else taken) * root  # [g, bits] or [g, bits + 1]
        solved = basis @ (torch.linalg.pinv(basis) @ (weights.double() * root))
        best = torch.minimum(best, (weights * root - solved).square().sum(0))
    found = fit(weights, importance, LutGemm(bits=bits), zero)
    if zero:
        torch.testing.assert_close(found[:, -1], found[:, :-1].sum(1))
    error = error_of(weights, importance, found)
    assert (error >= best * (1 - 1e-4) - 1e-8).all()
    scale = float((weights.square() * importance).sum())
    assert float((error - best).sum()) < 0.03 * scale
    assert float((error - best).clamp(min=0).median()) < 0.02 * scale / 6


@pytest.mark.parametrize("bits", [1, 2, 3, 6])
def test_every_weight_takes_the_nearest_value(bits):
    scales, weights = normal(7, bits + 1), 3 * normal(40, 7, seed=1)
    codes, values = Codebook.of(scales).nearest(weights)
    expected = error_of(weights[:1], torch.ones(1), scales)
    torch.testing.assert_close((weights[0] - values[0]).double().square(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value_of(codes, scales), values, rtol=1e-5, atol=1e-5)
    everything = error_of(weights, torch.ones(40), scales)
    torch.testing.assert_close((weights - values).double().square().sum(0), everything, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", lut_gemm.STARTS)
def test_no_round_raises_the_error(start):
    weights, importance = normal(32, 20), normal(32, 20, seed=1).abs() + 0.1
    begun = start(weights, importance, 3)
    errors = torch.stack([alternate(weights, importance, begun, rounds)[1] for rounds in range(8)])
    assert (errors.diff(dim=0) <= 1e-6 * errors[0]).all()
    assert (errors[-1] < 0.99 * errors[0]).float().mean() > 0.8


def test_what_was_made_of_planes_is_found_again():
    scales = torch.tensor([[1.0, 0.45, 0.2, 0.3]]).repeat(16, 1)
    weights = value_of(torch.randint(0, 8, (64, 16), generator=torch.Generator().manual_seed(0)), scales)
    found, error = alternate(weights, torch.ones_like(weights[:, :1]), scales + 0.02 * normal(16, 4), 10)
    assert float(error.max()) < 1e-8
    torch.testing.assert_close(found, scales, rtol=1e-3, atol=1e-3)


def test_scaled_weights_have_scaled_values():
    weights, importance = normal(64, 9), normal(64, 1, seed=1).abs()
    plain = fit(weights, importance, LutGemm())
    for factor in (1e-6, 1e5):
        torch.testing.assert_close(fit(factor * weights, importance, LutGemm()) / factor, plain, rtol=1e-2, atol=1e-3)


def test_rows_are_taken_in_parts(monkeypatch):
    weights, importance = normal(16, 50), normal(16, 50, seed=1).abs()
    whole = fit(weights, importance, LutGemm())
    monkeypatch.setattr(lut_gemm, "BUDGET", 1000)
    parts = fit(weights, importance, LutGemm())
    each = [error_of(weights, importance[:, :1] * 0 + 1, scales).sum() for scales in (whole, parts)]
    assert abs(float(each[0] / each[1]) - 1) < 0.01


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_weights_err_between_the_best_values_and_the_best_grid(bits):
    """Lloyd-Max: 0.1175, 0.0345, 0.0095 of the variance, a uniform grid 0.1188, 0.0374, 0.0115; groups may do better
    as their scales are their own."""
    weights = normal(512, 64)
    error = error_of(weights, torch.ones(512), fit(weights, torch.ones(512, 1), LutGemm(bits=bits)))
    low, high = {2: (0.11, 0.1188), 3: (0.031, 0.0374), 4: (0.0085, 0.0115)}[bits]
    assert low < float(error.mean()) / 512 < high


# The method


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_errs_less_than_rounding_at_the_same_bits_and_groups(bits):
    weight = normal(40, 192) + 0.2
    rounded = Rtn(bits=bits, group_size=64).compress(weight, None, silent)
    for scale_bits in (8, 16) if bits < 8 else (16,):
        packed = compress(weight, bits=bits, group_size=64, scale_bits=scale_bits, activation_aware=False)
        assert weight_error(packed, weight) < weight_error(rounded, weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_text_large_inputs_count(bits):
    """Weights are small where inputs are large; those that are nothing stay nothing, as with rounding."""
    size = torch.exp(1.5 * normal(128, seed=1))
    weight = normal(64, 128) * size
    settings = {"group_size": 64, "scale_bits": 16}
    packed = compress(weight, bits=bits, activation_aware=False, **settings)
    rounded = Rtn(bits=bits, group_size=64).compress(weight, None, silent)
    lost = [float(((one.dequantize() - weight) / size).square().sum()) for one in (packed, rounded)]
    assert lost[0] < 0.9 * lost[1]
    weight[:, 3] = 0
    unused = compress(weight, bits=bits, activation_aware=False, **settings).dequantize()[:, 3]
    assert float(unused.abs().max()) < 1e-3 * float(weight.abs().max())


def test_without_text_weights_on_one_side_of_zero_keep_their_offset():
    weight = torch.cat([normal(16, 64) + 8, normal(16, 64)], 1)
    packed = compress(weight, group_size=64, scale_bits=16, activation_aware=False)
    lost = (packed.dequantize() - weight).square()
    assert float(lost[:, :64].mean()) < 1.1 * float(lost[:, 64:].mean())


def test_outputs_err_less_when_they_are_known_and_each_sweep_helps():
    weight, statistic = 0.05 * normal(48, 200), hessian_of(200)
    settings = {"bits": 3, "group_size": 64}
    packed = [compress(weight, statistic, activation_aware=False, **settings)]
    packed += [compress(weight, statistic, sweeps=sweeps, **settings) for sweeps in (0, 1, 3)]
    errors = [statistic.error(one.dequantize() - weight) for one in packed]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.6 * errors[0]


def test_no_step_of_a_sweep_raises_the_error_at_the_output():
    weight, statistic = normal(30, 96), hessian_of(96)
    method = LutGemm(bits=2, group_size=32)
    known = method.prepare({"hessian": statistic}, silent)
    exact = weight.T[known.perm]
    columns = exact.clone()
    matrices, store = Matrices([known], [30]), Store(torch.float32)
    solved = lut_gemm.solve(columns, matrices, method, store)

    def error():
        delta = (columns - exact).double()
        return float((delta * (known.hessian.double() @ delta)).sum())

    before = error()
    for turn in range(8):
        if turn % 2:
            sweep(columns, exact, matrices, 32, solved.round)
        else:
            rescale(columns, exact, solved, matrices)
        assert error() <= before * (1 + 1e-6)
        before = error()
        for g, place in enumerate(lut_gemm.spans(96, 32)):
            values = value_of(solved.codes[place], solved.groups[g])
            torch.testing.assert_close(values, columns[place], rtol=1e-4, atol=1e-5)


def column_loop(weight, hessian, groups):
    """GPTQ's loop by its definition, one row and column at a time, in fp64, with the groups' values given."""
    rows, columns = weight.shape
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    left, made = weight.double().clone(), torch.zeros(rows, columns, dtype=torch.float64)
    for j in range(columns):
        for row in range(rows):
            values = value_of(torch.arange(4)[:, None], groups[j // 16, row][None].double().float())[:, 0].double()
            made[row, j] = values[(values - left[row, j]).abs().argmin()]
            lost = (left[row, j] - made[row, j]) / factor[j, j]
            left[row, j + 1 :] -= lost * factor[j, j + 1 :]
    return made


def test_the_column_loop_is_gptq_s(monkeypatch):
    weight, statistic = normal(5, 48), hessian_of(48)
    method = LutGemm(bits=2, group_size=16, order="identity")
    known = method.prepare({"hessian": statistic}, silent)
    for block in (128, 16):
        monkeypatch.setattr(descent, "BLOCK", block)
        columns = weight.T.clone()
        groups = lut_gemm.solve(columns, Matrices([known], [5]), method, Store(torch.float32)).groups
        made = column_loop(weight, known.hessian, groups)
        assert ((columns.T - made).abs() > 1e-3).float().mean() < 0.02  # a tie may fall the other way in fp32


def test_several_matrices_at_once_are_what_each_is_alone():
    """Those that share an input, and those of experts with inputs of their own."""
    method = LutGemm(bits=2, group_size=32)
    weights = [normal(rows, 100, seed=rows) for rows in (6, 20, 9)]
    first, second = (method.prepare({"hessian": hessian_of(100, seed)}, silent) for seed in (0, 5))
    inputs = [first, first, second]
    together = method.compress_all(weights, inputs, [silent] * 3)
    for weight, known, packed in zip(weights, inputs, together):
        alone = method.compress(weight, known, silent)
        apart = (packed.dequantize() - alone.dequantize()).abs() > 1e-3
        assert apart.float().mean() < 0.05


@pytest.mark.parametrize("group_size", [-1, 8, 32, 128])
def test_groups_and_a_short_last_one_in_any_order(group_size):
    weight, statistic = normal(12, 150), hessian_of(150)
    errors = []
    for order in ("identity", "group_order"):
        packed = compress(weight, statistic, bits=3, group_size=group_size, order=order)
        packed.check()
        errors.append(statistic.error(packed.dequantize() - weight))
    assert max(errors) < 0.1 * statistic.error(weight)


def test_groups_of_equal_weights_are_exact():
    weight = normal(16, 128)
    weight[3], weight[5], weight[7, :64] = 0, 0.75, -0.5
    for aware, statistic in ((False, None), (True, hessian_of(128))):
        packed = compress(weight, statistic, activation_aware=aware, group_size=64, scale_bits=16, order="identity")
        dense = packed.dequantize()
        assert not dense[3].any()
        if not aware:
            assert torch.equal(dense[5], weight[5])
            assert torch.equal(dense[7, :64], weight[7, :64])


def test_planes_come_by_falling_scale_with_the_same_values():
    codes = torch.randint(0, 8, (5, 40), generator=torch.Generator().manual_seed(0)).byte()
    groups = normal(2, 5, 4)
    turned, ordered = in_order(codes, groups, 3, 32)
    assert (ordered[..., :-1] >= 0).all()
    assert (ordered[..., :-1].diff(dim=-1) <= 0).all()
    for g, place in enumerate(lut_gemm.spans(40, 32)):
        before, after = value_of(codes[:, place].T, groups[g]), value_of(turned[:, place].T, ordered[g])
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


def test_each_plane_of_a_weight_brings_it_closer():
    weight = normal(32, 256)
    packed = compress(weight, bits=4, activation_aware=False)
    errors = [weight_error(packed.first_planes(planes), weight) for planes in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.15 * weight_error(packed.first_planes(1), weight) * 2


def test_sizes_that_float16_cannot_hold_are_told():
    events = []
    packed = compress(1e6 * normal(8, 64), events=events, activation_aware=False)
    assert events == ["scale_dtype"]
    assert packed.scheme["scale_dtype"] == "bfloat16"


def test_without_activations_no_statistic_is_asked_for():
    assert LutGemm().needs == ("hessian",)
    assert LutGemm(activation_aware=False).needs == ()
    recipe = Recipe.from_dict({"steps": [{"method": "lut-gemm", "activation_aware": False}]})
    assert recipe.needs == ()
    assert recipe.steps[0].method == "lut_gemm"
    assert lookup("compress", "lut-gemm") is LutGemm


def test_the_store_holds_8_bit_codes_of_every_scale():
    groups = normal(3, 10, 4)
    store = Store.of(groups, 8, torch.float16)
    kept = store.round(groups)
    largest = groups.abs().amax(0)
    assert ((kept - groups)[..., :-1].abs() <= 0.0025 * largest[:, :-1].amax(-1, keepdim=True)).all()
    assert ((kept - groups)[..., -1].abs() <= 0.005 * largest[:, -1]).all()
    scale, offset, stat = store.encode(kept.abs())
    assert scale.dtype == offset.dtype == torch.uint8
    torch.testing.assert_close(scale.float() * stat[0].float(), kept[..., :-1].abs().transpose(1, 2))
    torch.testing.assert_close((offset.float() - 128) * stat[1].float(), kept[..., -1].abs())
