"""Models that are not a local folder yet: fetched from the hub or unpacked from a .gguf file, into the user's cache."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .safefile import INDEX, SINGLE, is_plain, read_index

WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ggml", ".tflite"),
    *(".ot", ".npz", ".nemo", ".mlmodel", ".pkl", ".pickle", ".onnx_data", ".index.json"),
)
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".jsonl", ".yaml", ".md", ".vocab", ".bpe")
TEMPLATES = "additional_chat_templates"  # the one sub-folder that tokenizers read


def fetch(repo: str, revision: str | None, remote_code: bool) -> tuple[Path, str]:
    """The snapshot folder of a hub model and its commit; fetched are configuration, safetensors and small side files.

    Goes through huggingface_hub alone, so its environment variables hold. Without a network, what lies in the cache is
    used. Raises ValueError or OSError in one line: no such model, gated, no network, no config.json, only pickles.
    """
    from huggingface_hub import HfApi, errors, hf_hub_download

    names, unreachable = None, None
    try:
        names = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise ValueError(_explain(error, repo, revision, "config.json")) from error
    except (OSError, errors.HTTPError) as error:
        unreachable = error
    if names is not None and "config.json" not in names:
        raise ValueError(f"{repo}: the model on the hub has no config.json: not a transformers model")

    def get(name: str, at: str | None) -> Path:
        try:
            return Path(hf_hub_download(repo, name, revision=at, local_files_only=unreachable is not None))
        except (OSError, errors.HTTPError, errors.EntryNotFoundError) as error:
            raise OSError(_explain(unreachable or error, repo, revision, name)) from error

    folder = get("config.json", revision).parent  # by its branch, which the cache then knows when there is no network
    commit = folder.name
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in _needed(repo, names, remote_code, lambda name: get(name, commit)):
        get(name, commit)
    return folder, commit


def _needed(repo: str, names: list[str], remote_code: bool, get: Callable[[str], Path]) -> list[str]:
    """What else to fetch; a repository without safetensors is refused before anything large moves."""
    if SINGLE in names:
        weights = [SINGLE]
    elif INDEX in names:
        weights = sorted(set(read_index(get(INDEX)).values()))
    else:
        kinds = {suffix: name for name in names for suffix in (".gguf", ".bin", ".pt", ".pth") if name.endswith(suffix)}
        if ".gguf" in kinds:
            raise ValueError(f"{repo}: no {SINGLE}; fetch {kinds['.gguf']} yourself and name that file")
        if kinds:
            raise ValueError(
                f"{repo}: only pickled weights ({min(kinds.values())}), which can run code when read: refused"
            )
        raise ValueError(f"{repo}: no {SINGLE} and no {INDEX}; if they were never fetched, a network is needed")
    side = [name for name in names if _is_side(name, remote_code)]
    return side + weights


def _is_side(name: str, remote_code: bool) -> bool:
    if name.startswith(f"{TEMPLATES}/"):
        return name.endswith(".jinja")
    if not is_plain(name) or name.startswith(".") or name.endswith(WEIGHT_SUFFIXES):
        return False
    if name.endswith(".py"):
        return remote_code
    return name.endswith(SIDE_SUFFIXES) or name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY"))


def _explain(error: Exception, repo: str, revision: str | None, name: str) -> str:
    """What went wrong on the hub, in the user's terms."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its conditions on the hub, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo}: neither a folder here nor a model on the hub; mind the spelling (a private one needs HF_TOKEN)"
    if isinstance(error, errors.HFValidationError):
        return f"{repo}: neither a folder here nor the id of a model on the hub (org/name)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo}: there is no revision {revision!r}"
    if isinstance(error, errors.HfHubHTTPError) and not isinstance(error, errors.EntryNotFoundError):
        return f"{repo}: the hub answered {error.response.status_code}, and {name} is not in the cache; try again later"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{repo}: the model on the hub has no {name}"
    if isinstance(error, (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return f"{repo}: not a folder here; the hub is out of reach (no network, or HF_HUB_OFFLINE), not cached: {name}"
    return f"{repo}: fetching {name} failed: {error}"  # the disk, most likely


def unpack_gguf(path: Path) -> tuple[Path, str]:
    """The folder with the dense model of a .gguf file, and the file's sha256; made once, then found in the cache.

    transformers reads and dequantises (into bfloat16; a file of F32 or F16 matrices keeps its type) and translates
    the tokenizer with its chat template. The folder appears under the hub's home by a rename, whole or not at all; its
    name carries the file's hash and the version of transformers, whose reader decides what the weights are.
    Raises ValueError for a file that is no GGUF or whose architecture transformers cannot read.
    """
    import transformers
    from huggingface_hub import constants

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise ValueError(f"{path}: is one piece of several; join them first (llama-gguf-split --merge)")
    home = Path(constants.HF_HOME) / "acc"
    folder = home / f"gguf-{digest[:16]}-transformers-{transformers.__version__}"
    if not (folder / "config.json").exists():
        home.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=home))
        try:
            _convert_gguf(path, work)
            if not folder.exists():  # another process may have been faster
                work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder, digest


def _convert_gguf(path: Path, folder: Path) -> None:
    import transformers

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    plain: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases would keep the blocks packed
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        dtype = _gguf_dtype(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, **plain, dtype=dtype)
    except (ValueError, LookupError, RuntimeError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{path}: transformers cannot read this GGUF file: {reason}") from error
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):  # what only tells where the file lay
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in ("_name_or_path", "is_local", "local_files_only"):
            settings.pop(key, None)
        (folder / name).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _gguf_dtype(path: Path) -> Any:
    """The type of the file's matrices when all are F32 or all F16, else bfloat16."""
    import torch
    from gguf import GGUFReader

    kinds = {tensor.tensor_type.name for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1}
    return {frozenset(["F32"]): torch.float32, frozenset(["F16"]): torch.float16}.get(frozenset(kinds), torch.bfloat16)
