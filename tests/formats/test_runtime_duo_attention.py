"""DuoAttention's files, read back by a parser written from the format's description alone."""

import json

import numpy as np
import pytest
import torch
from acc.formats.calibration import Calibration
from acc.formats.model import AttentionLayer
from acc.formats.runtime_duo_attention import DuoAttention
from acc.formats.streaming import ranks, streams


def layers_of(count, kv_heads, refused=()):
    return [
        AttentionLayer(i, f"model.layers.{i}.self_attn", 2 * kv_heads, kv_heads, 16, "left" if i in refused else None)
        for i in range(count)
    ]


def calibration(gate, sparsity=0.5, refused=()):
    open_ = torch.tensor([i not in refused for i in range(len(gate))])
    rank = ranks(gate, gate, open_)
    tensors = {"gate": gate, "rank": rank, "sink": (rank >= 0).int() * 64, "recent": (rank >= 0).int() * 256}
    settings = {"sparsity": sparsity, "sink": 64, "recent": 256}
    facts = {"passes": {"retrieval": {"settings": settings, "summary": {}, "events": []}}}
    return Calibration({f"retrieval.{n}": t for n, t in tensors.items()}, facts)


def official(folder):
    """As the description has it: gates `[L, Hkv]` clipped to [0, 1], and the two sizes."""
    lines = (folder / "full_attention_heads.tsv").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    gates = np.array([[float(cell) for cell in line.split("\t")] for line in lines])
    config = json.loads((folder / "config.json").read_text())
    return np.clip(gates, 0, 1), config["sink_size"], config["recent_size"]


def put(folder, files):
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_what_is_written_is_read_by_others_and_by_itself(tmp_path, kv_heads):
    gate = torch.rand(6, kv_heads, generator=torch.Generator().manual_seed(0))
    whole = calibration(gate)
    files, notes = DuoAttention.write(whole, {})
    assert sorted(files) == ["config.json", "full_attention_heads.tsv"]
    assert notes == []
    put(tmp_path, files)
    gates, sink, recent = official(tmp_path)
    assert gates.shape == (6, kv_heads)
    assert np.array_equal(gates, gate.double().numpy())
    assert (sink, recent) == (64, 256)
    brought = DuoAttention.read(tmp_path, layers_of(6, kv_heads))
    assert brought.notes == []
    assert brought.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(brought.tensors[name], whole.tensors[name]) for name in whole.tensors)
    again, _ = DuoAttention.write(calibration(brought.tensors["retrieval.gate"]), {})
    assert again == files


def test_cells_are_those_of_numpy_savetxt(tmp_path):
    gate = torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    files, _ = DuoAttention.write(calibration(gate), {})
    np.savetxt(tmp_path / "x", gate.double().numpy(), delimiter="\t")
    assert files["full_attention_heads.tsv"] == (tmp_path / "x").read_bytes()


def test_the_same_heads_stream_there(tmp_path):
    gate = torch.rand(8, 4, generator=torch.Generator().manual_seed(2))
    for sparsity in (0.25, 0.5, 0.75):
        whole = calibration(gate, sparsity)
        files, notes = DuoAttention.write(whole, {})
        put(tmp_path, files)
        gates, _, _ = official(tmp_path)
        theirs = gates < np.quantile(gates, sparsity)
        assert notes == []
        assert np.array_equal(theirs, streams(whole.tensors["retrieval.rank"], sparsity).numpy())


def test_what_the_files_cannot_say_is_told(tmp_path):
    gate = torch.rand(10, 9, generator=torch.Generator().manual_seed(3))
    files, notes = DuoAttention.write(calibration(gate), {"sparsity": 0.75, "sink": 32})
    assert json.loads(files["config.json"]) == {"sink_size": 32, "recent_size": 256, "sparsity": 0.75}
    assert notes == ["at sparsity 0.75 DuoAttention's quantile makes 67 heads stream, acc 68"]
    _, notes = DuoAttention.write(calibration(gate.index_fill(0, torch.tensor([0]), 1), refused=(0,)), {})
    assert "1 layers are left alone" in notes[0]
    whole = calibration(gate)
    whole.tensors["retrieval.sink"][3, 3] = 16
    assert "sizes per head" in DuoAttention.write(whole, {})[1][0]
    with pytest.raises(ValueError, match="acc calibrate MODEL retrieval"):
        DuoAttention.write(Calibration({}, {"passes": {}}), {})
    with pytest.raises(ValueError, match="recent: give a number of tokens"):
        DuoAttention.write(whole, {"recent": 0})


