"""SpQR against the algorithm written down again, in NumPy and fp64, one weight and one candidate at a time."""

import itertools

import acc.compress.spqr as module
import numpy as np
import pytest
import torch
from acc.calibrate.hessian import Hessian
from acc.compress import descent
from acc.compress.spqr import Matrices, Prepared, SpQR, leave_one_out, outlier_share, solve, sweep


def silent(*_, **__):
    pass


def correlated(tokens, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    strength = torch.exp(0.7 * torch.randn(features, generator=generator))
    return torch.randn(tokens, features, generator=generator) @ mix * strength


def weight_of(rows, columns, seed=0, tails=True):
    generator = torch.Generator().manual_seed(seed + 100)
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    return weight * torch.exp(0.5 * torch.randn(rows, columns, generator=generator)) if tails else weight


def hessian_of(x):
    hessian = Hessian(x.shape[1])
    hessian.update(x)
    return hessian


def run(weight, x, event=silent, **settings):
    method = SpQR(**settings)
    return method.compress(weight, method.prepare({"hessian": hessian_of(x)}, event), event)


def loss(weight, packed, hessian, damp=0.0):
    """tr(Δ (H + λ) Δᵀ)"""
    delta, hessian = (packed.dequantize() - weight).double(), hessian.double()
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.double)
    return float((delta @ damped * delta).sum())


class Reference:
    """The algorithm, plainly. `nearest`: the authors' statistics, each rounded to its nearest level."""

    def __init__(self, weight, hessian, *, bits, group, stat_bits, share, threshold, damp, nearest):
        self.top, self.stat_top = 2**bits - 1, 2**stat_bits - 1
        self.group, self.share, self.nearest = group, share, nearest
        diagonal = np.diag(hessian)
        self.perm = np.argsort(-diagonal, kind="stable")
        weight = weight[:, self.perm].copy()
        inverse = np.linalg.inv(hessian + damp * diagonal.mean() * np.eye(len(hessian)))[np.ix_(self.perm, self.perm)]
        self.u, inverses = self.eliminate(inverse)
        self.tau = threshold * np.mean(weight.var(0, ddof=1) / self.u**2)
        rows, columns = weight.shape
        self.codes, self.outlier = np.zeros((rows, columns), int), np.zeros((rows, columns), bool)
        self.value = np.zeros_like(weight)
        for j in range(columns):
            if j % group == 0:
                scale, zero = self.fit(weight[:, j : j + group], self.u[j : j + group])
            for o in range(rows):
                self.codes[o, j], dense = self.round(weight[o, j], scale[o], zero[o])
                self.value[o, j] = dense
                if (weight[o, j] - dense) ** 2 > self.tau * self.u[j] ** 2:
                    delta = np.float16(weight[o, j] - dense)
                    self.outlier[o, j] = delta != 0
                    self.value[o, j] = dense + np.float64(delta)
            # optimal brain surgeon: the error of column j, spread by the inverse over what is left
            error = (weight[:, j] - self.value[:, j]) / inverses[j][j, j]
            weight -= np.outer(error, inverses[j][j])

    @staticmethod
    def eliminate(inverse):
        """u_j, and the inverse Hessian of the columns from j on (zero elsewhere), for every j."""
        u, steps, inverse = [], [], inverse.copy()
        for j in range(len(inverse)):
            u.append(np.sqrt(inverse[j, j]))
            steps.append(inverse.copy())
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[: j + 1] = inverse[:, : j + 1] = 0
        return np.array(u), steps

    def round(self, w, scale, zero):
        code = np.clip(np.round(w / scale + zero), 0, self.top) if scale > 0 else np.clip(np.round(zero), 0, self.top)
        return int(code), np.float64(scale) * (code - np.float64(zero))

    def range(self, values):
        low, high = min(values), max(values)
        scale = max(high - low, low, -high) / self.top
        return scale, (-low / scale if scale > 0 else 0.0)

    def error(self, values, u, scale, zero):
        return np.array([(w - self.round(w, scale, zero)[1]) ** 2 / v**2 for w, v in zip(values, u, strict=True)])

    def spoilers(self, row, u):
        """Leave-one-out by leaving out each one."""
        total = self.error(row, u, *self.range(row)).sum()
        gains = []
        for k in range(len(row)):
            rest = [i for i in range(len(row)) if i != k]
            gains.append(total - self.error(row[rest], u[rest], *self.range(row[rest])).sum())
        return np.array(gains) > self.tau

    def fit(self, group, u):
        kept = []
        for row in group:
            spoilers = self.spoilers(row, u)
            kept.append(row if spoilers.all() else row[~spoilers])
        scale = np.array([self.range(row)[0] for row in kept])
        scale_levels = self.levels(scale)
        scale_codes = [self.nearest_level(s, levels) for s, levels in zip(scale, scale_levels, strict=True)]
        if self.nearest:
            zero = np.array([self.range(row)[1] for row in kept])
        else:
            stored = [levels[code] for levels, code in zip(scale_levels, scale_codes, strict=True)]
            zero = [self.top / 2 - (row.min() + row.max()) / 2 / s for row, s in zip(kept, stored, strict=True)]
            zero = np.clip(zero, -self.top, 2 * self.top)
        zero_levels = self.levels(zero)
        chosen = []
        for o, row in enumerate(group):
            start = scale_codes[o], self.nearest_level(zero[o], zero_levels[o])
            tries = [start] if self.nearest else [start, *itertools.product(range(self.stat_top + 1), repeat=2)]
            costs = [
                np.minimum(self.error(row, u, scale_levels[o][s], zero_levels[o][z]), self.tau).sum() for s, z in tries
            ]
            s, z = tries[int(np.argmin(costs))]
            chosen.append((scale_levels[o][s], zero_levels[o][z]))
        return np.array(chosen).T

    def levels(self, values):
        """The values that each row's statistic may take: fp16 scale and zero, shared by neighbouring rows."""
        each = []
        for first in range(0, len(values), self.share):
            part = values[first : first + self.share]
            scale = np.float16((part.max() - part.min()) / self.stat_top)
            zero = np.float16(-part.min() / np.float64(scale))
            codes = np.arange(self.stat_top + 1, dtype=np.float32)
            each += [np.float32(scale) * (codes - np.float32(zero))] * len(part)
        return each

    def nearest_level(self, value, levels):
        return int(np.argmin(np.abs(levels - value)))


