"""Sources: what a folder must prove before it is read, and what the hub may answer."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from acc.formats.base import entry, quantization_config, stack
from acc.formats.grouped import GroupedWeight
from acc.formats.safefile import DTYPES
from acc.formats.source import finite, open_source
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

CONFIG = {"model_type": "llama", "dtype": "bfloat16"}
INDEX = "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.layers.10.w.weight": torch.randn(6, 5, generator=generator),
        "model.layers.2.w.weight": torch.randn(4, 3, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(7, generator=generator).half(),
        "model.mask": torch.tensor([True, False, True]),
        "model.empty": torch.zeros(0, 3),
    }


def write_folder(folder: Path, shards: int = 1, config: dict | None = None) -> Path:
    """A small folder; with several shards the tensors take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    if shards == 1:
        save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: t for i, (name, t) in enumerate(tensors().items()) if i % shards == number}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))  # no "metadata": older tools leave it out
    return folder


def write_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def edit_index(folder: Path, change: Callable[[dict], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# What is read equals what the safetensors library reads.


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_reads_what_was_written(tmp_path, shards):
    source = open_source(write_folder(tmp_path / "m", shards))
    assert source.names() == source.raw_names()
    assert source.names()[1:4] == ["model.layers.2.w.weight", "model.layers.10.w.weight", "model.mask"]
    for name, expected in tensors().items():
        info, tensor = source.info(name), source.tensor(name)
        assert tensor.dtype == expected.dtype == info.dtype
        assert tuple(expected.shape) == info.shape == tuple(tensor.shape)
        assert info.nbytes == expected.numel() * expected.element_size()
        assert torch.equal(tensor, expected)
        assert source.packed(name) is None


def test_every_type_survives(tmp_path):
    folder = write_folder(tmp_path / "m")
    raw = torch.arange(64, dtype=torch.uint8)
    every = {str(dtype): raw.clone().view(dtype) for dtype in DTYPES.values() if dtype != torch.bool}
    every["bool"] = raw % 2 == 0
    save_file(every, folder / "model.safetensors")
    floats8 = [name for name in every if "float8" in name]
    with pytest.raises(ValueError, match="float8"):
        open_source(folder)
    save_file({k: v for k, v in every.items() if k not in floats8}, folder / "model.safetensors")
    source, expected = open_source(folder), load_file(folder / "model.safetensors")
    assert source.names() == sorted(expected, key=lambda name: source.names().index(name))
    for name in source.names():
        assert torch.equal(source.raw(name).view(torch.uint8), expected[name].view(torch.uint8))


def test_a_caller_may_write_into_what_it_got(tmp_path):
    source = open_source(write_folder(tmp_path / "m"))
    name = "model.layers.10.w.weight"
    source.tensor(name).zero_()
    assert torch.equal(source.tensor(name), tensors()[name])


def test_unknown_tensor(tmp_path):
    with pytest.raises(ValueError, match="no tensor lm_head"):
        open_source(write_folder(tmp_path / "m")).tensor("lm_head")


# Side files.


def test_side_files_are_told_apart(tmp_path):
    folder = write_folder(tmp_path / "m", shards=2)
    copied = ["LICENSE", "added_tokens.json", "chat_template.jinja", "generation_config.json", "modeling_x.py"]
    left = ["README.md", ".gitattributes", "pytorch_model.bin", "optimizer.pt", "recipe.yaml", "manifest.json"]
    left += ["model.onnx", "quantize_config.json", "consolidated.safetensors"]
    for name in copied + left:
        (folder / name).write_text("x")
    (folder / "original").mkdir()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    source = open_source(folder)
    names = [path.relative_to(folder).as_posix() for path in source.side_files()]
    assert sorted(names) == sorted([*copied, "additional_chat_templates/tool.jinja"])
    assert sorted(source.left_out()) == sorted([*left, "original/"])
    assert all(source.left_out().values())


def test_a_side_file_may_not_lead_out(tmp_path):
    folder = write_folder(tmp_path / "m")
    (tmp_path / "secret").write_text("key")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer.json.*leaves the folder"):
        open_source(folder).side_files()


# Identity.


def test_identity_notices_edits(tmp_path):
    one, two = write_folder(tmp_path / "a", 2), write_folder(tmp_path / "b", 2)
    first = open_source(one).identity()
    assert first == open_source(two).identity()
    assert first == json.loads(json.dumps(first))
    shard = two / "model-00001-of-00002.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    changed = open_source(two).identity()
    assert changed["weights"] != first["weights"]
    assert changed["config"] == first["config"]
    (one / "tokenizer_config.json").write_text("{}")
    assert open_source(one).identity()["side_files"] != first["side_files"]


def test_identity_of_a_large_file_samples_both_ends(tmp_path):
    folder = write_folder(tmp_path / "m")
    big = torch.zeros(3 * 2**20, dtype=torch.float32)
    seen = set()
    for position in (None, 0, -1):
        if position is not None:
            big[position] = 1.0
        save_file({"big": big}, folder / "model.safetensors")
        seen.add(open_source(folder).identity()["weights"]["model.safetensors"]["sha256"])
    assert len(seen) == 3


# A folder that does not add up is refused before anything is read.


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../secret.safetensors",
            "/etc/secret.safetensors",
            "sub/x.safetensors",
            "..\\x.safetensors",
            "C:x.safetensors",
        ),
        *("", "..", "x.bin", "a\n.safetensors", 3, None, ["x"]),
    ],
)
def test_index_names_plain_files_only(tmp_path, name):
    save_file(tensors(), tmp_path / "secret.safetensors")
    folder = write_folder(tmp_path / "m", shards=2)
    edit_index(folder, lambda index: index.update({"model.mask": name}))
    with pytest.raises(ValueError, match=r"weight_map sends model.mask"):
        open_source(folder)


