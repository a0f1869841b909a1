"""Documents: texts and chats as they lie in files, folders and data sets of the hub."""

from __future__ import annotations

import fnmatch
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OTHER_WAYS = "--data FILE.txt, FILE.jsonl, DIR or self"
_JSON = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz")
_KEYS = ("text", "content", "messages", "conversations", "prompt", "completion")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # names of ShareGPT exports


@dataclass(frozen=True)
class Document:
    """One text or one chat, and the place it came from."""

    where: str
    text: str = ""
    chat: list[dict[str, Any]] | None = None


def local_documents(spec: str) -> tuple[str, list[Document]]:
    """What kind of thing `spec` is, and its documents, in the order of the file or of the sorted file names.

    Raises ValueError when it is missing, empty, damaged or not text, or when a record holds none of the known keys.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        inside = [p.relative_to(path) for p in path.rglob("*") if p.name.lower().endswith((".txt", ".jsonl"))]
        files = sorted((p for p in inside if not any(x.startswith(".") for x in p.parts)), key=Path.as_posix)
        if not files:
            raise ValueError(f"{spec}: no .txt or .jsonl file in this folder")
        return "folder", [d for p in files if (path / p).is_file() for d in _file_documents(path / p, f"{path / p}")]
    if not path.is_file():
        raise ValueError(f"{spec}: no such file or folder; expected {OTHER_WAYS}, or hf:dataset")
    documents = _file_documents(path, spec)
    if not documents:
        raise ValueError(f"{spec}: the file is empty")
    return "text file" if documents[0].where == spec else "records", documents


def _file_documents(path: Path, label: str) -> list[Document]:
    """The documents of one file, by its ending; empty ones hold no token and are no documents."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        rows = _parquet_rows(path, label)
    elif name.endswith(_JSON):
        rows = _json_rows(_read_text(path, label), label)
    else:
        text = _read_text(path, label)
        return [Document(label, text)] if text.strip() else []
    documents = (_document(row, where) for row, where in rows)
    return [d for d in documents if d.chat or d.text.strip()]


def _read_text(path: Path, label: str) -> str:
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{label}: damaged gzip file ({error})") from error
    if (zero := data.find(b"\0")) >= 0:
        raise ValueError(f"{label}: a binary file (zero byte at offset {zero}); expected UTF-8 text")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{label}: not UTF-8 text (byte at offset {error.start}); convert it to UTF-8") from error


def _json_rows(text: str, label: str) -> Iterator[tuple[Any, str]]:
    """One row per line; a file that is one JSON array gives its items."""
    if text.lstrip().startswith("["):
        try:
            yield from ((row, f"{label}, item {i}") for i, row in enumerate(json.loads(text), 1))
        except json.JSONDecodeError as error:
            raise ValueError(f"{label}, line {error.lineno}: not JSON ({error.msg})") from error
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line separators
        if not line.strip():
            continue
        try:
            yield json.loads(line), f"{label}, line {number}"
        except json.JSONDecodeError as error:
            raise ValueError(f"{label}, line {number}: not JSON ({error.msg})") from error


def _parquet_rows(path: Path, label: str) -> Iterator[tuple[Any, str]]:
    try:
        from pyarrow import ArrowInvalid, parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{label}: .parquet needs pyarrow (pip install pyarrow); or use {OTHER_WAYS}") from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{label}: damaged parquet file ({_first_line(error)})") from error
    names = file.schema_arrow.names
    columns = [name for name in names if name in _KEYS] or names[:1]
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield row, f"{label}, row {number}"


def _document(row: Any, where: str) -> Document:
    """One record of a data file. Raises ValueError when it holds none of the keys that stand for text."""
    have = {k: v for k, v in row.items() if k in _KEYS and v is not None} if isinstance(row, dict) else {}
    for key in ("text", "content"):
        if key in have:
            return Document(where, _string(have[key], key, where))
    for key in ("messages", "conversations"):
        if key in have:
            return Document(where, chat=_chat(have[key], key, where))
    if "prompt" in have and "completion" in have:
        prompt, completion = have["prompt"], have["completion"]
        if isinstance(prompt, list):
            return Document(where, chat=_chat(prompt, "prompt", where) + _chat(completion, "completion", where))
        return Document(where, _string(prompt, "prompt", where) + _string(completion, "completion", where))
    found = f"found {', '.join(map(repr, row)) or 'no key'}" if isinstance(row, dict) else "it is no object with keys"
    raise ValueError(
        f"{where}: expected 'text', 'content', 'messages', 'conversations', or 'prompt' and 'completion'; {found}"
    )


