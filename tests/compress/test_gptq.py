"""GPTQ against the algorithm written down again: optimal brain surgeon with the inverse itself, NumPy and fp64."""

import itertools

import numpy as np
import pytest
import torch
from acc.calibrate.hessian import Hessian
from acc.compress import descent
from acc.compress.descent import Matrices, Prepared, strongest_first
from acc.compress.gptq import GPTQ, Grids, rescale, solve
from acc.compress.rtn import Rtn

GRIDS = ["asymmetric", "symmetric", "full_range"]


def silent(*_, **__):
    pass


def correlated(tokens, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    strength = torch.exp(0.7 * torch.randn(features, generator=generator))
    return torch.randn(tokens, features, generator=generator) @ mix * strength


def weight_of(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed + 100)
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    return weight * torch.exp(0.5 * torch.randn(rows, columns, generator=generator))


def hessian_of(x):
    hessian = Hessian(x.shape[1])
    hessian.update(x)
    return hessian


def run(weight, x, event=silent, **settings):
    method = GPTQ(**settings)
    return method.compress(weight, method.prepare({"hessian": hessian_of(x)}, event), event)


def loss(weight, dense, hessian, damp=0.0):
    """tr(Δ (H + λ) Δᵀ)"""
    delta, hessian = (dense - weight).double(), hessian.double()
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.double)
    return float((delta @ damped * delta).sum())


class Reference:
    """The first pass, plainly: one row and one candidate at a time, and what is left of the inverse Hessian in full."""

    def __init__(self, weight, hessian, perm, *, bits, size, kind, damp, search):
        self.top, self.kind, self.search = 2**bits - 1, kind, search
        inverse = np.linalg.inv(hessian + damp * np.diag(hessian).mean() * np.eye(len(hessian)))
        inverse, weight = inverse[np.ix_(perm, perm)], weight[:, perm].copy()
        importance = []  # 1 / u², the remaining inverse's own diagonal, column by column
        left = inverse.copy()
        for j in range(len(left)):
            importance.append(1 / left[j, j])
            left -= np.outer(left[:, j], left[j]) / left[j, j]
        self.codes, self.value = np.zeros(weight.shape, int), np.zeros_like(weight)
        for j in range(len(inverse)):
            if j % size == 0:
                grids = [self.fit(row[j : j + size], importance[j : j + size]) for row in weight]
            for o, (scale, zero) in enumerate(grids):
                self.codes[o, j], self.value[o, j] = self.round(weight[o, j], scale, zero)
            error = (weight[:, j] - self.value[:, j]) / inverse[j, j]
            weight = weight - np.outer(error, inverse[j])
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]

    def round(self, w, scale, zero):
        code = int(np.clip(np.round(w / scale + zero), 0, self.top)) if scale else int(zero)
        return code, scale * (code - zero)

    def fit(self, row, importance):
        low, high = min(row.min(), 0), max(row.max(), 0)
        tries = self.coarse(low, high)
        if not self.search:
            return tries[0]

        def cost(grid):
            return sum(i * (w - self.round(w, *grid)[1]) ** 2 for w, i in zip(row, importance, strict=True))

        best = min(tries, key=cost)
        for factors in ((0.92, 0.96, 1, 1.04, 1.08), (0.98, 1, 1.02)):
            near = [best]
            for factor in factors:
                for shift in (-1, 0, 1) if self.kind == "asymmetric" else (0,):
                    near.append((self.half(best[0] * factor), min(max(best[1] + shift, 0), self.top)))
            best = min(near, key=cost)
        return best

    def coarse(self, low, high):
        if self.kind == "asymmetric":
            found = []
            for a, b in itertools.product((1, 0.85, 0.7, 0.55), repeat=2):
                scale = self.half((b * high - a * low) / self.top)
                found.append((scale, np.clip(np.round(-a * low / scale), 0, self.top)))
            return found
        reach, middle, found = max(-low, high), (self.top + 1) // 2, []
        for part in (1, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.5):
            if self.kind == "symmetric":
                found.append((self.half(2 * part * reach / self.top), middle))
            else:  # the side with 2^(bits - 1) steps first where the greater weight is
                sign = -1 if high > -low else 1
                found += [(self.half(turn * sign * part * reach / middle), middle) for turn in (1, -1)]
        return found

    def half(self, scale):
        return np.float64(np.float16(scale))


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(
    ("bits", "size", "order", "search", "damp"),
    [
        (2, 8, "group_aware", True, 0.1),
        (3, 16, "group_aware", True, 0.01),
        (3, 32, "identity", True, 0.05),
        (4, 16, "group_aware", False, 0.1),
        (8, 8, "identity", False, 0.01),
    ],
)
def test_codes_are_those_of_the_definition(kind, bits, size, order, search, damp):
    """In fp64, where the two differ by nothing but the order of additions."""
    settings = GPTQ(bits=bits, group_size=size, grid=kind, order=order, search=search, damp_percent=damp, sweeps=0)
    weight, x = weight_of(8, 32, seed=bits).double(), correlated(200, 32, seed=bits)
    hessian = hessian_of(x).value().double()
    perm = strongest_first(hessian.diagonal(), size) if order == "group_aware" else torch.arange(32)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(32)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped)[perm][:, perm], upper=True)
    columns = weight.T[perm]
    prepared = Prepared(perm, factor, torch.zeros(32).bool(), damped[perm][:, perm])
    grids = solve(columns, Matrices([prepared], [8]), settings, torch.float16)
    expected = Reference(
        weight.numpy(), hessian.numpy(), perm.numpy(), bits=bits, size=size, kind=kind, damp=damp, search=search
    )
    assert np.array_equal(expected.codes.T, grids.codes)
    np.testing.assert_allclose(columns.T, expected.value, atol=1e-12)
    packed = settings.encode(grids, slice(0, 8), perm)
    np.testing.assert_allclose(packed.dequantize()[:, perm], expected.value, rtol=1e-6)
    assert packed.check() is None


