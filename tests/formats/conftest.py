"""Tiny packed checkpoints, written once per session."""

from __future__ import annotations

import json

import pytest
import torch
from acc.compress.apply import apply
from acc.compress.recipe import Recipe
from acc.formats.source import open_source


@pytest.fixture(scope="session")
def packed(checkpoint, tmp_path_factory):
    """`packed("llama", "spqr")` -> the folder of a tiny packed checkpoint."""
    made = {}

    def make(family: str, method: str, **step):
        key = (family, method, json.dumps(step))
        if key not in made:
            out = tmp_path_factory.mktemp("packed") / f"{family}-{method}"
            outliers = {"outlier_threshold": 0.2} if method == "spqr" else {}  # a few in every matrix
            settings = {"bits": 3, "group_size": 16, **outliers, **step}
            recipe = Recipe.from_dict({"steps": [{"method": method, **settings}]})
            calibration = [torch.randint(3, 128, (2, 48), generator=torch.Generator().manual_seed(1))]
            apply(recipe, open_source(checkpoint(family)), out, calibration if recipe.needs else [])
            made[key] = out
        return made[key]

    return make