def test_a_link_may_stay_but_not_leave(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")
    assert open_source(folder).names()
    (folder / "blob").rename(tmp_path / "blob")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(ValueError, match="leaves the folder"):
        open_source(folder)


def test_links_of_the_hub_cache_are_legitimate(tmp_path):
    snapshot = write_folder(tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT)
    own, shared = snapshot.parents[1] / "blobs", snapshot.parents[2] / "blobs"
    for blobs in (own, shared):
        blobs.mkdir()
        target = blobs / "abc"
        (snapshot / "model.safetensors").resolve().rename(target)
        (snapshot / "model.safetensors").unlink(missing_ok=True)
        (snapshot / "model.safetensors").symlink_to(target)
        assert open_source(snapshot).names()
    outside = tmp_path / "hub" / "models--org--other"
    outside.mkdir()
    (shared / "abc").rename(outside / "abc")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(outside / "abc")
    with pytest.raises(ValueError, match="leaves the folder"):
        open_source(snapshot)


@pytest.mark.parametrize("cut", [1, 40, 0.5, 0.99])
def test_truncated_shard(tmp_path, cut):
    folder = write_folder(tmp_path / "m", shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(int(cut * size) if cut < 1 else size - cut)
    with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors.*(truncated|not a whole)"):
        open_source(folder)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": F32}, b"", 2**60, "not a whole"),
        ({"a": F32}, b"", 101 * 2**20, "not a whole"),
        (b"[" * 100000, b"", None, "not valid JSON"),
        (b"[]", b"", None, "JSON object"),
        (b"\xff\xfe", b"", None, "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", None, "'a' occurs twice"),
        ({"a": 7}, b"", None, "a: expected dtype"),
        ({"a": {**F32, "more": 1}}, bytes(8), None, "a: expected dtype"),
        ({"a": {**F32, "dtype": "F3"}}, bytes(8), None, "element type 'F3'"),
        ({"a": {**F32, "dtype": []}}, bytes(8), None, "element type"),
        ({"a": {**F32, "shape": [-2]}}, bytes(8), None, "natural numbers"),
        ({"a": {**F32, "shape": [True, 2]}}, bytes(8), None, "natural numbers"),
        ({"a": {**F32, "shape": [2.0]}}, bytes(8), None, "natural numbers"),
        ({"a": {**F32, "shape": [2**62, 4]}}, bytes(8), None, "does not fill"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), None, "does not fill"),
        ({"a": {**F32, "data_offsets": [0, 12]}}, bytes(12), None, "does not fill"),
        ({"a": {**F32, "data_offsets": [800, 808]}}, bytes(8), None, "gap"),
        ({"a": F32}, bytes(7), None, "truncated"),
        ({"a": F32}, bytes(9), None, "1 bytes follow"),
        ({"a": F32, "b": F32}, bytes(8), None, "overlap"),
        ({}, b"", None, "no tensors"),
    ],
)
def test_header_that_lies(tmp_path, header, data, length, message):
    folder = write_folder(tmp_path / "m")
    write_header(folder / "model.safetensors", header, data, length)
    with pytest.raises(ValueError, match=message):
        open_source(folder)


