"""acc generate and acc eval with --plan, from outside, on the demo model."""

from __future__ import annotations

import json

import pytest
import torch
from acc.cli.main import run
from acc.formats.calibration import Calibration

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards boil green tea and count the stars "
LAYER = {"heads": 4, "kv_heads": 2, "head_dim": 64, "refused": None}


def write(folder, layers=4, **changes):
    """A calibration of the demo, or of a model alike, half of whose KV heads stream."""
    rank = torch.arange(2 * layers, dtype=torch.int32).flip(0).view(layers, 2)
    tensors = {
        "retrieval.rank": rank,
        "retrieval.sink": torch.full_like(rank, 8),
        "retrieval.recent": torch.full_like(rank, 64),
    }
    facts = {"model": {"name": "demo"}, "layers": [LAYER | changes] * layers, "data": None}
    facts["passes"] = {"retrieval": {"settings": {"sparsity": 0.5}}}
    folder.mkdir()
    for name, raw in Calibration(tensors, facts).texts().items():
        (folder / name).write_bytes(raw)
    return folder


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return write(tmp_path_factory.mktemp("plan") / "demo")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(WORDS * 60)
    return path


def document(capsys, *words):
    verb, *rest = map(str, words)
    code = run(verb, [*rest, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def test_generate_says_what_the_cache_holds(capsys, plan):
    found = document(capsys, "generate", "demo", WORDS * 15, "--plan", plan, "--max-new-tokens", 3)
    assert found["tokens"] == 3
    assert found["cache_bytes"] < 0.8 * found["dense_cache_bytes"]
    everything = ["--plan", plan, "--sparsity", 0]
    assert (
        document(capsys, "generate", "demo", WORDS, "--max-new-tokens", 9, *everything)["text"]
        == (document(capsys, "generate", "demo", WORDS, "--max-new-tokens", 9)["text"])
    )


def test_eval_measures_what_a_plan_costs(capsys, plan, text):
    words = ["eval", "demo", "--base", "demo", "--data", text, "--window", 256, "--windows", 2, "--dtype", "float32"]
    kl = [document(capsys, *words, "--plan", plan, "--sparsity", share)["kl"] for share in (0, 0.5, 1)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert 1e-4 < kl[1] < 0.5
    assert kl[1] < kl[2] < 20


def test_passkeys_need_the_heads_that_find_them(capsys, plan, text):
    words = ["eval", "demo", "--data", text, "--passkeys", 8, "--seqlen", 500]
    dense, all_stream = document(capsys, *words), document(capsys, *words, "--plan", plan, "--sparsity", 1)
    assert dense["accuracy"] > all_stream["accuracy"]
    assert all_stream["cache_bytes"] < all_stream["dense_cache_bytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "demo", "x", "--sparsity", "0.5"], "--sparsity is of a plan"),
        (["generate", "demo", "x", "--use", "heads"], "--use is of a plan"),
        (["generate", "demo", "x", "--plan", "PLAN", "--use", "heads"], "no pass 'heads', only retrieval"),
        (["generate", "demo", "x", "--plan", "PLAN", "--adaptive"], "lacks the tensor heads.gamma"),
        (["generate", "demo", "x", "--plan", "PLAN", "--sparsity", "2"], "sparsity 2.0: expected 0 to 1"),
        (["generate", "demo", "x", "--plan", "nowhere"], "nowhere: no calibration.json there"),
        (["generate", "demo", "x", "--plan", "SHORT"], "the plan is for demo, which has 3 layers; this model has 4"),
        (["eval", "demo", "--data", "TEXT", "--plan", "OTHER"], "whose layer 0 has 4 query heads on 2 of 32"),
        (["eval", "demo", "--data", "TEXT", "--passkeys", "4", "--base", "demo"], "--passkeys asks one model"),
        (["eval", "demo", "--data", "TEXT", "--passkeys", "4", "--seqlen", "9000"], "at most 4096 tokens"),
    ],
)
def test_mistakes_are_one_line(capsys, plan, text, tmp_path, words, message):
    places = {"PLAN": plan, "TEXT": text}
    if "SHORT" in words:
        places["SHORT"] = write(tmp_path / "short", layers=3)
    if "OTHER" in words:
        places["OTHER"] = write(tmp_path / "other", head_dim=32)
    verb, *rest = (str(places.get(word, word)) for word in words)
    assert run(verb, rest) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
