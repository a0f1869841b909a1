"""The budget: losses against whole models, the table against all tables."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from acc.calibrate.stream import Stream
from acc.compress.apply import apply, assign
from acc.compress.budget import Choice, Part, best_table, divergence, measure, smallest_table
from acc.compress.recipe import Recipe
from acc.compress.rtn import Rtn
from acc.formats.source import open_source
from transformers import AutoModelForCausalLM


def ids(rows: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(2))


def candidates(method: str, *sizes: tuple[int, int]) -> list:
    steps = [{"method": method, "bits": bits, "group_size": group} for bits, group in sizes]
    return [(method, Recipe.from_dict({"steps": [step]}).steps[0].settings) for step in steps]


def measured(folder, method: str = "rtn", scaled: bool = True, text: torch.Tensor | None = None, **options):
    source = open_source(str(folder))
    recipe = Recipe.from_dict({"steps": [{"method": method}]})
    targets = set(assign(recipe, Stream(source)))
    found = candidates(method, (2, 32), (3, 32), (4, 16))
    return measure(
        source, targets, found, list((ids() if text is None else text).split(1)), bits=3.5, scaled=scaled, **options
    )


def plain_divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    """Token by token, in fp64."""
    total = 0.0
    rows = p_logits.flatten(0, 1).double(), q_logits.flatten(0, 1).double()
    for p_row, q_row in zip(*rows):
        p, q = (torch.exp(row - row.max()) for row in (p_row, q_row))
        p, q = p / p.sum(), q / q.sum()
        total += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q))
    return total / len(rows[0])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_loss_is_what_the_part_alone_does_to_the_whole_model(checkpoint, family):
    folder = checkpoint(family)
    source = open_source(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    probe = ids()[:1]
    table = measured(folder)
    with torch.no_grad():
        dense = model(probe).logits
    for choices in table[:: 2 if family == "llama" else 3]:
        nearest = min(choices, key=lambda choice: abs(choice.bits - 3.5))
        step = {"method": "rtn", "bits": nearest.settings.bits, "group_size": nearest.settings.group_size}
        packed = packed_weights(source, step, nearest.part.tensors)
        changed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        put(changed, packed)
        with torch.no_grad():
            expected = plain_divergence(dense, changed(probe).logits)
        assert nearest.loss == pytest.approx(expected, rel=2e-3, abs=1e-9)
        assert nearest.nbytes == sum(part.stored_bits * math.prod(part.shape) / 8 for part in packed.values())


def packed_weights(source, step, names):
    settings = Rtn(bits=step["bits"], group_size=step["group_size"])
    return {name: settings.compress(source.tensor(name).float(), None, lambda *a, **k: None) for name in names}


def weight_error(source, settings: Rtn, names) -> float:
    """Relative to its matrix, and as much as that has weights."""
    packed = packed_weights(source, settings.model_dump(), names)
    total = 0.0
    for name in names:
        weight = source.tensor(name).double()
        error = (packed[name].dequantize().double() - weight).square().sum() / weight.square().sum()
        total += float(error) * weight.numel()
    return total


def put(model, packed) -> None:
    """Writes dequantised weights into a model in memory, experts into their stacks."""
    state = model.state_dict()
    for name, part in packed.items():
        weight = part.dequantize()
        if name in state:
            state[name].copy_(weight)
            continue
        path, _, rest = name.partition(".experts.")  # mixtral on disk: w1 gate, w3 up, w2 down
        expert, leaf = int(rest.split(".")[0]), rest.split(".")[1]
        stem = path.replace("block_sparse_moe", "mlp") + ".experts."
        if leaf == "w2":
            state[stem + "down_proj"][expert].copy_(weight)
        else:
            half = len(weight)
            state[stem + "gate_up_proj"][expert, half * (leaf == "w3") :][:half].copy_(weight)


def test_losses_at_the_outputs_have_the_order_of_their_bits(checkpoint):
    for choices in measured(checkpoint("llama"), scaled=False):
        losses = [choice.loss for choice in choices]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] > 0


def test_what_learned_rounding_takes_away_is_not_lost(checkpoint):
    """On the batch that it has not seen, and never more is lost than without it."""
    text = ids(17, 64)
    before, after = (measured(checkpoint("llama"), scaled=False, text=text, refine=steps) for steps in (0, 16))
    totals = []
    for block in range(3):
        early, late = (
            sum(choices[1].loss for choices in table if choices[0].part.block == block) for table in (before, after)
        )
        totals.append(late / early)
    assert max(totals) < 1.01  # what parts lose alone adds up to what the block loses but for this
    assert min(totals) < 0.98


def test_a_learned_loss_is_what_learning_the_others_with_the_part_dense_gains(checkpoint, monkeypatch):
    """Against whole models: in place of learning, weights go half the way back to the dense ones."""

    def halfway(block, roundings, targets, order):
        assert 0 not in order
        for (parameter, cut), matrix in zip(block.places(list(roundings)), roundings, strict=True):
            cut(parameter.data).lerp_(block.weight(matrix), 0.5)

    monkeypatch.setattr("acc.compress.budget.learn", halfway)
    folder = checkpoint("llama")
    source, probe = open_source(str(folder)), ids()[:1]
    table = measured(folder, refine=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, given, out, index=index: seen.update({index: out}))
    state = model.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}

    def run(tensors: list[str], step: dict, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        for name, packed in packed_weights(source, step, tensors).items():
            state[name].copy_((kept[name] + packed.dequantize()) / 2)
        with torch.no_grad():
            logits = model(probe).logits
        for name in tensors:
            state[name].copy_(kept[name])
        return logits, seen[block]

    def distance(output: torch.Tensor, target: torch.Tensor) -> float:
        rows = zip(output[0].double(), target[0].double())
        return sum(float((a - b).square().sum() / b.square().sum()) for a, b in rows) / len(output[0])

    for block in range(3):
        mine = [choices for choices in table if choices[0].part.block == block]
        nearest = [min(choices, key=lambda choice: abs(choice.bits - 3.5)) for choices in mine]
        assert len({choice.settings for choice in nearest}) == 1
        step = {"bits": nearest[0].settings.bits, "group_size": nearest[0].settings.group_size}
        every = [name for choice in nearest for name in choice.part.tensors]
        dense, target = run([], step, block)
        learned, output = run(every, step, block)
        gains = []
        for choice in nearest:
            _, without = run([name for name in every if name not in choice.part.tensors], step, block)
            gain = distance(output, target) - distance(without, target)
            floor = 0.2 * choice.part.weights / sum(c.part.weights for c in nearest)
            gains.append(max(gain, floor * distance(output, target)))
        divergence = plain_divergence(dense, learned)
        for choices, choice, gain in zip(mine, nearest, gains):
            assert choice.loss == pytest.approx(divergence * gain / sum(gains), rel=5e-3)
            errors = [weight_error(source, choice.settings, choice.part.tensors) for choice in choices]
            losses = [other.loss / choice.loss for other in choices]
            assert losses == pytest.approx([e / errors[choices.index(choice)] for e in errors], rel=1e-3)


@pytest.mark.parametrize("per_expert", [False, True])
def test_learning_begins_with_the_packed_weights_and_ends_where_it_ends(checkpoint, monkeypatch, per_expert):
    """In place of learning the dense weights are put back: nothing is lost at any setting."""
    begun: list[set[str]] = []

    def put_back(block, roundings, targets, order):
        begun.append({matrix.tensor for matrix in roundings})
        assert 0 not in order
        for (parameter, cut), matrix in zip(block.places(list(roundings)), roundings, strict=True):
            assert float((cut(parameter.data) - block.weight(matrix)).abs().max()) > 1e-4
            cut(parameter.data).copy_(block.weight(matrix))

    monkeypatch.setattr("acc.compress.budget.learn", put_back)
    table = measured(checkpoint("mixtral"), refine=2, per_expert=per_expert)
    assert max(choice.loss for choices in table for choice in choices) < 1e-9
    whole, *others = begun[:4]  # of the first block: all, then all but q, k, v; but o; but the experts
    assert sorted(len(whole - one) for one in others) == [1, 3, 12]
    assert len(begun) == 3 * 4


def test_experts_share_what_their_layer_loses_as_they_lose_alone(checkpoint, monkeypatch):
    monkeypatch.setattr("acc.compress.budget.learn", lambda *_: None)
    alone, learned = (measured(checkpoint("mixtral"), scaled=False, refine=steps, per_expert=True) for steps in (0, 2))
    for block in range(3):
        ratios = []
        for plain, shared in zip(alone, learned, strict=True):
            if plain[0].part.block == block and "experts" in plain[0].part.tensors[0]:
                nearest = min(range(3), key=lambda at: abs(plain[at].bits - 3.5))
                ratios.append(shared[nearest].loss / plain[nearest].loss)
        assert len(ratios) == 4
        assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-5)


def test_what_cannot_be_learned_loses_what_it_loses_alone(checkpoint, monkeypatch):
    monkeypatch.setattr("acc.compress.refine.Rounding.of", lambda *_: None)
    assert measured(checkpoint("llama"), refine=6) == measured(checkpoint("llama"))


def test_parts_are_what_a_runtime_needs_in_one_form(checkpoint):
    llama = [choices[0].part.tensors for choices in measured(checkpoint("llama"), "rtn", False)]
    assert len(llama) == 12
    for names in llama:
        leaves = {name.split(".")[-2] for name in names}
        assert leaves in ({"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
    mixtral = [choices[0].part for choices in measured(checkpoint("mixtral"), "rtn", False)]
    whole = [part for part in mixtral if "experts" in part.tensors[0]]
    assert [len(part.tensors) for part in whole] == [12, 12, 12]
    single = measured(checkpoint("mixtral"), "rtn", False, per_expert=True)
    assert sum("experts" in choices[0].part.tensors[0] for choices in single) == 12
    stacked = [choices[0].part for choices in measured(checkpoint("gpt_oss"), "rtn", False, per_expert=True)]
    assert sum("experts" in part.tensors[0] for part in stacked) == 3  # a stored stack has one scheme
    names = [name for part in mixtral for name in part.tensors]
    assert len(names) == len(set(names))


def options(seed: int, parts: int = 6, choices: int = 3) -> list[list[Choice]]:
    rng = random.Random(seed)
    found = []
    for number in range(parts):
        part = Part(0, (f"tensor {number}",), 1000)
        sizes = sorted(rng.randint(100, 900) for _ in range(choices))
        losses = sorted((rng.random() for _ in range(choices)), reverse=True)
        found.append([Choice(part, "rtn", Rtn(), n, True, loss) for n, loss in zip(sizes, losses)])
    return found


@pytest.mark.parametrize("seed", range(8))
def test_no_other_table_of_that_size_loses_less(seed):
    given = options(seed)
    least = sum(min(c.nbytes for c in choices) for choices in given)
    most = sum(max(c.nbytes for c in choices) for choices in given)
    limit = least + (most - least) * (seed + 1) // 10
    table = best_table(given, limit)
    every = [pick for pick in itertools.product(*given) if sum(c.nbytes for c in pick) <= limit]
    best = min(sum(c.loss for c in pick) for pick in every)
    assert table.nbytes <= limit
    assert [c.part for c in table.choices] == [choices[0].part for choices in given]
    assert table.loss == pytest.approx(best, rel=1e-3)
    assert table.bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_no_smaller_table_loses_as_little(seed):
    given = options(seed)
    least = sum(min(c.loss for c in choices) for choices in given)
    most = sum(max(c.loss for c in choices) for choices in given)
    limit = least + (most - least) * (seed + 1) / 10
    table = smallest_table(given, limit)
    every = [pick for pick in itertools.product(*given) if sum(c.loss for c in pick) <= limit]
    fewest = min(sum(c.nbytes for c in pick) for pick in every)
    assert table.loss <= limit * (1 + 1e-6)
    assert table.nbytes == pytest.approx(fewest, rel=1e-3)
    assert table.bound <= fewest * (1 + 1e-9)
    with pytest.raises(ValueError, match="lose less than"):
        smallest_table(given, 0.99 * least)


def test_a_budget_that_cannot_be_met_names_the_least(checkpoint):
    given = options(0)
    least = sum(min(c.nbytes for c in choices) for choices in given)
    assert best_table(given, least).nbytes == least
    with pytest.raises(ValueError, match=f"{least:,} bytes"):
        best_table(given, least - 1)


def test_its_steps_make_just_these_bytes(checkpoint, tmp_path):
    table = best_table(given := measured(checkpoint("mixtral")), sum(c[1].nbytes for c in given))
    recipe = Recipe.from_dict({"steps": [{"method": "rtn"}]}).model_copy(update={"steps": tuple(table.steps())})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    outcome = apply(recipe, open_source(str(checkpoint("mixtral"))), tmp_path / "out", [])
    made = open_source(str(outcome.folder))
    assert sum(made.info(name).nbytes for name in made.entries) == table.nbytes
    for choice in table.choices:
        for name in choice.part.tensors:
            assert made.entries[name].scheme["bits"] == choice.settings.bits


def test_divergence_is_that_of_the_definition():
    p, q = torch.randn(2, 5, 40), torch.randn(2, 5, 40)
    assert divergence(p, q) == pytest.approx(plain_divergence(p, q), rel=1e-9)
    assert divergence(p, p) == 0


@pytest.mark.parametrize("refine", [0, 3])
def test_measuring_leaves_the_model_as_it_was(checkpoint, refine):
    assert measured(Path(checkpoint("llama")), refine=refine) == measured(checkpoint("llama"), refine=refine)
