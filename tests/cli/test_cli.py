"""The command line from outside: verbs on a tiny model with a tokenizer, and every kind of bad input in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from acc.cli.main import run, verbs
from acc.cli.spending import cut
from acc.formats.hf import PackedExperts, load
from acc.formats.store import Store
from acc.registry import recipes

ACC = Path(sys.executable).with_name("acc")
WORDS = "the quick brown fox jumps over the lazy dog while seven wizards boil green tea and count the stars "


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    """A tiny model with a byte-level tokenizer of 128 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("cli") / "tiny"
    shutil.copytree(checkpoint("llama"), folder)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(WORDS * 60)
    return path


@pytest.fixture(scope="module")
def packed(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "packed"
    words = [str(model), str(out), "--bits", "4", "--data", str(text), "--nsamples", "4", "--seqlen", "32"]
    assert run("quantize", words) == 0
    return out


def call(capsys, *words) -> tuple[int, str, str]:
    verb, *rest = map(str, words)
    code = run(verb, rest)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one_line(capsys, code: int, *words) -> str:
    """The verb fails with this code and one line on stderr, and prints no traceback."""
    found, _, err = call(capsys, *words)
    lines = [line for line in err.strip().splitlines() if not line.lstrip()[:4].rstrip("%").isdigit()]
    assert found == code, err
    assert len(lines) == 1, err
    assert lines[0].startswith("acc: ")
    return lines[0]


def test_every_verb_has_help(capsys):
    assert set(verbs()) == {
        "inspect",
        "quantize",
        "eval",
        "generate",
        "verify",
        "export",
        "show",
        "bench",
        "apply",
        "plan",
        "calibrate",
    }
    for verb in verbs():
        code, out, _ = call(capsys, verb, "--help")
        assert code == 0
        assert "--json" in out
        assert all(len(line) <= 110 for line in out.splitlines())


def test_quantize_eval_verify_generate_export(capsys, model, text, packed, tmp_path):
    code, out, _ = call(capsys, "eval", packed, "--base", model, "--data", text, "--window", "64", "--windows", "3")
    assert code == 0
    assert "perplexity" in out
    assert "Next: acc generate" in out
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith(("Text", "Next")))
    assert call(capsys, "verify", packed)[0] == 0
    code, out, _ = call(capsys, "generate", packed, "the quick", "--max-new-tokens", "3")
    assert code == 0
    assert "3 tokens" in out
    assert call(capsys, "export", packed, tmp_path / "dense", "--to", "dense")[0] == 0
    words = ["eval", tmp_path / "dense", "--base", packed, "--data", text, "--window", "64", "--windows", "2"]
    code, out, _ = call(capsys, *words, "--json")
    assert code == 0
    assert json.loads(out)["kl"] == pytest.approx(0, abs=1e-9)


def test_json_is_one_document(capsys, model, text, packed, tmp_path):
    commands = [
        ["inspect", model],
        ["quantize", model, tmp_path / "o", "--method", "rtn", "--group-size", "32"],
        ["eval", packed, "--data", text, "--window", "32", "--windows", "2"],
        ["generate", packed, "the", "--max-new-tokens", "2"],
        ["verify", packed],
        ["show"],
        ["show", "spqr"],
    ]
    for command in commands:
        code, out, _ = call(capsys, *command, "--json")
        assert code == 0
        assert json.loads(out)


def test_a_missed_bound_is_exit_code_3(capsys, model, text, packed):
    words = ["eval", packed, "--base", model, "--data", text, "--window", "32", "--windows", "2"]
    assert "above --max-kl" in one_line(capsys, 3, *words, "--max-kl", "1e-9")
    assert "above --max-ppl-ratio" in one_line(capsys, 3, *words, "--max-ppl-ratio", "0.5")
    assert call(capsys, *words, "--max-kl", "10", "--max-ppl-ratio", "10")[0] == 0
    assert "--base" in one_line(capsys, 2, "eval", packed, "--data", text, "--max-kl", "1")


