"""acc export and what it wrote, from outside: other engines' checkpoints are models like any other."""

from __future__ import annotations

import json

import pytest
from acc.cli.main import run

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards boil green tea and count the stars "


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "packed"
    words = ["demo", str(out), "--method", "rtn", "--bits", "4", "--group-size", "32", "--symmetric", "true"]
    assert run("quantize", words) == 0
    return out


def call(capsys, *words):
    verb, *rest = map(str, words)
    code = run(verb, rest)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_another_engines_checkpoint_is_a_model(capsys, packed, tmp_path, to):
    """Inspected, evaluated against what it came from, and written dense."""
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 40)
    out, dense = tmp_path / "out", tmp_path / "dense"
    code, said, _ = call(capsys, "export", packed, out, "--to", to)
    assert code == 0
    assert "float16" in said
    assert f"acc eval {out}" in said
    code, said, _ = call(capsys, "inspect", out, "--json")
    stored = json.loads(said)["stored"]
    assert stored["packed_parameters"] > 0.7 * stored["parameters"]
    assert 4.5 <= stored["packed_bits"] < 5.5
    assert call(capsys, "export", out, dense, "--to", "dense")[0] == 0
    for model in (out, dense):
        words = ["eval", model, "--base", packed, "--data", text, "--window", "64", "--windows", "2"]
        code, said, _ = call(capsys, *words, "--dtype", "float32", "--json")
        assert code == 0
        # the same numbers, rounded to float16 instead of bfloat16: a router near a tie may choose otherwise
        assert json.loads(said)["kl"] < 0.05
    code, _, err = call(capsys, "quantize", out, tmp_path / "no", "--method", "rtn")
    assert code == 2
    assert "packed already" in err


def test_errors_are_one_line_and_leave_nothing(capsys, packed, tmp_path):
    out = tmp_path / "out"
    cases = {
        "there is dense, bcq, bnb, compressed-tensors, gptq, spqr-hf": ["export", packed, out, "--to", "exl3"],
        "it is packed as grouped, and bitsandbytes has nf4 and int8": ["export", packed, out, "--to", "bnb"],
        "the model is not packed": ["export", "demo", out, "--to", "gptq"],
    }
    for expected, words in cases.items():
        code, _, err = call(capsys, *words)
        assert code == 2
        assert expected in err
        assert len(err.strip().splitlines()) == 1
        assert not list(tmp_path.iterdir())


def test_without_its_package_an_engines_checkpoint_does_not_run(capsys, packed, tmp_path):
    assert call(capsys, "export", packed, tmp_path / "out", "--to", "gptq")[0] == 0
    code, _, err = call(capsys, "generate", tmp_path / "out", "the quick", "--max-new-tokens", "2")
    if code == 0:
        pytest.skip("gptqmodel is installed")
    assert code == 2
    assert "acc export --to dense" in err
    assert len(err.strip().splitlines()) == 1


def test_nf4_knows_its_own_width(capsys, tmp_path):
    code, said, _ = call(
        capsys, "quantize", "demo", tmp_path / "out", "--method", "nf4", "--double-quant", "true", "--json"
    )
    assert code == 0
    made = json.loads(said)
    assert made["recipe"]["steps"][0]["bits"] == 4
    assert 4.12 < made["nominal_bits"] < 4.13
    code, _, err = call(capsys, "quantize", "demo", tmp_path / "no", "--method", "int8", "--bits", "4")
    assert code == 2
    assert "bits" in err
    code, said, _ = call(capsys, "show", "nf4")
    assert code == 0
    assert "--double-quant" in said
    code, said, _ = call(capsys, "show", "--json")
    assert {"dense", "gptq", "bnb"} <= json.loads(said)["exports"].keys()
