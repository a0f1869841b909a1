"""`acc plan` from outside: what it says is what the run then says, and refusals come with the mend."""

from __future__ import annotations

import json
import shutil

import pytest
from acc.cli.main import run


def call(capsys, *words):
    code = run(str(words[0]), [str(word) for word in words[1:]])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan_says_what_quantize_then_does(capsys, checkpoint, tmp_path):
    model, words = checkpoint("gpt_oss"), ["--method", "rtn", "--bits", "5", "--group-size", "32", "--json"]
    code, out, err = call(capsys, "plan", model, *words)
    assert code == 0, err
    told = json.loads(out)
    code, out, _ = call(capsys, "quantize", model, tmp_path / "out", *words)
    assert code == 0
    made = json.loads(out)
    assert told["before"] == made["dense"]["bytes"]
    assert told["after"] == made["packed"]["bytes"]
    assert told["packed_bits"] == pytest.approx(made["packed"]["packed_bits"])
    assert told["bits"] == pytest.approx(made["packed"]["bits"])
    assert told["recipe"]["steps"] == made["recipe"]["steps"]
    assert told["recipe"]["calibration"] == made["recipe"]["calibration"]
    assert sum(row["after"] for row in told["classes"].values()) == told["after"]
    weights = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert told["disk"]["written"] == pytest.approx(weights, rel=0.02)
    assert told["seconds"]
    assert told["memory"]["peak"] > 0


def test_the_demo_s_mix_is_as_large_as_planned(capsys, tmp_path):
    words = ["--method", "rtn", "--bits", "3.4", "--json"]
    code, out, err = call(capsys, "plan", "demo", *words)
    assert code == 0, err
    told = json.loads(out)
    data = tmp_path / "text.txt"
    data.write_text("What is said here is said again, and again, until all of it has been said. " * 40)
    more = ["--data", data, "--nsamples", "2", "--seqlen", "64"]
    code, out, err = call(capsys, "quantize", "demo", tmp_path / "out", *words, *more)
    assert code == 0, err
    made = json.loads(out)
    assert told["after"] == pytest.approx(made["packed"]["bytes"], rel=0.02)
    assert told["packed_bits"] == pytest.approx(made["packed"]["packed_bits"], rel=0.02)


def test_a_mix_smaller_than_can_be_says_the_least(capsys, checkpoint):
    code, _, err = call(capsys, "plan", checkpoint("llama"), "--method", "gptq", "--bits", "1.5")
    assert code == 2
    assert "the least that gptq can do there is 2." in err


@pytest.mark.parametrize("quick", [True, False])
def test_another_type_than_the_model_s_is_said(capsys, products, quick):
    products(quick)
    code, out, err = call(capsys, "plan", "demo", "--method", "rtn")
    assert code == 0, err
    assert ("Run in    float32" in out) is not quick
    _, out, _ = call(capsys, "plan", "demo", "--method", "rtn", "--json")
    assert json.loads(out)["recipe"]["dtype"] == "auto"


def test_what_is_printed(capsys, checkpoint):
    code, out, err = call(capsys, "plan", checkpoint("mixtral"), "--bits", "4", "--ignore", "*.o_proj")
    assert code == 0, err
    for word in ("experts", "attention", "packed part", "Disk", "Memory", "Time", "Loads in", "stored bits"):
        assert word in out
    assert "--bits 4 --ignore '*.o_proj'" in out.splitlines()[-1]
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith(("Model", "Next")))


def test_it_names_who_could_load_the_result(capsys, checkpoint):
    def engines(*words) -> set[str]:
        code, out, err = call(capsys, "plan", checkpoint("llama"), *words, "--json")
        assert code == 0, err
        return set(json.loads(out)["engines"]) - {"transformers", "any other"}

    assert engines("--method", "rtn", "--bits", "4", "--group-size", "32") == {"gptq", "compressed-tensors", "bcq"}
    assert engines("--method", "rtn", "--bits", "5", "--group-size", "32") == {"compressed-tensors", "bcq"}
    assert engines("--method", "gptq", "--bits", "4", "--group-size", "-1") >= {"gptq", "compressed-tensors"}
    assert engines("--bits", "3") == set()
    assert engines("--bits", "3", "--stat-group-size", "16") == {"spqr-hf"}


def test_the_most_bits_that_fit(capsys, checkpoint):
    """One byte less than what b bits take leaves b - 1."""
    model, words = checkpoint("llama"), ["--method", "rtn", "--group-size", "32", "--json"]
    every = json.loads(call(capsys, "plan", model, *words, "--fit", "1MB")[1])
    assert every["recipe"]["steps"][0]["bits"] == 8
    small = json.loads(call(capsys, "plan", model, *words, "--fit", every["fit"]["bytes"]["8"] - 1)[1])
    assert small["recipe"]["steps"][0]["bits"] == 7
    assert small["fit"]["bytes"]["8"] > small["fit"]["limit"] >= small["fit"]["bytes"]["7"]
    code, _, err = call(capsys, "plan", model, *words, "--fit", "10kB")
    assert code == 2
    assert "the least is" in err
    assert "at 2 bits" in err
    for wrong in ("six", "0", "5 parsecs", "-3GiB", "1.2.3"):
        code, _, err = call(capsys, "plan", model, *words, f"--fit={wrong}")
        assert code == 2, wrong
        assert "expected a size" in err
    assert "give one of them" in call(capsys, "plan", model, *words, "--fit", "1MB", "--bits", "3")[2]


def test_a_recipe_is_planned(capsys, checkpoint):
    code, out, err = call(capsys, "plan", checkpoint("llama"), "--recipe", "smallest", "--set", "steps.0.bits=2")
    assert code == 0, err
    assert "bits 2, group_size 32" in out
    assert out.splitlines()[-1].endswith("--set steps.0.bits=2")
    model = checkpoint("llama")
    assert "change the recipe with --set" in call(capsys, "plan", model, "--recipe", "smallest", "--bits", "3")[2]
    assert "change the recipe with --set" in call(capsys, "plan", model, "--recipe", "smallest", "--sweeps", "3")[2]
    assert "name one with --recipe" in call(capsys, "plan", model, "--set", "refine=3")[2]
    assert "there is no 'sqpr'" in call(capsys, "plan", model, "--method", "sqpr")[2]
    assert "matches no tensor" in call(capsys, "plan", model, "--ignore", "dwon_proj")[2]


def test_a_disk_that_is_too_small_is_refused_with_what_is_missing(capsys, checkpoint, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, out, err = call(capsys, "plan", checkpoint("llama"), tmp_path / "not" / "yet", "--method", "rtn")
    assert code == 1
    assert "of disk are missing" in err
    assert "whole model" in out
    assert not (tmp_path / "not").exists()