def _chat(value: Any, key: str, where: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, also from the `from` and `value` of ShareGPT exports."""
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise ValueError(f"{where}: {key!r} must be a list of messages")
    chat = []
    for message in value:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # of parts; only those of text can be used
            texts = [part.get("text") if isinstance(part, dict) else part for part in content]
            content = "".join(_string(text, "text", where) for text in texts)
        role = _string(role, "role", where)
        content = "" if content is None else _string(content, "content", where)  # a message may only call a tool
        chat.append({**message, "role": _ROLES.get(role, role), "content": content})
    return chat


def _string(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {key!r} holds half a surrogate pair at character {error.start}") from error
    return value


def hub_documents(spec: str) -> tuple[str, Iterator[list[Document]]]:
    """Commit of the data set, and the documents of its files, one file at a time, fetched when reached."""
    name, *rest = spec.removeprefix("hf:").split(":")
    name, _, revision = name.partition("@")
    if not name or len(rest) > 2:
        raise ValueError(f"--data {spec}: expected hf:dataset[:config[:split]]")
    commit, files, fetch = _hub_listing(spec, name, revision or None)
    card = _front_matter(fetch("README.md")) if "README.md" in files else {}
    config, split = (part or None for part in [*rest, "", ""][:2])
    chosen = choose_files(files, card, config, split, spec)
    return commit, (_file_documents(fetch(file), f"hf:{name}/{file}") for file in chosen)


def _hub_listing(spec: str, name: str, revision: str | None) -> tuple[str, list[str], Callable[[str], Path]]:
    """Commit, file names, and a function that gives a file's local path; from the cache if the hub is silent."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(file: str) -> Path:
        try:
            return Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))
        except (HTTPError, OSError) as error:
            raise ValueError(f"{spec}: {file} could not be fetched ({_first_line(error)}); use {OTHER_WAYS}") from error

    try:
        info = HfApi().dataset_info(name, revision=revision)
        commit = str(info.sha)
        return commit, [s.rfilename for s in info.siblings or []], fetch
    except HFValidationError as error:
        raise ValueError(f"{spec}: {name!r} is no data set id; expected hf:dataset[:config[:split]]") from error
    except GatedRepoError as error:
        raise ValueError(f"{spec}: ask for access on the hub, then set HF_TOKEN; or use {OTHER_WAYS}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{spec}: no such data set on the hub, or it is private and HF_TOKEN is not set") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{spec}: the data set has no revision {revision!r}") from error
    except (HTTPError, OSError) as error:
        reason = _first_line(error)
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # What is cached of a data set is what an earlier run needed; that the rest is missing does not matter.
        cached = getattr(error, "snapshot_path", None)
        if cached is None:
            raise ValueError(f"{spec}: not cached, and the hub gave no answer ({reason}); use {OTHER_WAYS}") from error
        folder = Path(cached)
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return folder.name, files, lambda file: folder / file


def _front_matter(readme: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    return metadata_load(readme) or {}


def choose_files(
    files: list[str], card: dict[str, Any], config: str | None, split: str | None, spec: str = "hf:"
) -> list[str]:
    """The data files of one configuration and split of a hub data set, in natural order.

    The card's `configs` decide where it has them; else the words of the file names do. Without `split`: `train`, or
    everything when there is no `train`.
    """
    data = sorted((f for f in files if _is_data(f)), key=_natural)
    configs = [c for c in card.get("configs") or [] if isinstance(c, dict) and c.get("data_files")]
    if configs:
        names = [str(c.get("config_name")) for c in configs]
        default = [n for n, c in zip(names, configs) if c.get("default") or n == "default"] or names[: len(names) == 1]
        if (config or "") not in names and (config or not default):
            raise ValueError(f"{spec}: name one of its configurations as hf:dataset:CONFIG: {', '.join(names)}")
        by_split = _patterns(configs[names.index(config or default[0])]["data_files"])
    else:
        pool = [f for f in data if config is None or _has_word(f, config)]
        by_split = {s: [f for f in pool if _has_word(f, s)] for s in (split or "train",)}
        by_split = by_split if split or by_split["train"] else {"train": pool}
    wanted = by_split.get(split or "train", [] if split else [p for paths in by_split.values() for p in paths])
    globs = [p.removeprefix("./").replace("**/", "*") for p in wanted]  # fnmatch's * crosses folders by itself
    chosen = [f for f in data if any(f == g or fnmatch.fnmatchcase(f, g) for g in globs)]
    for kind in (_JSON, (".parquet",), (".txt", ".txt.gz")):  # the same rows may lie there in two formats
        if some := [f for f in chosen if f.lower().endswith(kind)]:
            return some
    what = f"configuration {config or 'default'!r}, split {split or 'train'!r}"
    have = ", ".join(data[:6]) or "none"
    raise ValueError(f"{spec}: no .jsonl, .parquet or .txt file for {what}; its data files: {have}")


def _is_data(file: str) -> bool:
    name = file.rpartition("/")[2].lower()
    described = name in ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "license.txt")
    return name.endswith((*_JSON, ".parquet", ".txt", ".txt.gz")) and not name.startswith(".") and not described


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """`data_files` of a card, in any of its spellings, as `{split: patterns}`."""
    items = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for item in items:
        paths = item.get("path", []) if isinstance(item, dict) else item
        name = str(item.get("split", "train")) if isinstance(item, dict) else "train"
        found.setdefault(name, []).extend(str(p) for p in (paths if isinstance(paths, list) else [paths]))
    return found


def _has_word(file: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", file) is not None


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