def test_a_budget_mixes_bits(capsys, model, text, tmp_path):
    words = [
        "quantize",
        model,
        tmp_path / "mix",
        "--method",
        "rtn",
        "--data",
        text,
        "--nsamples",
        "4",
        "--seqlen",
        "32",
    ]
    code, out, _ = call(capsys, *words, "--bits", "3.2", "--json")
    made = json.loads(out)
    assert code == 0
    assert 3.0 < made["packed"]["packed_bits"] <= 3.2
    assert len(made["recipe"]["steps"]) > 1
    told = json.loads((tmp_path / "mix" / "budget.json").read_text())
    assert told["lower_bound"] <= told["expected_loss"] * (1 + 1e-9)
    assert told["expected_bytes"] == made["packed"]["packed_bytes"]
    assert call(capsys, "verify", tmp_path / "mix")[0] == 0
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) // 2
    code, out, _ = call(capsys, *words, "--fit", f"{size}B", "--sensitivity", "output", "--overwrite")
    assert code == 0
    assert sum(path.stat().st_size for path in (tmp_path / "mix").glob("*.safetensors")) <= size
    assert "no table of this size has less" in out
    assert [
        line for line in out.splitlines() if len(line) > 80 and not line.startswith(("Text", "Model", "Next"))
    ] == []
    assert "smallest settings take" in one_line(capsys, 2, *words, "--bits", "2.01", "--overwrite")
    assert "takes" in one_line(capsys, 2, *words, "--fit", "9K", "--overwrite")
    assert "6GiB" in one_line(capsys, 2, *words, "--fit", "lots", "--overwrite")
    assert "kl or output" in one_line(capsys, 2, *words, "--sensitivity", "all")


@pytest.mark.parametrize(("nsamples", "seqlen"), [(1, 48), (3, 200)])
def test_a_budget_takes_any_sequences(capsys, model, text, tmp_path, monkeypatch, nsamples, seqlen):
    for name in ("PROBE", "ALONE"):
        monkeypatch.setattr(f"acc.cli.spending.{name}", 64)
    words = ["quantize", model, tmp_path / "mix", "--method", "rtn", "--bits", "3.2", "--data", text]
    for refine in ("0", "2"):
        more = ["--nsamples", nsamples, "--seqlen", seqlen, "--refine", refine, "--overwrite"]
        code, _, err = call(capsys, *words, *more)
        assert code == 0, err


@pytest.mark.parametrize(
    ("rows", "length", "first", "rest"),
    [(1, 48, (1, 48), (0, 48)), (3, 200, (1, 64), (5, 64)), (32, 16, (4, 16), (20, 16)), (8, 16, (2, 16), (6, 16))],
)
def test_losses_are_measured_on_other_text_than_is_learned_on(rows, length, first, rest):
    text = torch.arange(rows * length).view(rows, length)
    probe, lessons = cut(text, 64, 384)
    assert (probe.shape, lessons.shape) == (first, rest)
    used = [*probe.flatten().tolist(), *lessons.flatten().tolist()]
    assert len(set(used)) == len(used) <= 384


def test_a_loss_that_is_allowed_decides_the_bytes(capsys, model, text, checkpoint, tmp_path):
    words = ["--method", "rtn", "--json"]
    more = [*words, "--data", text, "--nsamples", "4", "--seqlen", "32"]
    found = {}
    for most in ("1e-2", "1e-1"):
        out = tmp_path / most
        code, said, err = call(capsys, "quantize", model, out, "--max-kl", most, *more)
        assert code == 0, err
        made, told = json.loads(said), json.loads((out / "budget.json").read_text())
        assert told["expected_loss"] <= float(most) * (1 + 1e-6)
        assert told["lower_bound"] <= told["expected_bytes"] == made["packed"]["packed_bytes"]
        code, said, err = call(capsys, "plan", model, "--max-kl", most, "--measured", out, *words)
        assert code == 0, err
        planned = json.loads(said)
        assert planned["after"] == made["packed"]["bytes"]
        assert planned["recipe"]["steps"] == made["recipe"]["steps"]
        assert planned["mix"]["expected_loss"] == pytest.approx(told["expected_loss"])
        found[most] = planned["packed_bits"]
    assert found["1e-2"] > found["1e-1"]
    folder = ["--measured", tmp_path / "1e-2"]
    code, said, _ = call(capsys, "plan", model, "--bits", "3.4", *folder, "--method", "rtn")
    assert code == 0
    assert "no table of this size has less" in said
    assert "--method rtn --bits 3.4" in said.splitlines()[-1]
    again = tmp_path / "again"
    code, said, err = call(capsys, "quantize", model, again, "--max-kl", "1e-1", *folder, *more)
    assert code == 0, err
    assert json.loads(said)["recipe"] == made["recipe"]  # with what the other run measured
    assert (again / "budget.json").read_text() == (tmp_path / "1e-1" / "budget.json").read_text()
    refusals = {
        "acc quantize --max-kl": ["--max-kl", "0.1"],
        "give one of them": ["--max-kl", "0.1", "--bits", "3"],
        "give --max-kl, --fit or --bits": [*folder, "--bits", "3"],
        "is of --method rtn": [*folder, "--max-kl", "0.1", "--method", "gptq"],
        "was measured with symmetric False, not True": [
            *folder,
            "--bits",
            "3.4",
            "--method",
            "rtn",
            "--symmetric=true",
        ],
        "rotated otherwise": [*folder, "--bits", "3.4", "--method", "rtn", "--rotate", "heads"],
        "for --refine 0, not 4": [*folder, "--bits", "3.4", "--method", "rtn", "--refine", "4"],
        "are in one of the two runs alone": [*folder, "--max-kl", "0.1", "--method", "rtn", "--ignore", "*down_proj*"],
        "lose less than": [*folder, "--max-kl", "1e-9", "--method", "rtn"],
        "no budget.json of acc there": ["--max-kl", "0.1", "--measured", tmp_path],
    }
    for reason, given in refusals.items():
        code, _, err = call(capsys, "plan", model, *given)
        assert code == 2
        assert reason in err
    assert "--measured is of a mix" in one_line(
        capsys, 2, "quantize", model, again, "--bits", "3", *folder, "--overwrite"
    )
    code, _, err = call(capsys, "plan", checkpoint("mixtral"), *folder, "--max-kl", "0.1", "--method", "rtn")
    assert "another model" in err