def test_index_and_files_must_agree(tmp_path):
    folder = write_folder(tmp_path / "missing", shards=2)
    edit_index(folder, lambda index: index.update({"ghost": "model-00001-of-00002.safetensors"}))
    with pytest.raises(ValueError, match="lacks ghost"):
        open_source(folder)
    folder = write_folder(tmp_path / "extra", shards=2)
    edit_index(folder, lambda index: index.pop("model.mask"))
    with pytest.raises(ValueError, match=r"holds model.mask, which is not in the index"):
        open_source(folder)
    folder = write_folder(tmp_path / "swapped", shards=2)
    edit_index(folder, lambda index: index.update({"model.mask": "model-00001-of-00002.safetensors"}))
    with pytest.raises(ValueError, match=r"model.mask"):
        open_source(folder)
    folder = write_folder(tmp_path / "gone", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is missing"):
        open_source(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no model.safetensors"),
        (["pytorch_model.bin"], "only pickled weights"),
        (["model-00001-of-00002.safetensors"], "fetch the index"),
        (["x-Q4.gguf"], "name the file itself"),
    ],
)
def test_folder_without_weights(tmp_path, files, message):
    (tmp_path / "config.json").write_text("{}")
    for name in files:
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def test_specs_that_mean_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.gguf").write_text("nothing of the kind")
    (tmp_path / "empty").mkdir()
    for spec, message in [
        ("file", "found a file"),
        ("bad.gguf", "not a GGUF file"),
        ("absent.gguf", "no such file"),
        ("empty", "no config.json"),
        ("./absent", "no such folder"),
        ("a/b/c", "no such folder"),
        ("what is this", "no such folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(spec)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "awq"])
@pytest.mark.parametrize("nested", [False, True])
def test_quantised_by_others(tmp_path, method, nested):
    config: dict = {"quantization_config": {"quant_method": method}}
    folder = write_folder(tmp_path / "m", config={"text_config": config} if nested else config)
    with pytest.raises(ValueError, match=f"already quantised \\({method}\\)"):
        open_source(folder)


def test_nan_is_named():
    whole = torch.zeros(5_000_000)
    assert finite(whole, "w") is whole
    whole[0], whole[-1] = float("nan"), float("-inf")
    with pytest.raises(ValueError, match="w: 2 of 5000000"):
        finite(whole, "w")
    finite(torch.tensor([True]), "mask")


# acc's own packed folders.


def packed(rows: int, columns: int, seed: int) -> GroupedWeight:
    generator = torch.Generator().manual_seed(seed)
    scheme = {"bits": 3, "group_size": 16, "symmetric": False, "scale_dtype": "float16"}
    return GroupedWeight.encode(
        torch.randint(0, 8, (rows, columns), generator=generator, dtype=torch.uint8),
        torch.rand(columns // 16, rows, generator=generator).half(),
        torch.randint(0, 8, (columns // 16, rows), generator=generator, dtype=torch.uint8),
        scheme,
    )


def write_packed(folder: Path) -> dict[str, Any]:
    """A plain matrix, a stack of three, a transposed stack of two, and a dense norm."""
    flat = packed(8, 32, 0)
    experts = [packed(8, 32, seed) for seed in (1, 2, 3)]
    turned = [packed(16, 32, seed) for seed in (4, 5)]
    table = quantization_config(
        {
            "a.weight": (flat.shape, flat.scheme),
            "experts.up": (experts[0].shape, {**experts[0].scheme, "stack": 3}),
            "experts.down": (turned[0].shape, {**turned[0].scheme, "stack": 2, "transposed": True}),
        }
    )
    config = CONFIG | {"quantization_config": table}
    write_folder(folder, config=config)
    disk = {"a.weight" + s: t for s, t in flat.tensors().items()}
    disk |= {"experts.up" + s: t for s, t in stack(experts).items()}
    disk |= {"experts.down" + s: t for s, t in stack(turned).items()}
    disk |= {"experts.up_bias": torch.zeros(3, 8), "norm.weight": torch.ones(8)}
    save_file(disk, folder / "model.safetensors")
    return {"a.weight": [flat], "experts.up": experts, "experts.down": turned, "table": table, "disk": disk}


def test_packed_folder_reads_as_a_dense_one(tmp_path):
    made = write_packed(tmp_path / "m")
    source = open_source(tmp_path / "m")
    assert source.quantized
    assert source.names() == ["a.weight", "experts.down", "experts.up", "experts.up_bias", "norm.weight"]
    assert sorted(source.raw_names()) == sorted(made["disk"])
    expected = {
        "a.weight": made["a.weight"][0].dequantize(torch.bfloat16),
        "experts.up": torch.stack([p.dequantize(torch.bfloat16) for p in made["experts.up"]]),
        "experts.down": torch.stack([p.dequantize(torch.bfloat16).T for p in made["experts.down"]]),
    }
    for name, dense in expected.items():
        info = source.info(name)
        assert (info.shape, info.dtype) == (tuple(dense.shape), torch.bfloat16)
        sizes = [
            t.numel() * t.element_size() for n, t in made["disk"].items() if n.startswith(name) and "bias" not in n
        ]
        assert info.nbytes == sum(sizes)
        assert torch.equal(source.tensor(name), dense)
    assert isinstance(source.packed("a.weight"), GroupedWeight)
    parts = source.packed("experts.up")
    assert isinstance(parts, list)
    for part, original in zip(parts, made["experts.up"], strict=True):
        assert all(torch.equal(t, original.tensors()[s]) for s, t in part.tensors().items())
    with pytest.raises(ValueError, match=r"no tensor a.weight_scale"):
        source.tensor("a.weight_scale")


def test_table_names_each_scheme_once(tmp_path):
    made = write_packed(tmp_path / "m")
    table = made["table"]
    assert table == json.loads(json.dumps(table))
    assert len(table["schemes"]) == 3
    assert list(table["weights"]) == sorted(table["weights"])
    found = entry(table, "experts.down")
    assert found is not None
    assert (found.stack, found.transposed, found.dense_shape) == (2, True, (2, 32, 16))
    assert "stack" not in found.scheme
    assert entry(table, "norm.weight") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda disk: disk.pop("a.weight_scale"), "a.weight_scale is missing"),
        (lambda disk: disk.pop("a.weight"), "a.weight is missing"),
        (lambda disk: disk.update({"a.weight": torch.zeros(8, 32)}), "a.weight is"),
        (lambda disk: disk.update({"experts.up_scale": torch.zeros(3, 8).half()}), "experts.up_scale is"),
    ],
)
def test_packed_tensors_that_do_not_fit(tmp_path, change, message):
    disk = write_packed(tmp_path / "m")["disk"]
    change(disk)
    save_file(disk, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "m")


def test_unexpected_companion(tmp_path):
    made = write_packed(tmp_path / "m")
    symmetric = {**made["a.weight"][0].scheme, "symmetric": True}
    table = quantization_config({"a.weight": ((8, 32), symmetric)})
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": table}))
    with pytest.raises(ValueError, match=r"a.weight_zero is unexpected"):
        open_source(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(version=2), "version 2"),
        (lambda t: t.update(schemes={}), "expected a list"),
        (lambda t: t["weights"].update({"a.weight": 9}), "scheme 9"),
        (lambda t: t["weights"].update({"a.weight": True}), "scheme True"),
        (lambda t: t["schemes"][0].update(format="nothing"), "there is no 'nothing'"),
        (lambda t: t["schemes"][0].update(format="../../x"), "there is no"),
        (lambda t: t["schemes"][0].pop("format"), "names no format"),
        (lambda t: t["schemes"][0].update(shape=[8]), "shape is"),
        (lambda t: t["schemes"][0].update(shape=[8, -32]), "shape is"),
        (lambda t: t["schemes"][0].pop("bits"), "incomplete"),
        (lambda t: t["schemes"][0].update(group_size=0), "incomplete"),
        (lambda t: t["schemes"][0].update(scale_dtype="nothing"), "incomplete"),
        (lambda t: t["schemes"][0].update(stack=0), "stack 0"),
    ],
)
def test_table_that_lies(tmp_path, change, message):
    table = write_packed(tmp_path / "m")["table"]
    change(table)
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": table}))
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "m")


