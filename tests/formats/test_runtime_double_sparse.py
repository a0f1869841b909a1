"""Double Sparsity's file: read back by a parser written from its description, and what is refused or warned about."""

import json

import pytest
import torch
from acc.formats.calibration import Calibration
from acc.formats.model import AttentionLayer
from acc.formats.runtime_double_sparse import DoubleSparse, agreement, interleaved, merged
from acc.registry import lookup

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
LAYERS = [AttentionLayer(i, f"model.layers.{i}.self_attn", HEADS, KV_HEADS, HEAD_DIM, None) for i in range(3)]
CLOSED = AttentionLayer(1, "model.layers.1.self_attn", HEADS, KV_HEADS, HEAD_DIM, "sliding attention")


def orders(*shape, seed=0):
    return torch.rand(*shape, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).argsort(-1)


def calibration(layers=LAYERS, product=True):
    tensors = {
        "channels.order": orders(3, KV_HEADS).short(),
        "channels.dense": torch.tensor([True, False, False]),
        "channels.scale4": torch.ones(3, KV_HEADS, HEAD_DIM),
    }
    if product:
        draw = torch.Generator().manual_seed(1)
        tensors["channels.product"] = torch.rand(3, HEADS, HEAD_DIM, generator=draw)
    described = [
        {"heads": x.heads, "kv_heads": x.kv_heads, "head_dim": x.head_dim, "refused": x.refused} for x in layers
    ]
    return Calibration(tensors, {"model": {"name": "some/Model-1B"}, "layers": described, "passes": {"channels": {}}})


def parsed(raw, heads, kv_heads, head_dim):
    """As SGLang and the evaluation scripts take it: an object of lists of lists of whole numbers."""
    found = {}
    for key, lists in json.loads(raw.decode("utf-8")).items():
        model, layers, index, attention, kind = key.split(".")
        assert (model, layers, attention) == ("model", "layers", "self_attn")
        rows = {"q_proj": heads, "k_proj": kv_heads, "qk_proj": heads}[kind]
        assert len(lists) == rows
        for row in lists:
            assert all(type(c) is int for c in row)
            assert sorted(row) == list(range(head_dim))
        found[int(index), kind] = torch.tensor(lists)
    return found


def write(path, kinds):
    path.write_text(json.dumps({f"model.layers.{i}.self_attn.{k}": rows for (i, k), rows in kinds.items()}))
    return path