@pytest.mark.parametrize("size", [8, 16, 64, -1])
@pytest.mark.parametrize("columns", [64, 100, 257])
def test_groups_stay_whole_and_the_strongest_go_first(size, columns):
    diagonal = torch.rand(columns, generator=torch.Generator().manual_seed(columns))
    size = columns if size == -1 else size
    perm = strongest_first(diagonal, size)
    assert torch.equal(perm.sort().values, torch.arange(columns))
    groups = [perm[first : first + size] for first in range(0, columns, size)]
    for group in groups:
        assert len(set((group // size).tolist())) == 1
        assert (diagonal[group].diff() <= 0).all()
    whole = [float(diagonal[group[0]]) for group in groups if len(group) == size]
    assert whole == sorted(whole, reverse=True)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_recorded_errors_are_the_damped_loss(monkeypatch, kind, damp):
    """‖E‖² = tr(Δ (H + λ) Δᵀ): what the loop makes up for is what the file holds."""
    weight, x = weight_of(24, 96), correlated(300, 96)
    method = GPTQ(grid=kind, group_size=32, damp_percent=damp, sweeps=0)
    prepared = method.prepare({"hessian": hessian_of(x)}, silent)
    lost = []
    inner = Grids.round
    monkeypatch.setattr(Grids, "round", lambda self, *a: lost.append(inner(self, *a)) or lost[-1].clone())
    packed = method.compress(weight, prepared, silent)
    errors = torch.stack(lost).double() / prepared.factor.diagonal()[:, None].double()
    hessian = hessian_of(x).value().double()
    expected = loss(weight, packed.dequantize(), hessian / hessian.diagonal().mean(), damp)
    assert float(errors.square().sum()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("shape", [(37, 80), (8, 300), (1, 16)])
@pytest.mark.parametrize("size", [16, 64, -1])
def test_what_the_solver_leaves_behind_is_what_dequantize_returns(sweeps, shape, size):
    weight, x = weight_of(*shape), correlated(400, shape[1])
    method = GPTQ(sweeps=sweeps, group_size=size)
    prepared = method.prepare({"hessian": hessian_of(x)}, silent)
    columns = weight.T[prepared.perm]
    solve(columns, Matrices([prepared], [shape[0]]), method, torch.float16)
    packed = method.compress(weight, prepared, silent)
    assert torch.equal(packed.dequantize()[:, prepared.perm], columns.T)
    assert torch.equal(packed.with_codes(packed.grid().codes).dequantize(), packed.dequantize())


@pytest.mark.parametrize("kind", GRIDS)
def test_rescaling_finds_the_best_scale(kind):
    """Against many scales tried in turn, in fp64, the whole loss computed anew each time."""
    weight, x = weight_of(5, 24).double(), correlated(100, 24)
    method = GPTQ(bits=2, group_size=8, grid=kind, sweeps=0)
    prepared = method.prepare({"hessian": hessian_of(x)}, silent)
    hessian = prepared.hessian.double()
    prepared = Prepared(prepared.perm, prepared.factor.double(), prepared.dead, hessian)
    exact, matrices = weight.T[prepared.perm], Matrices([prepared], [5])
    columns = exact.clone()
    grids = solve(columns, matrices, method, torch.float16)
    value, scales, units = columns.clone(), grids.scale.clone(), grids.codes - grids.zero.repeat_interleave(8, 0)
    rescale(columns, exact, grids, matrices, kind)
    for g, o in itertools.product(range(3), range(5)):
        near = scales[g, o] * torch.linspace(0.2, 3, 2000, dtype=torch.double)
        found = []
        for scale in [*near, grids.scale[g, o]]:
            value[8 * g : 8 * g + 8, o] = scale * units[8 * g : 8 * g + 8, o]
            delta = value[:, o] - exact[:, o]
            found.append(float(delta @ hessian @ delta))
        assert found[-1] <= (1 + 1e-4) * min(found)
    torch.testing.assert_close(columns, value)
    assert torch.equal(grids.scale, grids.scale.half().double())


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("size", [32, -1])
def test_every_sweep_leaves_no_more_loss(kind, size):
    weight, x = weight_of(40, 272), correlated(600, 272)
    hessian, losses = hessian_of(x).value(), []
    for sweeps in range(4):
        packed = run(weight, x, sweeps=sweeps, grid=kind, group_size=size)
        packed.check()
        losses.append(loss(weight, packed.dequantize(), hessian, 0.1))
    assert losses[1] < losses[0]
    assert all(later <= (1 + 1e-6) * earlier for earlier, later in itertools.pairwise(losses)), losses


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", GRIDS)
def test_each_part_errs_less(bits, kind):
    """Rounding > error feedback > with the range search > with a sweep."""
    totals = np.zeros(4)
    for seed in range(3):
        weight, x = weight_of(48, 128, seed), correlated(500, 128, seed)
        hessian = hessian_of(x).value()
        made = [Rtn(bits=bits, group_size=64, symmetric=kind != "asymmetric").compress(weight, None, silent)]
        for search, sweeps in ((False, 0), (True, 0), (True, 1)):
            made.append(run(weight, x, bits=bits, grid=kind, search=search, sweeps=sweeps))
        totals += [loss(weight, packed.dequantize(), hessian) for packed in made]
    assert totals[1] < 0.8 * totals[0]
    assert totals[2] < totals[1]
    assert totals[3] < totals[2]


def test_strong_inputs_first_err_less():
    first, as_they_are = (
        sum(
            loss(weight_of(48, 128, seed), run(weight_of(48, 128, seed), x, order=order).dequantize(), hessian)
            for seed in range(4)
            for x in [correlated(500, 128, seed)]
            for hessian in [hessian_of(x).value()]
        )
        for order in ("group_aware", "identity")
    )
    assert first < as_they_are


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_scale_that_may_be_negative_is_worth_it(bits):
    weight, x = weight_of(48, 128), correlated(500, 128)
    hessian = hessian_of(x).value()
    full, tied = (run(weight, x, bits=bits, grid=kind) for kind in ("full_range", "symmetric"))
    assert (full.scale < 0).any()
    assert (full.scale > 0).any()
    assert (tied.scale >= 0).all()
    assert full.stored_bits == tied.stored_bits
    assert loss(weight, full.dequantize(), hessian) < loss(weight, tied.dequantize(), hessian)


def test_a_full_range_grid_knows_no_up_and_down():
    weight, x = weight_of(32, 64), correlated(300, 64)
    one, other = (run(sign * weight, x, grid="full_range").dequantize() for sign in (1, -1))
    assert ((one + other).abs() < 1e-6).float().mean() > 0.98


@pytest.mark.parametrize("size", [16, -1])
@pytest.mark.parametrize("block", [16, 64, 256])
def test_the_size_of_blocks_does_not_matter(monkeypatch, block, size):
    weight, x = weight_of(24, 192), correlated(500, 192)
    whole = run(weight, x, group_size=size).dequantize()
    monkeypatch.setattr(descent, "BLOCK", block)
    assert ((run(weight, x, group_size=size).dequantize() - whole).abs() < 1e-5).float().mean() > 0.95


def test_side_by_side_is_the_same_as_one_by_one():
    """Matrices of one input and of others, and of another type of scale; rounding of sums may decide a few codes."""
    method = GPTQ(group_size=32)
    inputs = [method.prepare({"hessian": hessian_of(correlated(300, 96, seed))}, silent) for seed in (0, 1)]
    weights = [weight_of(48, 96, 0), 1e7 * weight_of(16, 96, 1), weight_of(32, 96, 2), weight_of(9, 96, 3)]
    prepared = [inputs[0], inputs[0], inputs[1], inputs[1]]
    together = method.compress_all(weights, prepared, [silent] * 4)
    assert [packed.scale.dtype for packed in together] == [torch.float16, torch.bfloat16, torch.float16, torch.float16]
    for weight, ready, packed in zip(weights, prepared, together, strict=True):
        alone = method.compress(weight, ready, silent)
        packed.check()
        assert packed.shape == weight.shape
        close = (packed.dequantize() - alone.dequantize()).abs() < 1e-5 * weight.abs().max()
        assert close.float().mean() > 0.97


@pytest.mark.parametrize("shape", [(1, 16), (5, 24), (17, 40), (33, 136), (16, 257)])
@pytest.mark.parametrize("size", [16, 64, -1])
@pytest.mark.parametrize("kind", GRIDS)
def test_odd_shapes(shape, size, kind):
    weight, x = weight_of(*shape), correlated(600, shape[1])
    packed = run(weight, x, bits=5, group_size=size, grid=kind)
    packed.check()
    hessian = hessian_of(x).value()
    assert loss(weight, packed.dequantize(), hessian) < 0.02 * float((weight @ hessian * weight).sum())


@pytest.mark.parametrize("kind", GRIDS)
def test_groups_of_zeros_and_constant_groups(kind):
    weight, x = weight_of(16, 64), correlated(300, 64)
    weight[:4], weight[4:8], weight[8:12, 16:32] = 0, torch.linspace(-1, 1, 4)[:, None], 0
    dense = run(weight, x, bits=4, group_size=16, grid=kind).dequantize()
    assert not dense[:4].any()
    assert ((dense - weight)[4:8].abs() <= 2**-4 * weight[4:8].abs()).all()
    assert torch.isfinite(dense).all()


@pytest.mark.parametrize("kind", GRIDS)
def test_dead_inputs_take_no_part(kind):
    """However large their weights are: they share groups with living ones, and do not widen their grids."""
    weight, x = weight_of(32, 64), correlated(300, 64)
    x[:, ::4] = 0
    hessian, large = hessian_of(x).value(), weight.clone()
    large[:, ::4] *= 1000
    plain, other = (run(w, x, grid=kind, group_size=16).dequantize() for w in (weight, large))
    living = torch.arange(64) % 4 > 0
    assert ((plain - other)[:, living].abs() < 1e-6).float().mean() > 0.98
    assert loss(large, other, hessian) == pytest.approx(loss(weight, plain, hessian), rel=1e-2)


def test_a_group_of_dead_inputs_is_rounded_all_the_same():
    weight, x = weight_of(32, 64), correlated(300, 64)
    x[:, 16:32] = 0
    dense = run(weight, x, bits=4, group_size=16).dequantize()
    assert float((dense - weight)[:, 16:32].norm() / weight[:, 16:32].norm()) < 0.1


def test_no_tokens_is_rounding_and_said():
    said = []
    weight = weight_of(32, 64)
    packed = run(weight, torch.zeros(0, 64), lambda kind, **fields: said.append((kind, fields)))
    assert said == [("rounding", {"reason": "no tokens"})]
    assert float((packed.dequantize() - weight).norm() / weight.norm()) < 0.35


def test_a_hessian_without_full_rank_is_damped_and_said():
    said = []
    packed = run(weight_of(32, 64), correlated(8, 64), lambda *a, **kw: said.append((*a, kw)), damp_percent=0.0)
    assert [kind for kind, _ in said] == ["damping_retry"]
    assert said[0][1]["damp_percent"] > 0
    packed.check()


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_scales_that_float16_cannot_hold_are_said_and_held(factor, kind):
    said = []
    weight, x = factor * weight_of(32, 64), correlated(300, 64)
    packed = run(weight, x, lambda kind, **fields: said.append((kind, fields["dtype"])), bits=4, grid=kind)
    assert said == [("scale_dtype", "bfloat16")]
    assert packed.scale.dtype == torch.bfloat16
    packed.check()
    hessian = hessian_of(x).value()
    assert loss(weight, packed.dequantize(), hessian) < 0.01 * float((weight @ hessian * weight).sum())


def test_a_scale_at_the_end_of_float16_stays_finite():
    """Weights that have made up for others may ask for more than the type that was chosen can hold."""
    x = correlated(300, 64)
    weight = weight_of(32, 64)
    weight *= 65504 * 7 / (weight.max() - weight.min())
    packed = run(weight, x, group_size=16, search=False)
    assert packed.scale.dtype == torch.float16
    packed.check()


@pytest.mark.parametrize("group", [64, 16])
def test_without_calibration_and_search_it_is_rounding(group):
    weight = weight_of(32, 96)
    packed = run(weight, torch.zeros(0, 96), search=False, sweeps=0, group_size=group, order="identity")
    expected = Rtn(bits=3, group_size=group).compress(weight, None, silent)
    assert torch.equal(packed.scale, expected.scale)
    assert torch.equal(packed.dequantize(), expected.dequantize())


def test_only_ratios_of_the_inputs_matter():
    weight, x = weight_of(32, 64), correlated(300, 64)
    assert torch.equal(run(weight, x).dequantize(), run(weight, 64 * x).dequantize())


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1},
        {"bits": 9},
        {"group_size": 48},
        {"grid": "full"},
        {"damp_percent": -0.1},
        {"sweeps": -1},
        {"order": "act_order"},
        {"desc_act": True},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GPTQ(**settings)