def write_raw(folder, gates, config=None):
    np.savetxt(folder / "full_attention_heads.tsv", gates, delimiter="\t")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def test_the_oddities_of_published_folders_are_told(tmp_path):
    gates = np.full((4, 2), 0.25)
    gates[1] = 0.84375, 1.0078125
    gates[3] = -0.0014, 0.25
    write_raw(tmp_path, gates, {"sink_size": 128, "recent_size": 256, "sparsity": None, "lr": 0.02})
    brought = DuoAttention.read(tmp_path, layers_of(4, 2))
    clipped, trained, ties = brought.notes
    assert clipped.startswith("2 gates outside [0, 1]")
    assert "128 first tokens" in trained
    assert ties.startswith("5 heads share the gate at which 4 stream")
    assert brought.tensors["retrieval.gate"].amin() == 0
    assert brought.tensors["retrieval.gate"].amax() == 1
    assert brought.tensors["retrieval.sink"].unique().tolist() == [128]
    write_raw(tmp_path, gates.clip(0, 1).astype("float32"), {"sink_size": 64, "recent_size": 256})
    gates[3, 0] = 0.5
    write_raw(tmp_path, gates.clip(0, 1), {"sink_size": 64, "recent_size": 256})
    assert "of gates kept in bf16" in DuoAttention.read(tmp_path, layers_of(4, 2)).notes[-1]
    (tmp_path / "config.json").unlink()
    brought = DuoAttention.read(tmp_path / "full_attention_heads.tsv", layers_of(4, 2))
    assert brought.notes[0].startswith("no config.json beside the gates")
    assert brought.tensors["retrieval.recent"].unique().tolist() == [256]


def test_layers_that_are_left_alone_stay_so(tmp_path):
    write_raw(tmp_path, np.linspace(0, 1, 8).reshape(4, 2), {"sink_size": 64, "recent_size": 256})
    brought = DuoAttention.read(tmp_path, layers_of(4, 2, refused=(0, 2)))
    assert brought.notes == ["4 gates of layers that stay as they are were left out"]
    assert brought.tensors["retrieval.gate"][[0, 2]].unique().tolist() == [1]
    assert brought.tensors["retrieval.rank"].tolist() == [[-1, -1], [0, 1], [-1, -1], [2, 3]]
    assert brought.tensors["retrieval.sink"].tolist() == [[0, 0], [64, 64], [0, 0], [64, 64]]


@pytest.mark.parametrize(
    ("gates", "config", "message"),
    [
        (np.ones((3, 2)), {}, "has 3 layers, the model 4"),
        (np.ones((4, 3)), {}, "layer 0 has 3 KV heads, the model's 2"),
        (np.array([[1, 1], [1, np.nan], [1, 1], [1, 1]]), {}, "layer 1, KV head 1: 'nan' is no gate"),
        (np.ones((4, 2)), {"recent_size": 256}, "lacks sink_size"),
        (np.ones((4, 2)), {"sink_size": "64", "recent_size": 256}, "sink_size is '64', not a number of tokens"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, gates, config, message):
    write_raw(tmp_path, gates, config)
    with pytest.raises(ValueError, match=message):
        DuoAttention.read(tmp_path, layers_of(4, 2))


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no full_attention_heads\.tsv there"):
        DuoAttention.read(tmp_path, layers_of(4, 2))
    (tmp_path / "full_attention_heads.tsv").write_bytes(b"\x80\x02cnumpy")
    with pytest.raises(ValueError, match="holds no table of numbers"):
        DuoAttention.read(tmp_path, layers_of(4, 2))
