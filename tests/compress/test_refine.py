"""Learned rounding: it begins with what a method made, and what it reports is what an ordinary model shows."""

from __future__ import annotations

import json

import pytest
import torch
from acc.calibrate.hessian import Hessian
from acc.calibrate.stream import Block, Stream
from acc.compress import apply as apply_module
from acc.compress.apply import apply
from acc.compress.recipe import Recipe, configure
from acc.compress.refine import Rounding
from acc.formats.grouped import GroupedWeight
from acc.formats.source import open_source
from transformers import AutoModelForCausalLM

METHODS = {
    "rtn": {"bits": 2, "group_size": 32},
    "rtn symmetric": {"bits": 3, "group_size": 16, "symmetric": True},
    "gptq": {"bits": 2, "group_size": 32},
    "gptq full_range": {"bits": 3, "group_size": 16, "grid": "full_range"},
    "spqr": {"bits": 2, "group_size": 16, "outlier_threshold": 0.5},
    "lut-gemm": {"bits": 2, "group_size": 32},
    "lut-gemm free": {"bits": 3, "group_size": 16, "scale_bits": 16},
    "lut-gemm row": {"bits": 1, "group_size": -1},
    "spqr identity": {"bits": 3, "group_size": 16, "order": "identity"},
}


def ids(batches: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 128, (2, 32), generator=generator) for _ in range(batches)]


def silent(kind, **figures):
    pass


def packed_weight(name: str, rows: int = 40, columns: int = 72):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1
    hessian = Hessian(columns)
    hessian.update(torch.randn(200, columns, generator=torch.Generator().manual_seed(1)))
    method = configure(name.split()[0], METHODS[name])
    return weight, hessian, method.compress(weight, method.prepare({"hessian": hessian}, silent), silent)


def run(folder, out, method="rtn", refine=12, **settings):
    step = {"method": method, "bits": 2, "group_size": 16, **settings}
    recipe = Recipe.from_dict({"refine": refine, "steps": [step]})
    return apply(recipe, open_source(str(folder)), out, ids())


@pytest.mark.parametrize("name", METHODS)
def test_begins_with_what_was_made(name):
    weight, hessian, packed = packed_weight(name)
    rounding = Rounding.of(packed, weight, [hessian])
    assert torch.equal(rounding.dense(), packed.dequantize())
    again = rounding.pack()
    assert again.scheme == packed.scheme
    for suffix, tensor in packed.tensors().items():
        assert torch.equal(again.tensors()[suffix], tensor), suffix


@pytest.mark.parametrize("name", METHODS)
def test_what_runs_is_what_is_packed(name):
    """After steps in random directions; codes stay within one of where they were, and on their grid."""
    weight, hessian, packed = packed_weight(name)
    rounding = Rounding.of(packed, weight, [hessian])
    for seed in range(3):
        rounding.descend(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)), 0.2)
    made = rounding.pack()
    made.check()
    assert torch.equal(made.dequantize(), rounding.dense())
    moved = made.levels().codes.int() - packed.levels().codes.int()
    assert moved.abs().max() == 1
    assert made.levels().codes.max() <= packed.levels().top


@pytest.mark.parametrize("name", METHODS)
def test_a_step_goes_against_the_gradient(name):
    """Every weight that changes moves to the side that the gradient calls better."""
    weight, hessian, packed = packed_weight(name)
    rounding = Rounding.of(packed, weight, [hessian])
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    rounding.descend(gradient, 0.3)
    change = rounding.dense() - packed.dequantize()
    assert (change != 0).any()
    assert (change * gradient <= 0).all()