# The hub, spoken to over HTTP.


class Hub(ThreadingHTTPServer):
    """As much of a hub as a client needs to list and fetch the files of one model, `org/name`."""

    def __init__(self, files: dict[str, bytes], refusal: tuple[int, str] | None = None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.refusal, self.fetched = files, refusal, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.server.refusal:
            return self.reply(self.server.refusal[0], b"", {"X-Error-Code": self.server.refusal[1]})
        if path.startswith("/api/models/org/name"):
            if path.rpartition("/")[2] not in ("name", "main", "v1", COMMIT):
                return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            info = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.server.files]}
            return self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        if not path.startswith("/org/name/resolve/"):
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision, _, name = path.removeprefix("/org/name/resolve/").partition("/")
        if revision not in ("main", "v1", COMMIT) or name not in self.server.files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        if body:
            self.server.fetched.append(name)
        return self.reply(200, self.server.files[name] if body else b"", {}, name)

    def reply(self, status: int, content: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        size = len(self.server.files[name]) if name else len(content)
        extra = {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash(name))}"'} if name else {}
        for key, value in {**headers, **extra, "Content-Length": str(size)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(files, refusal)` starts a hub and points huggingface_hub to it, with an empty cache."""
    started: list[Hub] = []

    def start(files: dict[str, bytes], refusal: tuple[int, str] | None = None) -> Hub:
        server = Hub(files, refusal)
        started.append(server)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def repository(folder: Path, shards: int = 2) -> dict[str, bytes]:
    """A repository as they are: the model, its side files, and other copies of the same weights."""
    write_folder(folder, shards)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("tokenizer.json", "LICENSE", "chat_template.jinja", "additional_chat_templates/rag.jinja"):
        files[name] = b"{}"
    for name in (
        "pytorch_model.bin",
        "model.onnx",
        "onnx/model.onnx",
        "x.gguf",
        "consolidated.safetensors",
        "picture.png",
    ):
        files[name] = b"large"
    return files | {"modeling_x.py": b"pass"}


def test_hub_fetches_what_is_needed_and_pins_the_commit(tmp_path, hub):
    files = repository(tmp_path / "m")
    server = hub(files)
    source = open_source("org/name@v1")
    assert (source.kind, source.revision, source.spec) == ("hub", COMMIT, "org/name@v1")
    shards = [name for name in files if name.startswith("model-")]
    side = ["tokenizer.json", "LICENSE", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
    assert sorted(server.fetched) == sorted(["config.json", INDEX, *shards, *side])
    for name, expected in tensors().items():
        assert torch.equal(source.tensor(name), expected)
    assert sorted(p.relative_to(source.folder).as_posix() for p in source.side_files()) == sorted(side)
    again = open_source("org/name@v1")
    assert again.identity() == source.identity()
    assert len(server.fetched) == len(set(server.fetched)), "a second opening fetches nothing"
    assert "modeling_x.py" in {p.name for p in open_source("org/name", trust_remote_code=True).side_files()}


def test_hub_serves_from_the_cache_without_a_network(tmp_path, hub, monkeypatch):
    hub(repository(tmp_path / "m", shards=1))
    source = open_source("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_source("org/name").identity() == source.identity()
    assert open_source(str(source.folder)).names() == source.names()
    with pytest.raises(OSError, match="out of reach"):
        open_source("org/other")
    with pytest.raises(OSError, match="out of reach"):
        open_source("org/name@v1")


@pytest.mark.parametrize(
    ("drop", "spec", "message"),
    [
        ([], "org/other", "neither a folder here nor a model on the hub"),
        ([], "org/name@v9", "no revision 'v9'"),
        (["config.json"], "org/name", "has no config.json"),
        ([INDEX, "consolidated.safetensors", "x.gguf"], "org/name", "only pickled weights"),
        ([INDEX, "pytorch_model.bin"], "org/name", "name that file"),
        (["model-00002-of-00002.safetensors"], "org/name", "model-00002-of-00002.safetensors"),
    ],
)
def test_hub_answers_that_end_it(tmp_path, hub, drop, spec, message):
    hub({name: content for name, content in repository(tmp_path / "m").items() if name not in drop})
    with pytest.raises((ValueError, OSError), match=message) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "GatedRepo"), "is gated"),
        ((401, "RepoNotFound"), "neither a folder"),
        ((403, ""), "answered 403"),
        ((503, ""), "answered 503"),
    ],
)
def test_hub_refusals(hub, refusal, message):
    hub({}, refusal)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        open_source("org/name")
    assert "\n" not in str(caught.value)


def test_hub_that_nobody_answers(hub):
    server = hub({})
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="no network"):
        open_source("org/name")


def test_hub_index_is_checked_before_its_files_are_fetched(tmp_path, hub):
    files = repository(tmp_path / "m")
    index = json.loads(files[INDEX])
    index["weight_map"]["model.mask"] = "../../../x.safetensors"
    server = hub(files | {INDEX: json.dumps(index).encode()})
    with pytest.raises(ValueError, match="only a file name inside the folder"):
        open_source("org/name")
    assert server.fetched == ["config.json", INDEX]


# GGUF.


def test_gguf_becomes_a_plain_folder_once(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    path, dense = write_gguf(gguf, tmp_path / "tiny.gguf")
    source = open_source(str(path))
    assert source.kind == "gguf"
    assert source.folder.is_relative_to(tmp_path / "home" / "acc")
    assert "lm_head.weight" not in source.names(), "tied: stored once"
    assert "quantization_config" not in source.config
    assert source.dtype == torch.float32
    for name, expected in dense.items():
        assert torch.equal(source.tensor(name), torch.from_numpy(expected)), name
    assert {p.name for p in source.side_files()} >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    monkeypatch.setattr("acc.formats.fetch._convert_gguf", None)
    assert open_source(str(path)).identity() == source.identity()


def write_gguf(gguf: Any, path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A Llama of one layer in F32, and its tensors under transformers' names (without q and k, which gguf permutes)."""
    random = np.random.default_rng(0)
    words = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(26)), *"ĠABC", "ab"]
    sizes = {
        "token_embd": ("model.embed_tokens", (len(words), 32)),
        "output_norm": ("model.norm", (32,)),
        "blk.0.attn_norm": ("model.layers.0.input_layernorm", (32,)),
        "blk.0.ffn_norm": ("model.layers.0.post_attention_layernorm", (32,)),
        "blk.0.attn_q": ("", (32, 32)),
        "blk.0.attn_k": ("", (16, 32)),
        "blk.0.attn_v": ("model.layers.0.self_attn.v_proj", (16, 32)),
        "blk.0.attn_output": ("model.layers.0.self_attn.o_proj", (32, 32)),
        "blk.0.ffn_gate": ("model.layers.0.mlp.gate_proj", (64, 32)),
        "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", (64, 32)),
        "blk.0.ffn_down": ("model.layers.0.mlp.down_proj", (32, 64)),
    }
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    dense = {}
    for name, (here, shape) in sizes.items():
        value = random.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", value)
        if here:
            dense[f"{here}.weight"] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, dense
