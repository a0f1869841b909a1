"""MInference's file: written as its loader wants it, read with its oddities named."""

import json

import pytest
import torch
from acc.formats.calibration import Calibration
from acc.formats.model import AttentionLayer
from acc.formats.patterns import BLOCKS, DENSE, STREAMING, VERTICAL_SLASH
from acc.formats.runtime_minference import FILE, Minference

LAYERS = [AttentionLayer(i, f"layers.{i}", 4, 2, 16, "sliding" if i == 1 else None) for i in range(3)]


def calibration():
    kind = torch.tensor([[DENSE, STREAMING, VERTICAL_SLASH, BLOCKS]] * 3, dtype=torch.uint8)
    kind[1] = DENSE
    shares = torch.tensor([[1.0, 1.0], [0.03125, 0.25], [0.0625, 0.125], [0.25, 0.0]])
    budget = shares[None, :, None].repeat(3, 1, 2, 1)
    budget[:, :, 0] *= 0.5
    budget[1] = 1.0
    tensors = {
        "heads.kind": kind,
        "heads.length": torch.tensor([1024, 4096], dtype=torch.int32),
        "heads.budget": budget,
        "heads.recall": torch.linspace(0.5, 1, 24).view(3, 4, 2),
    }
    described = [{"heads": 4, "kv_heads": 2, "head_dim": 16, "refused": layer.refused} for layer in LAYERS]
    return Calibration(tensors, {"layers": described, "passes": {"heads": {}}})


def official(raw):
    """What its loader takes from a file: per layer and head, by string keys, kind and two sizes; the score unread."""
    found = []
    for layer in json.loads(raw):
        row = {}
        for head in range(len(layer)):
            kind, vertical, slash, score = layer[str(head)]
            assert kind in ("stream_llm", "vertical_and_slash", "block_sparse")
            assert type(vertical) is int
            assert type(slash) is int
            assert isinstance(score, int | float)
            row[head] = (kind, vertical, slash)
        found.append(row)
    return found


def test_the_file_is_what_its_loader_reads():
    files, notes = Minference.write(calibration(), {})
    found = official(files[FILE])
    assert found[0] == {
        0: ("vertical_and_slash", 4096, 4096),
        1: ("stream_llm", 128, 1024),
        2: ("vertical_and_slash", 256, 512),
        3: ("block_sparse", 1024, 0),
    }
    assert all(entry == ("vertical_and_slash", 4096, 4096) for entry in found[1].values())
    assert json.loads(files[FILE])[2]["2"][3] == pytest.approx(float(calibration().tensors["heads.recall"][2, 2, 1]))
    assert "6 dense heads" in notes[1]
    assert "2 block-sparse heads: its runtime reads 100 blocks" in notes[3]


def test_budgets_for_another_length():
    files, _ = Minference.write(calibration(), {"length": 1024})
    assert official(files[FILE])[0][2] == ("vertical_and_slash", 64, 128)
    longer, _ = Minference.write(calibration(), {"length": 32768})
    assert official(longer[FILE])[0][1] == ("stream_llm", 1024, 8192)


def test_what_was_written_is_read_again(tmp_path):
    files, _ = Minference.write(calibration(), {})
    (tmp_path / FILE).write_bytes(files[FILE])
    brought = Minference.read(tmp_path, LAYERS, length=4096)
    own = calibration().tensors
    assert torch.equal(brought.tensors["heads.kind"], own["heads.kind"])
    kept = own["heads.kind"] != BLOCKS  # which have no budget there
    assert torch.equal(brought.tensors["heads.budget"][kept][:, 0], own["heads.budget"][kept][:, 1])
    assert brought.tensors["heads.length"].tolist() == [4096]


def read(tmp_path, document, layers=LAYERS[:1], **options):
    path = tmp_path / "pattern.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return Minference.read(path, layers, **options)


def test_budgets_are_shares_of_the_prompt_they_were_found_with(tmp_path):
    layer = {str(h): ["vertical_and_slash", 1000, 6000 + h, 0.9] for h in range(4)}
    layer["3"] = ["vertical_and_slash", 3000, 27000, 14994473]
    brought = read(tmp_path, [layer])
    assert brought.tensors["heads.kind"].tolist() == [[VERTICAL_SLASH] * 3 + [DENSE]]
    torch.testing.assert_close(brought.tensors["heads.budget"][0, 0, 0], torch.tensor([1 / 30, 0.2]))
    assert brought.tensors["heads.budget"][0, 3, 0].tolist() == [1, 1]
    assert brought.notes == []


@pytest.mark.parametrize(
    ("entry", "note"),
    [
        (["", 0, 0, 0.5], "1 heads: an empty kind"),
        (["vertical_and_slash", 30, 800, float("nan")], "1 heads: an empty kind or a score that is no number"),
        (["vertical_and_slash", 500, 50, 0.9], "1 heads: fewer than 100 diagonals"),
        (None, "1 heads: not in the file"),
    ],
)
def test_signatures_of_known_bugs_are_named(tmp_path, entry, note):
    layer = {str(h): ["stream_llm", 100 + h, 800, 0.9] for h in range(4)}
    layer["2"] = entry
    if entry is None:
        del layer["2"]
    assert [n for n in read(tmp_path, [layer]).notes if n.startswith(note)]


def test_a_list_that_was_edited_by_hand_is_named(tmp_path):
    layer = {str(h): ["vertical_and_slash", 512, 2048, h / 10] for h in range(4)}
    assert "written by hand" in read(tmp_path, [layer]).notes[0]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "has 0 layers, the model 1"),
        ({}, "holds no list of layers"),
        ("[", "is not JSON"),
        ([[]], "layer 0 is no object"),
        ([{"4": ["stream_llm", 1, 1, 1]}], "layer 0 has a head 4; the model's are 0 to 3"),
        ([{"1": ["grid", 1, 1, 1]}], "layer 0, head 1: kind 'grid'"),
        ([{"1": ["stream_llm", -1, 1, 1]}], "head 1: budgets -1 and 1"),
        ([{"1": ["stream_llm", 1.5, 1, 1]}], "head 1: budgets 1.5 and 1"),
        ([{"1": ["stream_llm", 1, 1]}], "head 1: .* is not"),
    ],
)
def test_what_does_not_fit_is_refused_by_layer_and_head(tmp_path, document, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, document)


def test_a_calibration_without_the_pass_is_refused():
    with pytest.raises(ValueError, match="no heads pass"):
        Minference.write(Calibration({}, {"layers": [], "passes": {}}), {})
