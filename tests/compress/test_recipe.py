"""Recipes as files: what a wrong one is told, what `--set` changes, and whether those that come with acc are true."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from acc.compress.recipe import Recipe, override
from acc.registry import RECIPES, recipes

RESULTS = Path(__file__).parents[1] / "bench" / "results"
MEASURED = re.compile(r'^# tests/bench/results/([\w.-]+\.json), row "(.+)"$', re.M)


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_set_changes_one_value_and_leaves_the_rest():
    data = {"refine": 16, "steps": [{"method": "spqr", "bits": 3}, {"method": "rtn"}]}
    changed = override(data, ["steps.0.bits=4", "steps.1.symmetric=true", "calibration.nsamples=64", "refine=0"])
    assert changed == {
        "refine": 0,
        "steps": [{"method": "spqr", "bits": 4}, {"method": "rtn", "symmetric": True}],
        "calibration": {"nsamples": 64},
    }
    assert data == {"refine": 16, "steps": [{"method": "spqr", "bits": 3}, {"method": "rtn"}]}
    assert override(data, ["steps.0.outlier_threshold=null"])["steps"][0]["outlier_threshold"] is None
    assert override({}, ["steps=[{method: rtn}]", "steps.0.bits=3"]) == {"steps": [{"method": "rtn", "bits": 3}]}
    assert override({}, ["calibration.data=a=b"]) == {"calibration": {"data": "a=b"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("refine", "expected path=value"),
        ("=3", "expected path=value"),
        ("steps.2.bits=3", "no '2' in a list of 1"),
        ("steps.last.bits=3", "no 'last' in a list"),
        ("steps.0.bits.low=3", "no 'low' in 3"),
        ("refine={", "not YAML"),
        ("steps.0.bist=3", "no option 'bist'; there is bits"),
        ("steps.0.target=[x]", "no option 'target'; there is targets"),
        ("calibration.nsample=3", "no option 'nsample' in calibration; there is nsamples"),
        ("calibrations.nsamples=3", "no option 'calibrations'; there is calibration"),
        ("steps.0.bits=9", "less than or equal to 8"),
        ("steps.0.method=sqpr", "there is no 'sqpr'; there is spqr"),
        ("steps=[]", "needs one or more"),
        ("refine=x", "valid integer"),
    ],
)
def test_a_wrong_change_is_one_line(tmp_path, change, said):
    path = written(tmp_path, "steps:\n  - method: spqr\n    bits: 3\n")
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        Recipe.read(path, [change])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz:\n  - method: rtn\n", "no option 'stepz'; there is steps"),
        ("steps:\n  - method: rtn\n    groupsize: 8\n", "no option 'groupsize'; there is group_size"),
        ("steps:\n  - bits: 3\n", "a step needs a `method`"),
        ("- method: rtn\n", "valid dictionary"),
        ("steps: [\n", "not YAML"),
        ("", "valid dictionary"),
    ],
)
def test_a_wrong_file_is_told_which_key(tmp_path, text, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        Recipe.read(written(tmp_path, text))
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_are_whole(name):
    path = RECIPES / f"{name}.yaml"
    recipe = Recipe.read(path)
    assert recipe.calibration.data is None
    assert not recipe.calibration.model_fields_set  # what suits the model is the model's affair
    assert recipes()[name].endswith(".")
    assert len(recipes()[name]) <= 70
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", recipes())
def test_the_figures_of_shipped_recipes_are_those_of_the_file_they_name(name):
    """And the settings those that were measured."""
    path = RECIPES / f"{name}.yaml"
    text, recipe = path.read_text(), Recipe.read(path)
    found = MEASURED.search(text)
    if found is None:
        pytest.skip(f"{name} was not measured")
    results = json.loads((RESULTS / found[1]).read_text())
    row = results["rows"][found[2]]
    if "quantize" in row:  # quality.py
        bits, perplexity, kl = row["quantize"]["packed"]["packed_bits"], row["eval"]["perplexity"], row["eval"]["kl"]
        dense, measured = row["eval"]["perplexity_base"], row["quantize"]["recipe"]
        assert f"KL {kl:.3f}" in text
        step = measured["steps"][-1]
        assert measured.get("refine", 0) == recipe.refine
        assert step.items() <= recipe.to_dict()["steps"][-1].items()
    else:  # ablation.py
        bits, perplexity, dense = row["stored_bits"], row["perplexity"], results["dense_perplexity"]
        options = dict(zip(row["options"][::2], row["options"][1::2], strict=True))
        assert int(options.pop("--refine", 0)) == recipe.refine
        settings = recipe.to_dict()["steps"][-1] | {"bits": row["bits"]}
        for option, value in options.items():
            assert float(settings[option[2:].replace("-", "_")]) == float(value)
    assert f"{bits:.2f} stored bits, perplexity {perplexity:.2f} (dense {dense:.2f})" in text
    assert (
        f"{results['settings']['nsamples']} sequences of {results['settings']['seqlen']}" in text or recipe.needs == ()
    )
