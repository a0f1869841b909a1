"""What is said of a calibration: tables and maps in 80 columns, checks that find damage, and pictures."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from acc.cli.learned import LETTERS, map_lines
from acc.cli.main import run
from acc.cli.pictures import draw
from acc.formats.calibration import Calibration

SIZES = [(4, 4, 2), (30, 9, 3), (6, 64, 8), (2, 128, 128), (3, 96, 1), (2, 1, 1)]


def call(capsys, *words):
    verb, *rest = map(str, words)
    code = run(verb, rest)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES)
def test_inspect_fits_80_columns(capsys, made_up, stored, layers, heads, kv_heads):
    folder = stored(made_up(layers, heads, kv_heads))
    code, said, err = call(capsys, "inspect", folder)
    assert code == 0, err
    assert all(len(line) <= 80 for line in said.splitlines() if str(folder) not in line)
    assert all(line == line.rstrip() for line in said.splitlines())
    for name in ("heads", "retrieval", "channels", "sinks", "left alone: 1: sliding attention"):
        assert name in said
    assert "Next: acc generate" in said


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), SIZES)
def test_a_map_has_every_head_once_and_in_order(layers, heads, kv_heads):
    drawn = torch.Generator().manual_seed(heads)
    rows = [
        "".join(LETTERS[int(k)] for k in torch.randint(0, 4, (heads,), generator=drawn)) if index != 1 else None
        for index in range(layers)
    ]
    ruler, *lines = map_lines(rows, heads // kv_heads)
    assert all(len(line) <= 80 for line in (ruler, *lines))
    found: dict[int, str] = {}
    layer = -1
    for line in lines:
        if line[:8].strip():
            layer = int(line[:8])
            found[layer] = ""
        found[layer] += line[8:].replace(" ", "")
    assert found == {index: row or "leftalone" for index, row in enumerate(rows)}
    for number in ruler.split()[1:]:  # a number stands above the first letter of its head
        at = ruler.index(f" {number} " if f" {number} " in ruler else f" {number}", 7) + 1
        assert len(lines[0][8:at].replace(" ", "")) == int(number)


def test_inspect_tells_machines_everything(capsys, made_up, stored):
    calibration = made_up()
    code, said, _ = call(capsys, "inspect", stored(calibration), "--json")
    assert code == 0
    told = json.loads(said)
    assert told["facts"]["passes"] == calibration.facts["passes"]
    assert told["tensors"].keys() == calibration.tensors.keys()
    for name, tensor in calibration.tensors.items():
        about = told["tensors"][name]
        assert about["shape"] == list(tensor.shape)
        assert about["max"] == tensor.max().item()
        assert about.get("values") == (tensor.tolist() if tensor.numel() <= 64 else None)


def test_a_pass_that_nobody_knows_is_told_by_its_summary(capsys, made_up, stored):
    calibration = made_up()
    calibration.facts["passes"]["novel"] = {"settings": {}, "summary": {"heads_found": 7}, "events": ["odd"] * 9}
    code, said, _ = call(capsys, "inspect", stored(calibration))
    assert code == 0
    assert "heads found: 7" in said
    assert said.count("note: odd") == 5
    assert "and 4 more notes" in said


def test_figures_in_the_tables_are_those_of_the_tensors(capsys, made_up, stored):
    calibration = made_up(refused=())
    found = calibration.tensors
    _, said, _ = call(capsys, "inspect", stored(calibration))
    lines = [line.split() for line in said.splitlines()]
    values = sorted(found["heads.recall"][..., 1].flatten().tolist())
    row = next(line for line in lines if line[:2] == ["4,096", "tokens"])
    assert row[2] == f"{sum(values) / len(values):.3f}"
    assert values[0] <= float(row[3]) + 5e-4 <= values[1] + 1e-3  # 5% of 16 heads: between the lowest two
    row = next(line for line in lines if line[:2] == ["50.0%", "stream"])
    assert row[2:] == ["0.125", "0.5", "87.5%", "50.0%"]
    row = next(line for line in lines if line[:1] == ["8"])
    assert row[1] == f"{found['channels.recall'][..., 1].mean():.3f}"
    assert row[3] == "0.200"  # of random channels
    row = next(line for line in lines if line[:1] == ["1.txt"])
    counted = found["sinks.class"][1].long().flatten().bincount(minlength=3).tolist()
    assert row[1:] == [
        f"{found['sinks.sink_mass'][1].mean():.3f}",
        f"{found['sinks.sink_mass'][1].max():.3f}",
        *map(str, counted),
    ]
    counted = found["heads.kind"].long().flatten().bincount(minlength=4).tolist()
    assert f"{counted[0]} dense, {counted[1]} A-shape, {counted[2]} vertical-slash, {counted[3]} blocks" in said


def damage(calibration, name, change):
    tensors = {key: tensor.clone() for key, tensor in calibration.tensors.items()}
    change(tensors[name])
    return Calibration(tensors, calibration.facts)


DAMAGES = {
    "channels.order: layer 2, KV head 1: not a permutation": ("channels.order", lambda t: t[2, 1].fill_(3)),
    "retrieval.rank: not each": ("retrieval.rank", lambda t: t[0].fill_(0)),
    "retrieval.gate: not every value is from 0 to 1": ("retrieval.gate", lambda t: t[0].fill_(1.5)),
    "heads.kind: not every value is one of 0 to 3": ("heads.kind", lambda t: t[0].fill_(4)),
    "heads.budget: not every value is a share": ("heads.budget", lambda t: t[0].fill_(-1)),
    "heads.length: not every value is ascending": ("heads.length", lambda t: t.fill_(7)),
    "channels.scale4: not every value is positive": ("channels.scale4", lambda t: t[0].fill_(-1)),
    "sinks.sink_mass holds values that are not finite": ("sinks.sink_mass", lambda t: t[0].fill_(float("nan"))),
    "heads.kind: has shape [4, 2], not [4, 4]": ("heads.kind", lambda t: t.resize_(4, 2)),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_verify_finds_what_no_pass_gives(capsys, made_up, stored, message):
    calibration = made_up()
    assert call(capsys, "verify", stored(calibration, "whole"))[0] == 0
    code, said, err = call(capsys, "verify", stored(damage(calibration, *DAMAGES[message]), "damaged"))
    assert code == 3
    assert message in said
    assert len(err.strip().splitlines()) == 1


def test_verify_finds_damaged_files(capsys, made_up, stored):
    def flip(path):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(bytes(raw))

    def forget(path):
        told = json.loads(path.read_text())
        del told["layers"]
        path.write_text(json.dumps(told))

    cases = [
        ("calibration.safetensors", flip, "its content has changed (sha256)"),
        ("calibration.json", forget, "calibration.json has no layers"),
        ("calibration.safetensors", lambda path: path.unlink(), "missing"),
        ("stray.txt", lambda path: path.write_text("x"), "not in the manifest"),
    ]
    for number, (name, change, message) in enumerate(cases):
        folder = stored(made_up(), str(number))
        change(folder / name)
        code, said, _ = call(capsys, "verify", folder, "--json")
        assert code == 3, name
        assert message in said


def test_a_calibration_of_another_version_is_refused(capsys, made_up, stored, tmp_path):
    folder = stored(made_up())
    path = folder / "calibration.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    code, _, err = call(capsys, "inspect", folder)
    assert code == 2
    assert "is of version 2, this acc reads 1" in err
    assert len(err.strip().splitlines()) == 1


def test_targets_are_of_models(capsys, made_up, stored):
    code, _, err = call(capsys, "inspect", stored(made_up()), "--targets", "*")
    assert code == 2
    assert "is a calibration" in err


def test_show_lists_passes_apart(capsys):
    from acc.registry import listing

    code, said, _ = call(capsys, "show")
    assert code == 0
    passes = said[said.index("\nPasses\n") : said.index("\nStatistics\n")]
    assert all(f"  {name}" in passes for name in listing("calibrate", "Pass"))
    assert "hessian" not in passes
    code, said, _ = call(capsys, "show", "--json")
    told = json.loads(said)
    assert told["passes"].keys() == listing("calibrate", "Pass").keys()
    assert not told["passes"].keys() & told["calibrate"].keys()
    assert told["runtimes"].keys() == {name[8:].replace("_", "-") for name in listing("formats", "Runtime")}
    for name in listing("calibrate", "Pass"):
        code, said, _ = call(capsys, "show", name)
        assert code == 0
        assert f"Next: acc calibrate MODEL {name}" in said
        assert all(len(line) <= 80 for line in said.splitlines())


def png(raw):
    image = pytest.importorskip("PIL.Image", reason="comes with matplotlib").open(io.BytesIO(raw))
    return image.convert("RGB")


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), [(4, 4, 2), (40, 64, 8), (2, 1, 1)])
def test_every_pass_has_a_picture(made_up, layers, heads, kv_heads):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    calibration = made_up(layers, heads, kv_heads)
    pictures, why = draw(calibration)
    assert not why
    assert pictures.keys() == {"heads.png", "retrieval.png", "channels.png", "sinks.png"}
    assert draw(calibration)[0] == pictures
    for raw in pictures.values():
        image = png(raw)
        assert 600 <= image.width <= 2400
        assert 300 <= image.height <= 2400


def test_the_map_has_the_colour_of_every_kind(made_up):
    """With kinds of one half dense and one half A-shape, both colours cover the same area and no other kind shows."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    calibration = made_up(layers=8, refused=())
    tensors = {"heads.kind": calibration.tensors["heads.kind"].clone()}
    tensors["heads.kind"][:, :2], tensors["heads.kind"][:, 2:] = 0, 1
    pictures, _ = draw(Calibration(tensors, calibration.facts | {"passes": {"heads": {}}}))
    image = png(pictures["heads.png"])
    counts = {colour: count for count, colour in image.getcolors(1 << 24)}
    dense, streaming = counts[(0x4D, 0x4D, 0x4D)], counts[(0x56, 0xB4, 0xE9)]
    assert abs(dense - streaming) < 0.02 * dense
    assert dense > 0.15 * image.width * image.height
    assert counts.get((0xE6, 0x9F, 0), 0) < 0.02 * dense  # the legend alone


def test_without_matplotlib_there_are_no_pictures_and_a_reason(monkeypatch, made_up):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw(made_up()) == ({}, "none, as matplotlib is not installed")
