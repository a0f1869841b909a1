"""The model card: metadata that the hub understands, figures that are those of the report, nothing of the machine."""

import shutil

import pytest
import torch
import yaml
from acc.compress.apply import apply
from acc.compress.card import card
from acc.compress.recipe import Recipe
from acc.formats.source import open_source

LICENCE = "---\nlicense: other\nlicense_name: of-the-base\nlanguage: [en]\ntags: [theirs]\n---\n\n# Base\n"


@pytest.fixture
def made(checkpoint, tmp_path):
    folder = tmp_path / "tiny-1.5B"
    shutil.copytree(checkpoint("llama"), folder)
    (folder / "README.md").write_text(LICENCE)
    recipe = Recipe.from_dict({"steps": [{"method": "rtn", "bits": 3, "group_size": 16}]})
    source = open_source(str(folder))
    outcome = apply(recipe, source, tmp_path / "out", [])
    return source, recipe, outcome


def test_front_matter(made, tmp_path):
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["base_model_relation"] == "quantized"
    assert found["library_name"] == "transformers"
    assert found["license"] == "other"
    assert found["license_name"] == "of-the-base"
    assert found["tags"] == ["acc", "rtn", "3-bit"]
    assert "base_model" not in found, "a local folder is no address on the hub"
    assert body.startswith("\n# tiny-1.5B, rtn at ")


def test_a_base_on_the_hub_is_named(made):
    source, recipe, outcome = made
    source.kind, source.spec = "hub", "org/name@main"
    front = card(source, recipe, outcome.records, None).split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == "org/name"


def test_figures_are_counted_from_the_files(made, tmp_path):
    text = (tmp_path / "out" / "README.md").read_text()
    packed = open_source(str(tmp_path / "out"))
    nbytes = sum(packed.info(name).nbytes for name in packed.entries)
    weights = sum(torch.Size(packed.info(name).shape).numel() for name in packed.entries)
    assert f"| packed weights, counted from the files | {8 * nbytes / weights:.3f} |" in text
    every = [packed.info(name) for name in packed.names()]
    whole = 8 * sum(i.nbytes for i in every) / sum(torch.Size(i.shape).numel() for i in every)
    assert f"| all weights, counted from the files | {whole:.3f} |" in text


def test_the_card_does_not_tell_where_it_was_made(made, tmp_path):
    source, recipe, outcome = made
    text = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert text == card(source, recipe.settled(source.dtype, "cpu"), outcome.records, None)


@pytest.mark.parametrize("readme", ["", "---\n[broken\n---\n", "--- no front matter", "---\n- a list\n---\n"])
def test_any_readme_of_the_base_will_do(made, readme):
    source, recipe, outcome = made
    (source.folder / "README.md").write_text(readme)
    front = card(source, recipe, outcome.records, None).split("---\n")[1]
    assert "license" not in yaml.safe_load(front)