def test_an_independent_parser_reads_what_was_written():
    made = calibration()
    files, notes = DoubleSparse.write(made, {})
    assert list(files) == ["Model-1B.json"]
    found = parsed(files["Model-1B.json"], HEADS, KV_HEADS, HEAD_DIM)
    assert set(found) == {(i, kind) for i in range(3) for kind in ("q_proj", "k_proj", "qk_proj")}
    order, product = made.tensors["channels.order"].long(), made.tensors["channels.product"]
    for index in range(3):
        assert torch.equal(found[index, "k_proj"], order[index])
        for head in range(HEADS):
            assert torch.equal(found[index, "q_proj"][head], order[index, head // 2])
            ranked = product[index, head][found[index, "qk_proj"][head]]
            assert (ranked[:-1] >= ranked[1:]).all()
    assert any("--ds-heavy-channel-type k" in note for note in notes)
    assert any("layers 0 are to stay dense" in note for note in notes)


def test_without_statistics_of_query_heads_their_lists_are_the_kv_heads():
    files, _ = DoubleSparse.write(calibration(product=False), {})
    found = parsed(files["Model-1B.json"], HEADS, KV_HEADS, HEAD_DIM)
    assert torch.equal(found[2, "qk_proj"], found[2, "q_proj"])


def test_what_was_written_is_read_back(tmp_path):
    made = calibration()
    (name, raw), *_ = DoubleSparse.write(made, {})[0].items()
    (tmp_path / name).write_bytes(raw)
    for path in (tmp_path / name, tmp_path, tmp_path / "Model-1B"):
        brought = DoubleSparse.read(path, LAYERS)
        assert torch.equal(brought.tensors["channels.order"], made.tensors["channels.order"])
        assert brought.tensors["channels.dense"].tolist() == [False] * 3
        assert brought.passes["channels"]["summary"]["layers_by_kind"] == {"k": 3}
        for order, importance in zip(brought.tensors["channels.order"], brought.tensors["channels.importance"]):
            ranked = importance.gather(1, order.long())
            assert (ranked[:, :-1] > ranked[:, 1:]).all()


def test_a_layer_that_is_left_alone_is_not_written_and_not_read(tmp_path):
    files, notes = DoubleSparse.write(calibration([LAYERS[0], CLOSED, LAYERS[2]]), {})
    found = parsed(files["Model-1B.json"], HEADS, KV_HEADS, HEAD_DIM)
    assert {index for index, _ in found} == {0, 2}
    assert any("layers 1 are left alone" in note for note in notes)
    whole = DoubleSparse.write(calibration(), {})[0]["Model-1B.json"]
    (tmp_path / "file.json").write_bytes(whole)
    brought = DoubleSparse.read(tmp_path / "file.json", [LAYERS[0], CLOSED, LAYERS[2]])
    assert brought.tensors["channels.dense"].tolist() == [False, True, False]
    assert brought.tensors["channels.order"][1].tolist() == [list(range(HEAD_DIM))] * KV_HEADS
    assert any("layers 1" in note for note in brought.notes)


def test_other_kinds_are_passed_over_and_missing_ones_do_without(tmp_path):
    kinds = {(i, "q_proj"): orders(HEADS, seed=i).tolist() for i in (0, 2)}
    kinds |= {(0, "v_proj"): [[0]], (0, "down_proj"): "anything"}
    brought = DoubleSparse.read(write(tmp_path / "file.json", kinds), LAYERS)
    assert brought.tensors["channels.dense"].tolist() == [False, True, False]
    for index in (0, 2):
        wanted = merged(torch.tensor(kinds[index, "q_proj"]), KV_HEADS)
        assert torch.equal(brought.tensors["channels.order"][index].long(), wanted)
    for told in ("down_proj, v_proj", "merged", "layers 1 are not in the file"):
        assert any(told in note for note in brought.notes), told


def test_lists_of_a_group_are_merged_by_mean_rank():
    one, other = [0, 1, 2, 3], [3, 1, 0, 2]  # mean ranks: 0 -> 1, 1 -> 1, 2 -> 2.5, 3 -> 1.5
    both = torch.tensor([one, other, one, one])
    assert merged(both, 2).tolist() == [[0, 1, 3, 2], one]
    assert merged(both, 4).tolist() == both.tolist()


def test_the_official_scripts_mixing_of_heads_is_warned_about(tmp_path):
    same = orders(1).expand(HEADS, -1).tolist()
    kinds = {(i, "qk_proj"): same for i in range(3)} | {(i, "q_proj"): orders(HEADS, seed=i).tolist() for i in range(3)}
    brought = DoubleSparse.read(write(tmp_path / "file.json", kinds), LAYERS)
    assert any(note.startswith("qk_proj of layers 0-2: lists of different heads agree") for note in brought.notes)
    assert not any(note.startswith("q_proj of") for note in brought.notes)
    assert brought.passes["channels"]["summary"]["layers_by_kind"] == {"q": 3}


def test_agreement_is_the_mean_overlap_of_pairs():
    order = orders(3)  # the first 2 of 16 channels
    first = [set(row[:2].tolist()) for row in order]
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert agreement(order) == pytest.approx(sum(len(first[a] & first[b]) / 2 for a, b in pairs) / 3)
    assert agreement(order[:1].expand(5, -1)) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[0].__setitem__(1, rows[0][0]), "layer 0, k_proj, head 0: not an order of the 16 channels"),
        (lambda rows: rows[1].append(16), "layer 0, k_proj, head 1: not an order"),
        (lambda rows: rows[1].__setitem__(0, float(rows[1][0])), "layer 0, k_proj, head 1: not an order"),
        (lambda rows: rows[1].__setitem__(0, True), "layer 0, k_proj, head 1: not an order"),
        (lambda rows: rows.append(rows[0]), "layer 0, k_proj: 3 lists"),
    ],
)
def test_what_is_no_order_is_refused_with_its_place(tmp_path, change, told):
    rows = orders(KV_HEADS).tolist()
    change(rows)
    with pytest.raises(ValueError, match=told):
        DoubleSparse.read(write(tmp_path / "file.json", {(0, "k_proj"): rows}), LAYERS)


def test_files_of_other_models_and_no_files_are_refused(tmp_path):
    far = write(tmp_path / "far.json", {(3, "k_proj"): orders(KV_HEADS).tolist()})
    with pytest.raises(ValueError, match="has a layer 3, the model 3 layers"):
        DoubleSparse.read(far, LAYERS)
    with pytest.raises(ValueError, match="no channels for any layer"):
        DoubleSparse.read(write(tmp_path / "none.json", {(0, "v_proj"): []}), LAYERS)
    with pytest.raises(ValueError, match="2 JSON files"):
        DoubleSparse.read(tmp_path, LAYERS)
    with pytest.raises(ValueError, match="no such file"):
        DoubleSparse.read(tmp_path / "else", LAYERS)
    empty = Calibration({}, calibration().facts)
    with pytest.raises(ValueError, match="acc calibrate MODEL channels"):
        DoubleSparse.write(empty, {})
    with pytest.raises(ValueError, match="layout: there is no 'neox'"):
        DoubleSparse.write(calibration(), {"layout": "neox"})


@pytest.mark.parametrize("head_dim", [2, 64, 80, 128])
def test_layouts_map_onto_each_other(head_dim):
    place = interleaved(head_dim)
    assert place.sort().values.tolist() == list(range(head_dim))
    for channel in range(head_dim // 2):  # c turns with c + D/2, and they become neighbours
        assert int(place[channel]) == 2 * channel
        assert int(place[channel + head_dim // 2]) == 2 * channel + 1
    made = calibration()
    files, notes = DoubleSparse.write(made, {"layout": "interleaved"})
    found = parsed(files["Model-1B.json"], HEADS, KV_HEADS, HEAD_DIM)
    back = interleaved(HEAD_DIM).argsort()
    assert torch.equal(back[found[1, "k_proj"]], made.tensors["channels.order"][1].long())
    assert any("layout=hf" in note for note in notes)


def test_it_is_found_by_its_name():
    assert lookup("formats", "runtime_double_sparse", "Runtime") is DoubleSparse