def test_a_weight_aims_at_its_own_best_value():
    """By trying: no other value of one weight, the others as they are, gives a smaller damped error."""
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    delta = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    hessian = Hessian(6)
    hessian.update(x.float())
    best = hessian.alone(delta)
    total = x.T @ x
    total += 0.1 * total.diagonal().mean() * torch.eye(6)

    def loss(row):
        return float(row @ total @ row)

    for o in range(3):
        for i in range(6):
            row = delta[o].double().clone()
            row[i] = best[o, i]
            least = loss(row)
            for step in (-1e-2, 1e-2):
                row[i] = best[o, i] + step
                assert loss(row) > least


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_every_matrix_is_found_in_its_parameter(checkpoint, family):
    for block in Stream(open_source(str(checkpoint(family)))).blocks(ids(1)):
        for matrix, (parameter, cut) in zip(block.matrices, block.places(block.matrices), strict=True):
            assert torch.equal(cut(parameter), block.weight(matrix)), matrix.name
            assert cut(parameter.data).data_ptr() - parameter.data_ptr() < parameter.nbytes  # a view


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
@torch.no_grad()
def test_reports_what_an_ordinary_model_shows(checkpoint, tmp_path, family):
    """The first block's output, before and after, through transformers' own model; and refining helps."""
    folder = checkpoint(family)
    plain, refined = run(folder, tmp_path / "plain", refine=0), run(folder, tmp_path / "refined")

    def first_block(path):
        eager = {} if family == "llama" else {"experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **eager)
        return [model(batch, output_hidden_states=True).hidden_states[1].double() for batch in ids()]

    exact, found = first_block(folder), {}
    for name, outcome in (("before", plain), ("after", refined)):
        errors = []
        for output, target in zip(first_block(outcome.folder), exact):
            errors.append(((output - target) ** 2).mean(-1) / (target**2).mean(-1))
        found[name] = float(torch.stack(errors).mean())
    (told,) = {
        tuple(r["refined"].items())
        for r in refined.records
        if r["tensor"].startswith("model.layers.0.") and "refined" in r
    }
    assert dict(told) == pytest.approx(found, rel=1e-4)
    assert found["after"] < 0.95 * found["before"]
    assert {key: r["stored_bits"] for r in plain.records for key in [r["tensor"]]} == {
        key: r["stored_bits"] for r in refined.records for key in [r["tensor"]]
    }


def test_the_report_speaks_of_the_refined_weights(checkpoint, tmp_path):
    import acc

    outcome = run(checkpoint("llama"), tmp_path / "out", "spqr")
    source, model = open_source(str(checkpoint("llama"))), acc.load(outcome.folder)
    record = next(r for r in outcome.records if "refined" in r)
    weight = source.tensor(record["tensor"])
    made = model.get_submodule(record["tensor"].removesuffix(".weight")).parts()[0].dequantize()
    assert record["relative_error"] == pytest.approx(
        float((made - weight).square().sum() / weight.square().sum()), rel=1e-4
    )
    assert record["error_of"] == "weight"


def test_the_same_run_gives_the_same_bytes(checkpoint, tmp_path):
    for out in ("a", "b"):
        run(checkpoint("qwen3_moe"), tmp_path / out, "spqr")
    for path in (tmp_path / "a").iterdir():
        if path.name != "timing.jsonl":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_spilled_states_change_nothing(checkpoint, tmp_path):
    recipe = Recipe.from_dict({"refine": 5, "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]})
    source = open_source(str(checkpoint("llama")))
    plain = apply(recipe, source, tmp_path / "plain", ids())
    spilled = apply(recipe, source, tmp_path / "spilled", ids(), spill=tmp_path)
    assert [r.get("refined") for r in plain.records] == [r.get("refined") for r in spilled.records]


def test_what_does_not_help_is_not_taken(checkpoint, tmp_path, monkeypatch):
    """Steps the wrong way: the codes stay those of the method."""
    descend = Rounding.descend
    monkeypatch.setattr(Rounding, "descend", lambda self, gradient, rate: descend(self, -gradient, rate))
    run(checkpoint("llama"), tmp_path / "wrong")
    monkeypatch.undo()
    run(checkpoint("llama"), tmp_path / "plain", refine=0)
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "wrong" / path.name).read_bytes()
    report = [json.loads(line) for line in (tmp_path / "wrong" / "report.jsonl").read_text().splitlines()]
    assert all(r["refined"]["after"] >= r["refined"]["before"] for r in report if "refined" in r)


def test_a_format_without_a_grid_is_an_event(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(GroupedWeight, "grid", lambda self: None)
    outcome = run(checkpoint("llama"), tmp_path / "out")
    assert {event["event"] for event in outcome.events} == {"not_refined"}


def test_gradients_are_off_again(checkpoint, tmp_path, monkeypatch):
    seen = []
    original = apply_module.refine

    def spy(block, *rest):
        gain = original(block, *rest)
        seen.extend(parameter.requires_grad for parameter in block._load().parameters())
        return gain

    monkeypatch.setattr(apply_module, "refine", spy)
    run(checkpoint("llama"), tmp_path / "out")
    assert seen
    assert not any(seen)


def test_a_matrix_of_zeros_has_no_error(checkpoint, tmp_path, monkeypatch):
    weight = Block.weight
    name = "model.layers.0.mlp.up_proj.weight"
    monkeypatch.setattr(Block, "weight", lambda self, m: weight(self, m) * (m.tensor != name))
    outcome = run(checkpoint("llama"), tmp_path / "out")
    (record,) = [r for r in outcome.records if r["tensor"] == name]
    assert record["refined"]["after"] < record["refined"]["before"]
    assert record["relative_error"] == 0.0


def test_text_is_asked_for(checkpoint, tmp_path):
    recipe = Recipe.from_dict({"refine": 5, "steps": [{"method": "rtn"}]})
    with pytest.raises(ValueError, match="refine needs calibration text"):
        apply(recipe, open_source(str(checkpoint("llama"))), tmp_path / "out", [])
