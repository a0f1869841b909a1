"""The SpQR authors' words, read bit by bit as their description says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from acc.formats.engine import export
from acc.formats.source import open_source
from safetensors.torch import load_file

SETTINGS = {"bits": 3, "group_size": 16, "stat_group_size": 16}


def half(bits: int) -> np.float32:
    return np.float32(np.array([bits], dtype=np.uint16).view(np.float16)[0])


def dequantized(tensors: dict, stem: str, shape: tuple[int, int]) -> np.ndarray:
    """`W [O, I]`, one word at a time: tile rows, tile columns, rows of the tile; then corrections, then the order."""
    rows, columns = shape
    words = tensors[f"{stem}.dense_weights"].numpy().view(np.uint64)
    offsets, merged = (tensors[f"{stem}.{leaf}"].numpy() for leaf in ("row_offsets", "col_vals"))
    packed = np.zeros(shape, dtype=np.float32)
    for tile_row in range(rows // 16):
        for tile_column in range(columns // 16):
            first = (tile_row * (columns // 16) + tile_column) * 16
            tile = [int(word) for word in words[first : first + 16]]
            statistics = 0
            for row in range(16):
                assert tile[row] >> 62 == 0
                assert tile[row] >> 54 & 255 == tile[row ^ 1] >> 54 & 255
                statistics |= (tile[row] >> 54 & 255) << 8 * (row // 2)
            ss, sz, zs, zz = (half(statistics >> 16 * k & 0xFFFF) for k in range(4))
            for row in range(16):
                scale = ss * (np.float32(tile[row] & 7) - zs)
                zero = sz * (np.float32(tile[row] >> 3 & 7) - zz)
                for column in range(16):
                    code = np.float32(tile[row] >> 6 + 3 * column & 7)
                    packed[16 * tile_row + row, 16 * tile_column + column] = (code - zero) * scale
    for row in range(rows):
        inside = [int(word) & 0xFFFFFFFF for word in merged[offsets[row] : offsets[row + 1]]]
        assert [word & 0xFFFF for word in inside] == sorted({word & 0xFFFF for word in inside})
        for word in inside:
            packed[row, word & 0xFFFF] += half(word >> 16)
    perm = [int(word) >> 16 * k & 0xFFFF for word in tensors[f"{stem}.in_perm"].numpy() for k in (0, 1)]
    weight = np.empty_like(packed)
    weight[:, perm] = packed
    return weight


@pytest.mark.parametrize("step", [{}, {"order": "identity"}, {"outlier_threshold": None}], ids=str)
def test_an_independent_reader_finds_the_same_weights(packed, tmp_path, step):
    source = open_source(packed("llama", "spqr", **SETTINGS, **step))
    export(source, tmp_path, "spqr-hf")
    config = json.loads((tmp_path / "config.json").read_text())
    table = config["quantization_config"]
    assert (table["quant_method"], table["bits"], table["beta1"], table["beta2"]) == ("spqr", 3, 16, 16)
    assert config["dtype"] == "float16"
    assert table["modules_to_not_convert"] == ["lm_head$"]
    tensors = load_file(tmp_path / "model.safetensors")
    for name, entry in source.entries.items():
        stem = name.removesuffix(".weight")
        for leaf in ("dense_weights", "row_offsets", "col_vals", "in_perm"):
            assert table["shapes"][f"{stem}.{leaf}.shape"] == len(tensors[f"{stem}.{leaf}"])
        if ".1." in name:
            theirs = torch.from_numpy(dequantized(tensors, stem, entry.shape))
            assert torch.equal(theirs, source.packed(name).dequantize())


@pytest.mark.parametrize(
    ("method", "step", "reason"),
    [
        ("rtn", {"bits": 3}, "packed as grouped, and only spqr"),
        ("spqr", SETTINGS | {"bits": 4}, "its bits is 4, and only 3"),
        ("spqr", {"bits": 3}, "its stat_group_size is 64, and only 16"),
    ],
)
def test_refused_by_tensor_and_reason(packed, tmp_path, method, step, reason):
    with pytest.raises(ValueError, match=rf"model\.layers\.0\..*\.weight: .*{reason}"):
        export(open_source(packed("llama", method, **step)), tmp_path, "spqr-hf")


def test_experts_are_refused_or_dense(packed, tmp_path):
    source = open_source(packed("mixtral", "spqr", **SETTINGS))
    with pytest.raises(ValueError, match="only linear layers can be stored"):
        export(source, tmp_path, "spqr-hf")
    made = export(source, tmp_path, "spqr-hf", dense_rest=True)
    assert all(".experts." in name for name in made.dense)