def reference(weight, x, *, nearest=False, **settings):
    method = SpQR(**settings)
    return Reference(
        weight.double().numpy(),
        hessian_of(x).value().double().numpy(),
        bits=method.bits,
        group=method.group_size,
        stat_bits=method.scale_bits,
        share=method.stat_group_size,
        threshold=method.outlier_threshold,
        damp=method.damp_percent,
        nearest=nearest,
    )


@pytest.mark.parametrize(
    ("bits", "group_size", "threshold", "damp"),
    [(2, 16, 0.2, 1.0), (3, 16, 0.2, 1.0), (3, 8, 0.05, 0.01), (4, 32, 0.5, 0.1)],
)
def test_codes_and_outliers_are_those_of_the_definition(bits, group_size, threshold, damp):
    """In fp64, where the two differ by nothing but the order of additions."""
    settings = SpQR(bits=bits, group_size=group_size, outlier_threshold=threshold, damp_percent=damp)
    weight, x = weight_of(32, 64, seed=bits), correlated(200, 64, seed=bits)
    hessian = hessian_of(x).value().double()
    perm = hessian.diagonal().argsort(descending=True, stable=True)
    factor = torch.linalg.cholesky(
        torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(64))[perm][:, perm], upper=True
    )
    columns = weight.double().T[perm]
    codes, _, deltas = solve(
        columns, Matrices([Prepared(perm, factor, torch.zeros(64).bool(), hessian)], [32]), settings, torch.float16
    )
    expected = reference(weight, x, bits=bits, group_size=group_size, outlier_threshold=threshold, damp_percent=damp)
    assert np.array_equal(expected.perm, perm)
    assert np.array_equal(expected.codes.T, codes)
    assert np.array_equal(expected.outlier.T, deltas != 0)
    assert expected.outlier.any()
    np.testing.assert_allclose(columns.T, expected.value, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_in_fp32_nearly_all_codes_are_those_of_the_definition(bits):
    weight, x = weight_of(32, 64, seed=bits), correlated(200, 64, seed=bits)
    packed, expected = run(weight, x, bits=bits, sweeps=0), reference(weight, x, bits=bits)
    value = packed.dequantize()[:, packed.perm.long()].numpy()
    assert (np.abs(value - expected.value) < 1e-5).mean() > 0.9
    original = np.empty_like(expected.value)
    original[:, expected.perm] = expected.value
    delta = torch.from_numpy(original) - weight
    assert loss(weight, packed, hessian_of(x).value()) == pytest.approx(
        float((delta @ hessian_of(x).value().double() * delta).sum()), rel=0.05
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_error_at_no_more_outliers_than_the_authors_algorithm(bits):
    ours = theirs = 0.0
    our_outliers = their_outliers = 0
    for seed in range(3):
        weight, x = weight_of(32, 64, seed), correlated(200, 64, seed)
        hessian = hessian_of(x).value()
        packed, expected = run(weight, x, bits=bits), reference(weight, x, bits=bits, nearest=True)
        original = np.empty_like(expected.value)
        original[:, expected.perm] = expected.value
        delta = torch.from_numpy(original) - weight
        theirs += float((delta @ hessian.double() * delta).sum())
        ours += loss(weight, packed, hessian)
        our_outliers += len(packed.outlier_value)
        their_outliers += int(expected.outlier.sum())
    assert ours < 0.95 * theirs
    assert our_outliers <= their_outliers


@pytest.mark.parametrize("duplicates", [False, True])
def test_leave_one_out_equals_leaving_out_each_one(duplicates):
    generator = torch.Generator().manual_seed(0)
    group = torch.randn(16, 200, generator=generator, dtype=torch.double)
    if duplicates:  # the least and the greatest twice
        group[3], group[7] = group.amin(0), group.amax(0)
    u = 0.5 + torch.rand(16, generator=generator, dtype=torch.double)
    plain = object.__new__(Reference)
    plain.top, plain.tau = 7, 0.05
    expected = np.array([plain.spoilers(row.numpy(), u.numpy()) for row in group.T])
    assert expected.any()
    gain = leave_one_out(group, 1 / u[:, None], 7)
    assert np.array_equal((gain > 0.05).T, expected)


@pytest.mark.parametrize("threshold", [None, 0.2, 0.02])
@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_recorded_errors_are_the_damped_loss(monkeypatch, threshold, damp):
    """‖E‖² = tr(Δ (H + λ) Δᵀ), outliers included: what the loop makes up for is what the file holds."""
    weight, x = weight_of(24, 96), correlated(300, 96)
    method = SpQR(outlier_threshold=threshold, damp_percent=damp, sweeps=0)
    prepared = method.prepare({"hessian": hessian_of(x)}, silent)
    lost = []
    inner = module.round_column
    monkeypatch.setattr(module, "round_column", lambda *a: lost.append(inner(*a)) or lost[-1].clone())
    packed = method.compress(weight, prepared, silent)
    errors = torch.stack(lost).double() / prepared.factor.diagonal()[:, None].double()
    hessian = hessian_of(x).value().double()
    expected = loss(weight, packed, hessian / hessian.diagonal().mean(), damp)
    assert float(errors.square().sum()) == pytest.approx(expected, rel=1e-4)


def test_what_the_loop_leaves_behind_is_what_dequantize_returns():
    weight, x = weight_of(37, 80), correlated(300, 80)
    method = SpQR(bits=3, sweeps=0)
    prepared = method.prepare({"hessian": hessian_of(x)}, silent)
    columns = weight.T[prepared.perm]
    solve(columns, Matrices([prepared], [37]), method, torch.float16)
    dense = method.compress(weight, prepared, silent).dequantize()
    assert torch.equal(dense[:, prepared.perm], columns.T)


def test_a_sweep_sets_each_weight_to_its_best_value():
    """Against every code tried in turn, in fp64, the whole loss computed anew each time."""
    weight, x = weight_of(6, 32).double(), correlated(100, 32)
    method = SpQR(bits=2, group_size=8, stat_group_size=2, outlier_threshold=0.2, damp_percent=0.1)
    prepared = method.prepare({"hessian": hessian_of(x)}, silent)
    prepared = Prepared(prepared.perm, prepared.factor.double(), prepared.dead, prepared.hessian.double())
    exact = weight.T[prepared.perm]
    columns, matrices = exact.clone(), Matrices([prepared], [6])
    codes, grids, deltas = solve(columns, matrices, method, torch.float16)
    value, kept = columns.clone(), deltas != 0
    assert kept.any()
    assert not kept.all()
    sweep(columns, exact, codes, deltas, grids, matrices, 8)

    def lost(o):
        delta = value[:, o] - exact[:, o]
        return float(delta @ prepared.hessian @ delta)

    for j, o in itertools.product(range(32), range(6)):
        grid, tries = grids[j // 8], []
        best = exact[j, o] - (prepared.hessian[j] @ (value[:, o] - exact[:, o])) / prepared.hessian[j, j]
        best += value[j, o] - exact[j, o]
        for code in range(4):
            dense = grid.scale[o] * (code - grid.zero[o])
            value[j, o] = dense
            tries.append((lost(o) if not kept[j, o] else abs(float(best - dense)), code, dense))
        _, code, value[j, o] = min(tries, key=lambda t: t[0])
        if kept[j, o]:
            value[j, o] += (best - value[j, o]).to(torch.float16).double()
        assert int(codes[j, o]) == code
    torch.testing.assert_close(columns, value, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_every_sweep_leaves_no_more_loss(threshold, damp):
    weight, x = weight_of(40, 272), correlated(600, 272)
    hessian = hessian_of(x).value()
    losses = []
    for sweeps in range(4):
        packed = run(weight, x, sweeps=sweeps, outlier_threshold=threshold, damp_percent=damp)
        packed.check()
        losses.append(loss(weight, packed, hessian, damp))
    assert losses[1] < losses[0]
    assert all(later <= (1 + 1e-6) * earlier for earlier, later in itertools.pairwise(losses)), losses


def test_side_by_side_is_the_same_as_one_by_one():
    """Matrices of one input and of others: codes may differ only where rounding of sums decides."""
    method = SpQR()
    inputs = [method.prepare({"hessian": hessian_of(correlated(300, 96, seed))}, silent) for seed in (0, 1)]
    weights = [weight_of(48, 96, 0), weight_of(16, 96, 1), weight_of(32, 96, 2), weight_of(9, 96, 3)]
    prepared = [inputs[0], inputs[0], inputs[1], inputs[1]]
    together = method.compress_all(weights, prepared, [silent] * 4)
    for weight, ready, packed in zip(weights, prepared, together, strict=True):
        alone = method.compress(weight, ready, silent)
        packed.check()
        assert packed.shape == weight.shape
        assert ((packed.dequantize() - alone.dequantize()).abs() < 1e-6).float().mean() > 0.97


def test_knowing_more_errs_less():
    """Rounding > GPTQ > SpQR, and then less error with every lower threshold."""
    for bits in (2, 3, 4):
        weight, x = weight_of(48, 128), correlated(500, 128)
        hessian = hessian_of(x).value()
        losses = [loss(weight, run(weight, x[:0], bits=bits, outlier_threshold=None), hessian)]
        outliers = [0]
        for threshold in (None, 1.0, 0.3, 0.1, 0.03, 0.01):
            packed = run(weight, x, bits=bits, outlier_threshold=threshold, damp_percent=0.01)
            losses.append(loss(weight, packed, hessian))
            outliers.append(len(packed.outlier_value))
        assert losses[1] < 0.7 * losses[0]
        assert all(less < more for more, less in itertools.pairwise(losses[1:])), losses
        assert outliers == sorted(outliers)


@pytest.mark.parametrize("block", [16, 64, 96])
def test_the_size_of_blocks_does_not_matter(monkeypatch, block):
    weight, x = weight_of(24, 96), correlated(300, 96)
    whole = run(weight, x).dequantize()
    monkeypatch.setattr(descent, "BLOCK", block)
    assert ((run(weight, x).dequantize() - whole).abs() < 1e-6).float().mean() > 0.95


def test_a_threshold_of_zero_keeps_every_weight():
    weight, x = weight_of(20, 272), correlated(600, 272)
    # so that little rounding is passed on, and codes come close enough for corrections of 11 digits
    packed = run(weight, x, outlier_threshold=0.0, damp_percent=1.0, stat_group_size=16)
    packed.check()
    assert len(packed.outlier_value) >= 0.99 * weight.numel()
    assert (packed.dequantize() - weight).abs().max() < 2e-4 * weight.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("stat_bits", [1, 4, 8])
def test_more_bits_less_error_and_any_mixture_works(bits, stat_bits):
    weight, x = weight_of(32, 64, tails=False), correlated(300, 64)
    settings = {"scale_bits": stat_bits, "zero_bits": stat_bits, "outlier_threshold": None}
    better = loss(weight, run(weight, x, bits=bits, **settings), hessian_of(x).value())
    if bits > 2:
        assert better < loss(weight, run(weight, x, bits=bits - 1, **settings), hessian_of(x).value())


@pytest.mark.parametrize("shape", [(1, 16), (5, 24), (17, 40), (33, 136), (16, 257)])
@pytest.mark.parametrize("order", ["act_order", "identity"])
def test_odd_shapes(shape, order):
    weight, x = weight_of(*shape), correlated(600, shape[1])
    packed = run(weight, x, bits=4, order=order)
    packed.check()
    assert (packed.perm is None) is (order == "identity")
    assert loss(weight, packed, hessian_of(x).value()) < 0.02 * float((weight @ hessian_of(x).value() * weight).sum())


def test_dead_inputs_take_no_part():
    """No outliers are spent on inputs that are always zero, and the rest is as if they were not there."""
    weight, x = weight_of(32, 64), correlated(300, 64)
    weight[:, 48:] *= 100
    x[:, 48:] = 0
    packed, without = run(weight, x, damp_percent=0.01), run(weight[:, :48], x[:, :48], damp_percent=0.01)
    assert len(packed.outlier_value) == len(without.outlier_value)
    assert torch.equal(packed.dequantize()[:, :48], without.dequantize())
    error = packed.dequantize()[:, 48:] - weight[:, 48:]
    assert error.norm() < 0.3 * weight[:, 48:].norm()  # rounded all the same: other texts may wake them


def test_no_tokens_is_rounding_and_said():
    said = []
    weight = weight_of(32, 64)
    packed = run(weight, torch.zeros(0, 64), lambda kind, **fields: said.append((kind, fields)))
    assert said == [("rounding", {"reason": "no tokens"})]
    assert float((packed.dequantize() - weight).norm() / weight.norm()) < 0.2


def test_a_hessian_without_full_rank_is_damped_and_said():
    said = []
    x = correlated(8, 64)
    packed = run(weight_of(32, 64), x, lambda kind, **fields: said.append((kind, fields)), damp_percent=0.0)
    assert [kind for kind, _ in said] == ["damping_retry"]
    assert said[0][1]["damp_percent"] > 0
    packed.check()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_hessian_that_is_not_finite_is_rounding_and_said(bad):
    said = []
    x = correlated(100, 64)
    x[3, 5] = bad
    packed = run(weight_of(32, 64), x, lambda kind, **fields: said.append((kind, fields)))
    assert said == [("rounding", {"reason": "the Hessian is not finite"})]
    packed.check()


@pytest.mark.parametrize("factor", [1e-7, 1e8])
def test_weights_beyond_float16_are_said_and_held(factor):
    said = []
    weight, x = factor * weight_of(32, 64), correlated(300, 64)
    packed = run(weight, x, lambda kind, **fields: said.append((kind, fields["dtype"])), bits=4)
    assert said == [("stat_dtype", "bfloat16")]
    packed.check()
    assert float((packed.dequantize() - weight).norm() / weight.norm()) < 0.2


def test_only_ratios_of_the_inputs_matter():
    weight, x = weight_of(32, 64), correlated(300, 64)
    assert torch.equal(run(weight, x).dequantize(), run(weight, 64 * x).dequantize())


def test_a_zero_row_among_others_stays_zero():
    weight, x = weight_of(32, 64), correlated(300, 64)
    weight[5] = 0
    dense = run(weight, x).dequantize()
    assert not dense[5].any()
    assert float((dense - weight).norm() / weight.norm()) < 0.3


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1},
        {"bits": 9},
        {"group_size": 4},
        {"group_size": 48},
        {"scale_bits": 0},
        {"outlier_threshold": -1},
        {"damp_percent": -0.1},
        {"order": "spearman"},
        {"wbits": 3},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SpQR(**settings)


@pytest.mark.parametrize(
    ("bits", "threshold", "measured"),
    [(2, 0.2, 0.0907), (2, 0.5, 0.0278), (3, 0.2, 0.0113), (3, 0.5, 0.00155), (3, 1.0, 0.00084), (4, 0.2, 0.00057)],
)
def test_share_of_outliers_is_about_what_was_measured(bits, threshold, measured):
    """Figures of tests/bench/results; a tenth off where there are many, else 0.012 bits per weight at most."""
    assert abs(outlier_share(bits, threshold) - measured) <= max(0.1 * measured, 0.0005)


def test_share_of_outliers_grows_as_the_threshold_falls():
    shares = [outlier_share(3, threshold) for threshold in (None, 1e6, 10.0, 1.0, 0.5, 0.1, 1e-3, 0.0)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert outlier_share(2, 0.5) > outlier_share(3, 0.5) > outlier_share(8, 0.5)