def test_what_a_mix_measured_is_not_measured_again(capsys, model, text, tmp_path, monkeypatch):
    words = ["--method", "rtn", "--bits", "3.2", "--data", text, "--nsamples", "4", "--seqlen", "32"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert call(capsys, "quantize", model, whole, *words)[0] == 0
    write = Store.write

    def full(self, unit, *rest):
        if unit == "block 1":
            raise OSError(28, "No space left on device")
        write(self, unit, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write", full)
        assert call(capsys, "quantize", model, broken, *words)[0] != 0
    monkeypatch.setattr("acc.compress.budget.measure", lambda *_, **__: pytest.fail("measured again"))
    other = [*words[:3], "2.9", *words[4:]]
    assert "cannot resume" in one_line(capsys, 2, "quantize", model, broken, *other, "--resume")
    for _ in range(2):  # the second time there is nothing left to do
        code, _, err = call(capsys, "quantize", model, broken, *words, "--resume")
        assert code == 0, err
    for path in whole.iterdir():
        if path.name not in ("timing.jsonl", "manifest.json"):
            assert path.read_bytes() == (broken / path.name).read_bytes(), path.name


def test_settings_of_the_method_are_options(capsys, model, tmp_path):
    code, out, _ = call(capsys, "quantize", model, tmp_path / "a", "--method", "rtn", "--group-size=8", "--json")
    assert code == 0
    assert json.loads(out)["recipe"]["steps"][0]["group_size"] == 8
    words = ["quantize", model, "--method", "rtn"]
    assert "did you mean --group-size" in one_line(capsys, 2, *words, "--grup-size", "8")
    assert "did you mean --nsamples" in one_line(capsys, 2, *words, "--nsmples", "8")
    assert "group_size" in one_line(capsys, 2, *words, "--group-size", "x")
    assert "needs a value" in one_line(capsys, 2, *words, "--group-size")
    assert "needs a value" in one_line(capsys, 2, *words, "--group-size", "--symmetric", "true")
    assert "no option --outlier-threshold" in one_line(capsys, 2, *words, "--outlier-threshold", "0.1")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_the_recipe_beside_a_model_makes_it_again(capsys, model, text, tmp_path):
    """Rotation, a second-choice target, learned rounding and all; whatever the text's file is called."""
    words = ["--data", text, "--nsamples", "4", "--seqlen", "32", "--bits", "3", "--rotate", "heads", "--refine", "2"]
    words += ["--ignore", "re:layers.1.*down_proj", "--seed", "3"]
    assert call(capsys, "quantize", model, tmp_path / "first", *words)[0] == 0
    recipe, other = tmp_path / "first" / "recipe.yaml", tmp_path / "other.txt"
    shutil.copy(text, other)
    assert call(capsys, "apply", recipe, model, tmp_path / "second", "--data", other)[0] == 0
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second")
    assert call(capsys, "apply", recipe, model, tmp_path / "third", "--set", "steps.1.bits=4")[0] == 0
    assert bytes_of(tmp_path / "first") != bytes_of(tmp_path / "third")


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_that_comes_with_acc_works(capsys, model, text, tmp_path, name):
    out = tmp_path / "out"
    words = [name, model, out, "--data", text, "--set", "calibration.nsamples=2", "--seqlen", "32", "--json"]
    code, said, err = call(capsys, "apply", *words)
    assert code == 0, err
    made = json.loads(said)
    assert made["packed"]["bytes"] < made["dense"]["bytes"]
    if made["recipe"]["calibration"]["data"] is not None:
        assert made["recipe"]["calibration"] == {"data": str(text), "nsamples": 2, "seqlen": 32, "seed": 0}
    assert call(capsys, "verify", out)[0] == 0


def test_recipes_are_listed_and_shown(capsys):
    for words in (["apply"], ["show", "recipes"]):
        code, out, _ = call(capsys, *words)
        assert code == 0
        assert all(name in out and line[:40] in out for name, line in recipes().items())
        assert json.loads(call(capsys, *words, "--json")[1])["recipes"] == recipes()
    code, out, _ = call(capsys, "show", "smallest")
    assert code == 0
    assert "group_size: 32" in out


def test_a_recipe_without_a_text_takes_what_quantize_would(capsys, tmp_path):
    """Of the demo its own; two sequences, as it takes a while to draw."""
    words = ["3bit-24gb", "demo", tmp_path / "out", "--nsamples", "1", "--seqlen", "32", "--set", "refine=0", "--json"]
    code, out, err = call(capsys, "apply", *words)
    assert code == 0, err
    assert json.loads(out)["recipe"]["calibration"]["data"] == "self"


def test_bad_recipes_are_one_line(capsys, model, tmp_path):
    mine, out = tmp_path / "mine.yaml", tmp_path / "out"
    mine.write_text("steps:\n  - method: rtn\n    group_sise: 32\n")
    assert "there is smallest" in one_line(capsys, 2, "apply", "smalest", model, out)
    assert "no option 'group_sise'; there is group_size" in one_line(capsys, 2, "apply", mine, model, out)
    assert "which model?" in one_line(capsys, 2, "apply", "rtn-4bit")
    assert "no option 'bots'" in one_line(capsys, 2, "apply", "rtn-4bit", model, out, "--set", "steps.0.bots=3")
    assert "float33" in one_line(capsys, 2, "apply", "rtn-4bit", model, out, "--dtype", "float33")
    assert "matches no tensor" in one_line(capsys, 2, "apply", "rtn-4bit", model, out, "--set", "steps.0.ignore=[nix]")
    assert not out.exists()


def test_fewer_planes_of_what_was_packed(capsys, model, text, tmp_path):
    out = tmp_path / "out"
    words = ["quantize", model, out, "--method", "lut-gemm", "--bits", "3", "--activation-aware", "false", "--json"]
    code, made, err = call(capsys, *words)
    assert code == 0, err
    assert json.loads(made)["recipe"]["steps"][0]["method"] == "lut_gemm"
    found = []
    for planes in ([], ["--planes", "1"]):
        code, measured, err = call(
            capsys, "eval", out, "--base", model, "--data", text, "--window", "32", "--windows", "4", "--json", *planes
        )
        assert code == 0, err
        found.append(json.loads(measured))
        code, _, err = call(capsys, "generate", out, "the quick", "--max-new-tokens", "4", *planes)
        assert code == 0, err
    assert found[1]["kl"] > found[0]["kl"]
    assert found[1]["stored"]["packed_bits"] < found[0]["stored"]["packed_bits"] - 1.5
    assert "1 to 3" in one_line(capsys, 2, "eval", out, "--data", text, "--planes", "4")


def test_rotated_first(capsys, model, text, tmp_path):
    """The tied head of the base is untied on the way; every verb takes the result."""
    out = tmp_path / "rotated"
    words = ["quantize", model, out, "--data", text, "--nsamples", "4", "--seqlen", "32", "--bits", "8", "--rotate"]
    code, said, _ = call(capsys, *words, "all", "--seed", "7")
    assert code == 0
    assert "Rewrite   output head untied: 32,768 bytes more" in said
    assert "event untied: 1" in said
    assert call(capsys, "verify", out)[0] == 0
    assert call(capsys, "export", out, tmp_path / "dense", "--to", "dense")[0] == 0
    for other in (out, tmp_path / "dense"):
        compare = ["eval", other, "--base", model, "--data", text, "--window", "32", "--windows", "2"]
        assert call(capsys, *compare, "--max-kl", "0.05")[0] == 0
    code, said, _ = call(capsys, *words, "heads", "--overwrite", "--json")
    assert json.loads(said)["recipe"]["steps"][0] == {"method": "rotate", "residual": False, "heads": True, "seed": 0}
    assert "expected heads, residual or all" in one_line(capsys, 2, *words, "both")
    assert "--rotate" in one_line(capsys, 2, "quantize", model, tmp_path / "no", "--method", "rotate")
    code, said, _ = call(capsys, "show", "rotate")
    assert code == 0
    assert "--residual" in said


def test_refined_after(capsys, model, text, tmp_path):
    """Rounding alone needs no text, learned rounding does; the recipe that lies beside the result says so."""
    out = tmp_path / "refined"
    words = ["quantize", model, out, "--method", "rtn", "--group-size", "16", "--bits", "2", "--refine"]
    words = [*words, "6", "--data", text, "--nsamples", "4", "--seqlen", "32"]
    code, said, _ = call(capsys, *words)
    assert code == 0
    assert "Text" in said
    assert "refine: 6" in (out / "recipe.yaml").read_text()
    assert call(capsys, "verify", out)[0] == 0
    code, said, _ = call(capsys, *words, "--overwrite", "--json")
    assert "refine" in json.loads(said)["phases"]
    assert json.loads(said)["recipe"]["refine"] == 6
    assert "refine" in one_line(capsys, 2, "quantize", model, tmp_path / "no", "--refine", "-1")


def test_an_option_of_the_method_is_never_taken_for_the_output(capsys, model, tmp_path, monkeypatch):
    """Without OUT, the value of an option that only the method knows must not become the folder's name."""
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(
        capsys, "quantize", model, "--group-size", "-1", "--method=rtn", "--symmetric", "true", "--json"
    )
    assert code == 0
    made = json.loads(out)
    assert made["folder"] == "tiny-acc-Rtn-Int3"
    assert made["recipe"]["steps"][0]["group_size"] == -1
    assert made["recipe"]["steps"][0]["symmetric"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-acc-Rtn-Int3"]


def test_bad_input_is_one_line(capsys, model, text, tmp_path):
    out, short, empty = tmp_path / "out", tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("too short")
    empty.write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("x")
    quantize = ["quantize", model, out, "--data", text, "--nsamples", "2", "--seqlen", "32"]
    cases = {
        "less than or equal to 8": [*quantize, "--bits", "9"],
        "matches no tensor; nearest": [*quantize, "--ignore", "dwon_proj"],
        "there is no 'sqpr'": [*quantize, "--method", "sqpr"],
        "not made by acc": ["quantize", model, tmp_path / "theirs", "--method", "rtn"],
        "empty": ["quantize", model, out, "--data", empty, "--nsamples", "2", "--seqlen", "32"],
        "tokens": ["quantize", model, out, "--data", short, "--nsamples", "2", "--seqlen", "32"],
        "at most 256": ["eval", model, "--data", text, "--window", "4096"],
        "dense": ["export", model, out, "--to", "gguf"],
        "no manifest": ["verify", model],
        "expected auto": ["eval", model, "--data", text, "--dtype", "int8"],
    }
    for expected, words in cases.items():
        assert expected in one_line(capsys, 2, *words), words
        assert not out.exists(), words
    assert "not a folder here" in one_line(capsys, 1, "quantize", "nobody/nothing", out)


def test_a_changed_byte_is_found(capsys, packed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    shard = sorted(copy.glob("*.safetensors"))[1]
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 64
    shard.write_bytes(raw)
    assert "files" in one_line(capsys, 3, "verify", copy)


STOPPED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background inherits that it is ignored
from acc.cli.main import main
from acc.formats.store import Store

write = Store.write

def stop(self, unit, *rest):
    write(self, unit, *rest)
    if unit == "block 1":
        os.kill(os.getpid(), signal.SIGINT)

Store.write = stop
sys.argv = ["acc", *sys.argv[1:]]
main()
"""


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(model, text, tmp_path):
    """SIGINT once two blocks are written; the command that acc prints ends with the bytes of an undisturbed run."""
    words = ["quantize", str(model), "--data", str(text), "--nsamples", "4", "--seqlen", "32", "--group-size", "32"]
    words += ["--outlier-threshold", "0.5", "--bits", "4"]
    stopped = subprocess.run([sys.executable, "-c", STOPPED, *words], capture_output=True, text=True, cwd=tmp_path)
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "tiny-acc-SpQR-Int4").exists()
    again = stopped.stderr.strip().splitlines()[-1].split()
    assert again[:2] == ["acc", "quantize"]
    assert again[-1] == "--resume"
    done = subprocess.run([str(ACC), *again[1:]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = subprocess.run([str(ACC), *words[:2], "whole", *words[2:]], capture_output=True, text=True, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    ours, theirs = ((tmp_path / name / "manifest.json").read_bytes() for name in ("tiny-acc-SpQR-Int4", "whole"))
    assert ours == theirs


def test_a_full_disk_is_one_line_and_exit_code_1(capsys, model, tmp_path, monkeypatch):
    import acc.formats.store as store

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    line = one_line(capsys, 1, "quantize", model, tmp_path / "out", "--method", "rtn")
    assert "disk full" in line
    assert "--resume" in line
    assert not (tmp_path / "out").exists()


def test_a_bug_is_one_line_without_a_traceback(tmp_path):
    script = (
        "import sys, acc.cli.show, acc.cli.main as m\nacc.cli.show.FOLDERS = None\nsys.argv = ['acc', 'show']\nm.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("acc: AttributeError")
    assert "this is a bug in acc" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_export_replaces_only_a_models_folder(capsys, packed, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    assert "exists" in one_line(capsys, 2, "export", packed, mine, "--to", "dense")
    assert "no model's folder" in one_line(capsys, 2, "export", packed, mine, "--to", "dense", "--overwrite")
    assert (mine / "thesis.txt").exists()
    assert "beside" in one_line(capsys, 2, "export", packed, packed, "--to", "dense", "--overwrite")
    assert "beside" in one_line(capsys, 2, "export", packed, packed / "in", "--to", "dense")
    for _ in range(2):
        assert call(capsys, "export", packed, tmp_path / "dense", "--to", "dense", "--overwrite")[0] == 0
    assert not list(tmp_path.glob("*.partial"))


BRIEF = ["--new-tokens", "4", "--prompt-tokens", "20", "--repeats", "2"]


def test_bench_measures_each_way(capsys, monkeypatch, model, packed):
    monkeypatch.setenv("ACC_KERNELS", "reference")
    code, out, err = call(capsys, "bench", model, packed, *BRIEF, "--kernels", "cache,reference", "--json")
    assert code == 0, err
    found = json.loads(out)
    dense, cache, reference = found["rows"]
    assert [row["kernels"] for row in found["rows"]] == ["dense", "cache", "reference"]
    assert dense["ratio"] == 1.0
    assert all(row["tokens_per_second"] > 0 and row["prefill_seconds"] > 0 for row in found["rows"])
    assert reference["bytes"] == cache["bytes"] < dense["bytes"]
    assert reference["bytes_kept"] == 0 < cache["bytes_kept"]
    assert reference["error"] == 0 < cache["error"] < 0.01
    assert found["left_out"] == []
    assert found["machine"]["copy_gb_per_second"] > 0
    assert os.environ["ACC_KERNELS"] == "reference"
    code, out, _ = call(capsys, "bench", model, packed, *BRIEF, "--kernels", "cache")
    assert code == 0
    assert f"Next: acc generate {packed}" in out


def test_bench_shows_no_speed_of_kernels_that_are_wrong(capsys, monkeypatch, model, packed):
    from acc.kernels.base import Cached

    right = Cached.__call__
    words = ["bench", model, packed, *BRIEF, "--kernels", "reference,cache", "--json"]
    for wrong in (1.05, float("nan")):
        monkeypatch.setattr(Cached, "__call__", lambda self, x, wrong=wrong: wrong * right(self, x))
        code, out, err = call(capsys, *words)
        assert code == 3
        assert "(cache): products differ" in err
        rows = json.loads(out)["rows"]
        assert [row["kernels"] for row in rows if "tokens_per_second" in row] == ["dense", "reference"]


def test_bench_is_not_misled_by_a_router_near_a_tie(capsys, monkeypatch, tmp_path):
    """A product that errs by less than bfloat16 rounds may send a token to other experts, and is right."""
    from acc.kernels.base import Cached

    out = tmp_path / "out"
    assert call(capsys, "quantize", "demo", out, "--method", "rtn", "--bits", "4", "--group-size", "32")[0] == 0
    right, draw = Cached.__call__, torch.Generator().manual_seed(0)

    def nearly(self, x):
        y = right(self, x)
        return y * (1 + 0.002 * torch.randn(y.shape, generator=draw)).to(y.dtype)

    monkeypatch.setattr(Cached, "__call__", nearly)
    words = ["bench", "demo", out, "--new-tokens", "2", "--repeats", "1", "--dtype", "bfloat16", "--json"]
    chosen = {}
    for way in ("reference", "cache"):
        monkeypatch.setenv("ACC_KERNELS", way)
        chosen[way] = experts_chosen(out)
    assert any((a != b).any() for a, b in zip(chosen["reference"], chosen["cache"], strict=True))
    code, printed, err = call(capsys, *words, "--kernels", "cache")
    assert code == 0, err
    assert 0.001 < json.loads(printed)["rows"][1]["error"] < 0.016


def experts_chosen(folder):
    """`top_k_index` of each layer for 8 x 63 random tokens, in bfloat16."""
    model, found = load(folder, dtype=torch.bfloat16), []
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.register_forward_pre_hook(lambda module, given: found.append(given[1].sort(-1).values))
    with torch.no_grad():
        model(torch.randint(model.config.vocab_size, (8, 63), generator=torch.Generator().manual_seed(0)))
    assert found
    return found


def test_bench_leaves_out_what_a_format_has_no_kernel_for(capsys, model, tmp_path):
    out = tmp_path / "out"
    assert call(capsys, "quantize", model, out, "--method", "int8", "--targets", "*.q_proj")[0] == 0
    code, printed, err = call(capsys, "bench", model, out, *BRIEF, "--json")
    assert code == 0, err
    found = json.loads(printed)
    assert [row["kernels"] for row in found["rows"]] == ["dense", "cache", "reference"]
    assert [item["kernels"] for item in found["left_out"]] == ["compiled"]
    assert "Left out" in call(capsys, "bench", model, out, *BRIEF)[1]
    code, _, err = call(capsys, "bench", model, out, *BRIEF, "--kernels", "compiled")
    assert code == 2
    assert err.strip().endswith("int8 has no kernel for the CPU")


def test_bench_by_shape(capsys, packed):
    code, out, _ = call(capsys, "bench", packed, "--shapes", "--repeats", "1", "--kernels", "reference,cache", "--json")
    assert code == 0
    shapes = json.loads(out)["shapes"]
    assert len({tuple(item["shape"]) for item in shapes}) == len(shapes)
    assert all(set(item["microseconds"]) == {"dense", "reference", "cache"} for item in shapes)


def test_bench_refuses(capsys, model, packed):
    assert "is not packed" in one_line(capsys, 2, "bench", packed, model)
    assert "expected some of" in one_line(capsys, 2, "bench", packed, "--kernels", "fastest")
    assert "packed already" in one_line(capsys, 2, "bench", packed, "--nf4")


def test_what_is_printed_fits_80_columns(capsys, model, text, packed, tmp_path):
    commands = [
        ["inspect", model, "--targets", "*.down_proj"],
        ["plan", model, "--fit", "1MB", "--group-size", "32"],
        ["apply"],
        ["quantize", model, tmp_path / "o", "--data", text, "--nsamples", "2", "--seqlen", "32"],
        ["eval", packed, "--base", model, "--data", text, "--window", "32", "--windows", "2"],
        ["verify", packed],
        ["show"],
        ["show", "spqr"],
        ["bench", model, packed, "--kernels", "cache", "--new-tokens", "2", "--repeats", "1"],
        ["bench", packed, "--kernels", "cache", "--repeats", "1", "--shapes"],
    ]
    for command in commands:
        code, out, err = call(capsys, *command)
        assert code == 0, err
        paths = [str(model), str(packed), str(text), str(tmp_path)]  # their length is not ours
        long = [line for line in out.splitlines() if len(line) > 80 and not any(path in line for path in paths)]
        assert not long, command
