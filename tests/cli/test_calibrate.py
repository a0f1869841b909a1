"""acc calibrate from outside, on the demo model: what is written and said, and that a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest
from acc.cli.main import run
from acc.cli.ui import Meter, Screen
from acc.formats import runtime as runtimes
from acc.formats.calibration import Calibration
from acc.formats.runtime import Brought, Runtime

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards boil green tea and count the stars "
START = "import sys; sys.argv = ['acc', *sys.argv[1:]]; from acc.cli.main import main; main()"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(WORDS * 400)
    return path


def call(capsys, *words):
    verb, *rest = map(str, words)
    code = run(verb, rest)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def small(text, out, *words):
    return ["calibrate", "demo", "sinks", "--data", text, "--seqlen", "64", "--nsamples", "1", "--out", out, *words]


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "calibration"
    verb, *rest = map(str, small(text, out))
    assert run(verb, rest) == 0
    return out


def test_what_is_made_can_be_read_and_is_told_in_80_columns(capsys, text, tmp_path):
    code, said, err = call(capsys, *small(text, tmp_path / "out"))
    assert code == 0, err
    lines = [line for line in said.splitlines() if str(tmp_path) not in line and str(text) not in line]
    assert all(len(line) <= 80 for line in lines)
    assert f'Next: acc generate demo "..." --plan {tmp_path / "out"}' in said
    assert not (tmp_path / "out.partial").exists()
    calibration = Calibration.load(tmp_path / "out")
    assert calibration.passes == ["sinks"]
    assert calibration.facts["model"]["name"] == "demo"
    assert call(capsys, "verify", tmp_path / "out")[0] == 0
    code, said, _ = call(capsys, "inspect", tmp_path / "out")
    assert code == 0
    assert "demo: mixtral" in said
    assert "4 of 4" in said


def test_every_data_is_a_domain_and_json_is_one_document(capsys, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(WORDS[::-1] * 40)
    code, said, _ = call(capsys, *small(text, tmp_path / "out", "--data", other, "--json"))
    assert code == 0
    told = json.loads(said)
    assert told["layers"] == [0, 1, 2, 3]
    assert [one["data"] for one in told["data"]["texts"]] == [str(text), str(other)]
    assert told["data"]["prompts"] % 2 == 0
    assert set(told["passes"]) == {"sinks"}
    code, said, _ = call(capsys, "inspect", tmp_path / "out", "--json")
    found = json.loads(said)
    assert found["facts"]["data"] == told["data"]
    assert found["tensors"].keys() == Calibration.load(tmp_path / "out").tensors.keys()


def test_mistakes_are_one_line_that_says_what_to_do(capsys, text, folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(WORDS * 4)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("x")
    out = tmp_path / "out"
    cases = {
        "there is no 'snks'; there is sinks": ["calibrate", "demo", "snks"],
        "there is no option --nsample; did you mean --nsamples": ["calibrate", "demo", "sinks", "--nsample", "3"],
        "exists; choose another name, or replace it with --overwrite": small(text, folder),
        "was not made by acc": small(text, foreign, "--overwrite"),
        "--seqlen 8192: the model takes at most 4096 tokens": small(text, out, "--seqlen", "8192"),
        "give more text, or lower --nsamples or --seqlen": small(short, out, "--nsamples", "9"),
        "gone.txt": small(tmp_path / "gone.txt", out),
        "no/such/model": ["calibrate", "./no/such/model", "--out", out],
        "--from only reads a file": ["calibrate", "demo", "sinks", "--from", "duo-attention", text],
        "there is no runtime 'duo'": ["calibrate", "demo", "--from", "duo", text, "--out", out],
    }
    for message, words in cases.items():
        code, _, err = call(capsys, *words)
        assert code == 2, (message, err)
        assert message in err
        assert len(err.strip().splitlines()) == 1, err
        assert not out.exists()
        assert not (tmp_path / "out.partial").exists()
    assert Calibration.load(folder).passes == ["sinks"]  # whatever was said, it is as it was


def test_a_setting_of_a_pass_is_an_option(capsys, monkeypatch, text, tmp_path):
    from acc.calibrate.base import Pass
    from acc.calibrate.sinks import Sinks
    from acc.cli import calibrate
    from pydantic import Field

    class Chosen(Sinks):
        depth: int = Field(3, ge=1, description="how deep")

    class Other(Sinks):
        depth: int = 3

    entries = {"chosen": Chosen, "other": Other}
    monkeypatch.setattr("acc.registry.listing", lambda folder, base=None: dict.fromkeys(entries, "A pass."))
    monkeypatch.setattr("acc.registry.lookup", lambda folder, name, base=None: entries[name])
    assert issubclass(Chosen, Pass)
    taken = calibrate._passes(["chosen"], {"chosen": {"depth": 7}})
    assert taken["chosen"].depth == 7
    for words, message in (
        (["chosen", "--depth", "0"], "chosen: --depth: Input should be greater than or equal to 1 (got 0)"),
        (["chosen", "--depth"], "--depth needs a value"),
        (["chosen", "other", "--depth", "2"], "several passes have it; say --chosen.depth or --other.depth"),
        (["chosen", "--dept", "2"], "did you mean --depth"),
    ):
        code, _, err = call(capsys, "calibrate", "demo", *words, "--out", tmp_path / "out")
        assert (code, message in err) == (2, True), err


def test_a_killed_run_is_found_goes_on_and_ends_the_same(capsys, text, tmp_path):
    out = tmp_path / "out"
    words = ["calibrate", "demo", "sinks", "--data", text, "--seqlen", "2048", "--nsamples", "1", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, words)], env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path
    )
    first = tmp_path / "out.partial" / "layer-00000.safetensors"
    until = time.monotonic() + 300
    while not first.exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists(), "it was over before it could be killed"
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "an unfinished run; continue it with --resume, or start anew with --overwrite" in err
    code, _, err = call(capsys, *words, "--resume", "--seed", "1")
    assert code == 2
    assert "the run differs: data.seed: 0 -> 1" in err
    assert call(capsys, *words, "--resume")[0] == 0
    words[-1] = tmp_path / "whole"
    assert call(capsys, *words)[0] == 0
    for name in ("calibration.safetensors", "calibration.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_names_the_command_that_goes_on(capsys, monkeypatch, text, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("acc.calibrate.attention.learn", interrupted)
    code, _, err = call(capsys, *small(text, tmp_path / "out"))
    assert code == 130
    words = " ".join(map(str, small(text, tmp_path / "out")))
    assert f"acc {words} --resume" in err


class Plain(Runtime):
    """A runtime whose file is the gates as JSON."""

    options: ClassVar[dict[str, str]] = {"digits": "that are written"}

    @classmethod
    def write(cls, calibration, options):
        """Rounded as asked for."""
        gates = calibration.of("retrieval")["gate"]
        digits = options.get("digits", 6)
        return {"gates.json": json.dumps([[round(g, digits) for g in row] for row in gates.tolist()]).encode()}, ["ok"]

    @classmethod
    def read(cls, path, layers):
        """The gates alone."""
        import torch

        gate = torch.tensor(json.loads((path / "gates.json").read_text()))
        if gate.shape != (len(layers), layers[0].kv_heads):
            raise ValueError(f"{path}: has gates for {list(gate.shape)} heads")
        return Brought({"retrieval.gate": gate}, {"retrieval": {"settings": {}, "summary": {}}}, ["was rounded"])


@pytest.fixture
def plain(monkeypatch):
    """A runtime called `plain`."""
    monkeypatch.setattr(runtimes, "typed", lambda folder, base, prefix: {"plain": "A runtime."})
    monkeypatch.setattr(runtimes, "lookup", lambda folder, name, base: Plain)


def test_a_calibration_goes_to_another_runtime_and_comes_back(capsys, made_up, stored, plain, tmp_path):
    import torch

    calibration = made_up(layers=4, heads=4, kv_heads=2, head_dim=64, refused=())
    folder, out, back = stored(calibration), tmp_path / "plain", tmp_path / "back"
    code, said, err = call(capsys, "export", folder, out, "--to", "plain")
    assert code == 0, err
    assert "note: ok" in said
    assert f"Next: acc calibrate MODEL --from plain {out}" in said
    code, said, err = call(capsys, "calibrate", "demo", "--from", "plain", out, "--out", back)
    assert code == 0, err
    assert "note: was rounded" in said
    again = Calibration.load(back)
    assert again.passes == ["retrieval"]
    assert again.facts["data"] == {"from": "plain", "file": "plain"}
    torch.testing.assert_close(again.tensors["retrieval.gate"], calibration.tensors["retrieval.gate"])
    code, said, _ = call(capsys, "inspect", back)
    assert "Read from plain, of plain" in " ".join(said.split())
    assert call(capsys, "verify", back)[0] == 0


def test_what_cannot_be_exported_or_brought_is_said(capsys, made_up, stored, plain, tmp_path):
    folder = stored(made_up(refused=(), head_dim=64, layers=3))
    out, full = tmp_path / "out", tmp_path / "full"
    full.mkdir()
    (full / "other.txt").write_text("x")
    cases = {
        "--to gptq is for packed models; a calibration can be written for plain": [
            "export",
            folder,
            out,
            "--to",
            "gptq",
        ],
        "--to dense is for packed models": ["export", folder, out, "--to", "dense"],
        "--to plain is for calibrations; a model can be written as dense": ["export", "demo", out, "--to", "plain"],
        "--to plan: there is plain": ["export", folder, out, "--to", "plan"],
        "--sparsity: plain has no such option; it has --digits": [
            "export",
            folder,
            out,
            "--to",
            "plain",
            "--sparsity=1",
        ],
        "--digits needs a value": ["export", folder, out, "--to", "plain", "--digits"],
        "--digits: no option of acc export for a packed model": [
            "export",
            "demo",
            out,
            "--to",
            "gptq",
            "--digits",
            "3",
        ],
        "replace it with --overwrite": ["export", folder, full, "--to", "plain"],
        "has other.txt, which is no file of plain": ["export", folder, full, "--to", "plain", "--overwrite"],
        "no such file": ["calibrate", "demo", "--from", "plain", tmp_path / "gone", "--out", out],
    }
    for message, words in cases.items():
        code, _, err = call(capsys, *words)
        assert code == 2, (message, err)
        assert message in err
        assert len(err.strip().splitlines()) == 1, err
        assert not out.exists()
    assert (full / "other.txt").read_text() == "x"
    assert call(capsys, "export", folder, out, "--to", "plain", "--digits", "1")[0] == 0
    assert "0.12" not in (out / "gates.json").read_text()
    code, _, err = call(capsys, "calibrate", "demo", "--from", "plain", out, "--out", tmp_path / "back")
    assert code == 2
    assert "has gates for [3, 2] heads" in err  # of three layers, and demo has four


def test_a_step_that_begins_anew_is_timed_anew(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter(Screen(False), " of step")
    for second, share, what in ((0, 0.0, "1/2 a"), (50, 0.5, "1/2 a"), (100, 1.0, "1/2 a"), (101, 0.0, "2/2 b")):
        now[0] = second
        meter(share, what)
    now[0] = 121
    meter(0.5, "2/2 b")  # 20 seconds for a half: 20 are left, whatever the first step took
    said = capsys.readouterr().err.splitlines()
    assert said[0] == " 50%  1/2 a, 0:50 gone, 0:50 left of step"
    assert said[-1] == " 50%  2/2 b, 2:01 gone, 0:20 left of step"
