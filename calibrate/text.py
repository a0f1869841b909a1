"""Text for calibration and evaluation: documents, or the model's own samples, as token sequences without gaps.

Documents are tokenised whole and laid back to back; nothing is truncated, nothing is left out without being counted.
What a person would ask about the tokens (BOS, chat template, order, hash) is decided here once and put into words.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .documents import OTHER_WAYS, Document, hub_documents, local_documents

ChatTemplate = Literal["auto", "none"]
Generate = Callable[[Tensor, int, int], Tensor]  # (prompt [B, n], new tokens, seed) -> ids [B, n + new tokens]

_BATCH = 256  # documents per call of the tokenizer: enough to keep its threads busy


@dataclass(frozen=True)
class TokenStream:
    """All tokens that were asked for, in order, and how they came about."""

    ids: Tensor  # [tokens] int64
    spec: str
    kind: str
    documents: int  # that the tokens came from
    documents_left: int  # read, but not needed
    order: str
    bos: str
    chat_template: str
    revision: str | None = None  # commit of a hub data set

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def sha256(self) -> str:
        return sha256_of(self.ids)

    def record(self) -> dict[str, Any]:
        """JSON-simple: where the tokens came from, every decision, and their hash."""
        return {
            "data": self.spec,
            "kind": self.kind,
            **({"revision": self.revision} if self.revision else {}),
            "documents": self.documents,
            "documents_left": self.documents_left,
            "order": self.order,
            "bos": self.bos,
            "chat_template": self.chat_template,
            "tokens": self.tokens,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class CalibrationText:
    """Sequences of equal length, cut one after the other from a stream of tokens."""

    batches: Tensor  # [nsamples, seqlen] int64
    stream: TokenStream
    nsamples: int  # asked for
    seed: int
    first_sample: str  # decoded
    notes: tuple[str, ...] = field(default=())  # what the user should be told

    @property
    def tokens(self) -> int:
        return self.batches.numel()

    @property
    def tokens_left(self) -> int:
        """Tokenised, but not needed for whole sequences or beyond the number asked for."""
        return self.stream.tokens - self.tokens

    @property
    def sha256(self) -> str:
        return sha256_of(self.batches)

    def record(self) -> dict[str, Any]:
        """JSON-simple: what recipe and report say about the text."""
        used, seqlen = self.batches.shape
        return {
            **self.stream.record(),
            "nsamples": self.nsamples,
            "nsamples_used": used,
            "seqlen": seqlen,
            "seed": self.seed,
            "tokens": self.tokens,
            "tokens_left": self.tokens_left,
            "sha256": self.sha256,
            "first_sample": self.first_sample[:200],
            "notes": list(self.notes),
        }


def load_text(
    spec: str,
    tokenizer: Any,
    *,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    chat_template: ChatTemplate = "auto",
    max_length: int | None = None,
    vocab_size: int | None = None,
    generate: Generate | None = None,
) -> CalibrationText:
    """The calibration text that `--data SPEC` names.

    Args:
        spec: FILE.txt (one document), FILE.jsonl (one per line: "text", "content", "messages", "conversations", or
            "prompt" and "completion"), FILE.parquet, DIR (every .txt and .jsonl below it),
            `hf:dataset[@revision][:config[:split]]`, or `self`: sampled from the model through `generate`.
        nsamples, seqlen: sequences asked for, and their length. A shorter text gives fewer, and a note that says so.
        seed: order of the documents where there are several, and the sampling of `self`.
        chat_template: `auto` renders chats with the tokenizer's template; `none` writes them as `role: content`.
        max_length: the model's positions; vocab_size: rows of its embedding. What goes beyond either is refused.

    Raises ValueError, in one line, for text that is missing, empty, not text, or shorter than one sequence.
    """
    for option, value in (("--nsamples", nsamples), ("--seqlen", seqlen)):
        if value < 1:
            raise ValueError(f"{option} {value}: must be at least 1")
    if max_length is not None and seqlen > max_length:
        raise ValueError(f"--seqlen {seqlen}: the model has {max_length} positions; use --seqlen {max_length} or less")
    if spec == "self":
        stream = _sample(tokenizer, generate, nsamples, seqlen, seed, vocab_size)
    else:
        limit = nsamples * seqlen
        stream = load_tokens(
            spec, tokenizer, seed=seed, limit=limit, chat_template=chat_template, vocab_size=vocab_size
        )
    if stream.tokens < seqlen:
        raise ValueError(
            f"{spec}: {stream.tokens} tokens, fewer than one sequence of {seqlen}; "
            f"use --seqlen {stream.tokens} or less, or a longer text"
        )
    used = min(nsamples, stream.tokens // seqlen)
    batches = stream.ids[: used * seqlen].view(used, seqlen).clone()
    notes = ()
    if used < nsamples:
        notes = (f"{spec} has {stream.tokens} tokens: {used} sequences of {seqlen}, not the {nsamples} asked for",)
    first = tokenizer.decode(batches[0].tolist(), skip_special_tokens=False)
    return CalibrationText(batches, stream, nsamples, seed, first, notes)


def load_tokens(
    spec: str,
    tokenizer: Any,
    *,
    seed: int | None = None,
    limit: int | None = None,
    chat_template: ChatTemplate = "auto",
    vocab_size: int | None = None,
) -> TokenStream:
    """The tokens of every document of `spec` (any form but `self`), back to back.

    A text file is always tokenised whole. Several documents are shuffled when `seed` is given (those of a hub data set
    file by file), and no further one is tokenised, no further file fetched, once there are `limit` tokens.
    """
    if spec == "self":
        raise ValueError("--data self: sampled text serves calibration, not evaluation; name a file")
    revision = None
    if spec.startswith("hf:"):
        kind, (revision, groups) = "hub data set", hub_documents(spec)
    else:
        kind, documents = local_documents(spec)
        groups = iter([documents])
    encoder = _Encoder(tokenizer, chat_template)
    ids, used, left = _pack(groups, encoder, seed, limit)
    if not ids:
        raise ValueError(f"{spec}: no text in it; name another with {OTHER_WAYS}")
    if vocab_size is not None and (largest := max(ids)) >= vocab_size:
        raise ValueError(
            f"{spec}: the tokenizer gives token {largest}, the model knows {vocab_size}: they do not belong together"
        )
    order = "as written" if seed is None or used + left == 1 else f"documents shuffled with seed {seed}"
    return TokenStream(
        torch.tensor(ids), spec, kind, used, left, order, encoder.bos_decision, encoder.chat_decision, revision
    )


def _pack(
    groups: Iterator[list[Document]], encoder: _Encoder, seed: int | None, limit: int | None
) -> tuple[list[int], int, int]:
    """Tokens back to back until there are `limit`; how many documents they came from, and how many were left."""
    ids: list[int] = []
    used = left = 0
    for group in groups:
        left += len(group)
        for tokens in encoder.encode(_shuffle(group, seed)):
            ids += tokens
            used, left = used + 1, left - 1
            if limit is not None and len(ids) >= limit:
                return ids, used, left
    return ids, used, left


def sha256_of(ids: Tensor) -> str:
    """Hash of the tokens as little-endian int64 bytes, whatever the shape."""
    return hashlib.sha256(ids.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _shuffle(documents: list[Document], seed: int | None) -> list[Document]:
    if seed is None:
        return documents
    source = random.Random(seed)  # `random()` gives the same numbers in every Python version; `shuffle` need not
    keys = [source.random() for _ in documents]
    return [documents[i] for i in sorted(range(len(documents)), key=keys.__getitem__)]


class _Encoder:
    """Documents -> token ids, with the special tokens that the tokenizer, or its chat template, puts around them."""

    def __init__(self, tokenizer: Any, chat_template: ChatTemplate):
        if chat_template not in ("auto", "none"):
            raise ValueError(f"chat template {chat_template!r}: expected 'auto' or 'none'")
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.before, self.after = _surroundings(tokenizer)
        self.seen: Counter[str] = Counter()  # documents handed out, by how they were written

    def encode(self, documents: list[Document]) -> Iterator[list[int]]:
        for start in range(0, len(documents), _BATCH):
            written = [self._write(d) for d in documents[start : start + _BATCH]]
            texts = [text for text, _ in written]
            encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids, (_, how) in zip(encoded["input_ids"], written):
                self.seen[how] += 1
                yield list(ids) if how == "rendered" else self._surround(list(ids))

    def _write(self, document: Document) -> tuple[str, str]:
        """The document as one string, and how it was made: `plain`, `rendered` by the template, or `joined`."""
        if document.chat is None:
            return document.text, "plain"
        if self.chat_template == "none" or not getattr(self.tokenizer, "chat_template", None):
            return "\n\n".join(f"{m['role']}: {m['content']}" for m in document.chat), "joined"
        from jinja2 import TemplateError  # comes with torch; plain text needs no templates

        try:
            return self.tokenizer.apply_chat_template(document.chat, tokenize=False), "rendered"
        except (TemplateError, ValueError, TypeError) as error:
            raise ValueError(f"{document.where}: the tokenizer's chat template refuses this chat ({error})") from error

    def _surround(self, ids: list[int]) -> list[int]:
        # A text that spells its BOS or EOS out has it already.
        before = [] if ids[: len(self.before)] == self.before else self.before
        after = [] if self.after and ids[-len(self.after) :] == self.after else self.after
        return before + ids + after

    @property
    def bos_decision(self) -> str:
        bos = self.tokenizer.bos_token
        if set(self.seen) == {"rendered"}:
            return "as the chat template writes it: nothing is added"
        if self.before:
            said = f"BOS {_spell(self.tokenizer, self.before)} once per document: the tokenizer adds it"
        elif bos is None:
            said = "no BOS: the tokenizer has none"
        else:
            said = f"no BOS: the tokenizer has {bos} but does not add it"
        if self.after:
            said += f"; {_spell(self.tokenizer, self.after)} after each document: the tokenizer adds it"
        return said + ("; chats as their template writes them" if self.seen["rendered"] else "")

    @property
    def chat_decision(self) -> str:
        chats = self.seen["rendered"] + self.seen["joined"]
        if not chats:
            return "not used: the text is plain"
        if self.seen["rendered"]:
            return f"used: the tokenizer's own, for {chats} chats"
        reason = "switched off" if self.chat_template == "none" else "the tokenizer has none"
        return f"not used: {reason}; {chats} chats written as 'role: content'"


def _surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that `tokenizer(text)` puts before and after the text's own."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _spell(tokenizer: Any, ids: list[int]) -> str:
    return "".join(str(token) for token in tokenizer.convert_ids_to_tokens(ids))


def _sample(
    tokenizer: Any, generate: Generate | None, nsamples: int, seqlen: int, seed: int, vocab_size: int | None
) -> TokenStream:
    """`nsamples` sequences of `seqlen` tokens out of `generate`, each begun as the tokenizer begins a text."""
    if generate is None:
        raise ValueError("--data self: the model's own samples are not available here; name a text")
    before, _ = _surroundings(tokenizer)
    if not before and tokenizer.bos_token_id is not None:
        before = [tokenizer.bos_token_id]
    if before:
        prompt = torch.tensor([before[:seqlen]]).repeat(nsamples, 1)
        said = f"BOS {_spell(tokenizer, before)} once per document: sampling starts from it"
    else:
        special = set(tokenizer.all_special_ids)
        known = min(len(tokenizer), vocab_size or len(tokenizer))
        ordinary = torch.tensor([i for i in range(known) if i not in special])
        source = torch.Generator().manual_seed(seed)
        prompt = ordinary[torch.randint(len(ordinary), (nsamples, 1), generator=source)]
        said = "no BOS: the tokenizer has none, sampling starts from random tokens"
    ids = generate(prompt, seqlen - prompt.shape[1], seed).cpu()
    assert ids.shape == (nsamples, seqlen)
    order = f"sampled with seed {seed}"
    return TokenStream(ids.reshape(-1), "self", "sampled from the model", nsamples, 0, order, said, "not used: sampled")


@torch.no_grad()
def sample_self(model: Any, prompt: Tensor, new_tokens: int, seed: int, *, batch: int = 64) -> Tensor:
    """Ancestral sampling at temperature 1: `prompt [B, n]` -> ids `[B, n + new_tokens]`.

    After an end-of-text token a row begins a new document with its own prompt: earlier tokens are masked out and
    positions start at 0, as behind left padding. (Recurrent layers, which no mask reaches, carry their state over.)
    Rows are sampled `batch` at a time from a local generator: the same seed and batch give the same tokens.

    Raises ValueError when the model's logits are not finite.
    """
    device = model.get_input_embeddings().weight.device
    source = torch.Generator(device).manual_seed(seed)
    ends = torch.tensor(_end_tokens(model), dtype=torch.long, device=device)
    parts = prompt.to(device).split(batch)
    return torch.cat([_sample_rows(model, part, new_tokens, source, ends) for part in parts]).to(prompt.device)


def _sample_rows(model: Any, prompt: Tensor, new_tokens: int, source: torch.Generator, ends: Tensor) -> Tensor:
    rows, start = prompt.shape
    total = start + new_tokens
    ids = prompt.new_zeros(rows, total)
    mask = torch.ones_like(ids)
    age = prompt.new_zeros(rows)  # tokens of the row's present document
    sampled, cache = prompt[:, 0], None
    for step in range(total):
        given = prompt.gather(1, age.clamp(max=start - 1)[:, None])[:, 0]
        token = torch.where(age < start, given, sampled)
        ids[:, step] = token
        out = model(
            input_ids=token[:, None],
            attention_mask=mask[:, : step + 1],
            position_ids=age[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if not torch.isfinite(logits).all():
            raise ValueError(f"--data self: the model's logits are not finite after {step + 1} tokens")
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=source)[:, 0]
        ended = torch.isin(token, ends) & (age >= start)  # some prompts begin with the end token
        age = torch.where(ended, 0, age + 1)
        mask[:, : step + 1] *= ~ended[:, None]
    return ids


def _end_tokens(model: Any) -> list[int]:
    for settings in (getattr(model, "generation_config", None), model.config):
        ends = getattr(settings, "eos_token_id", None)
        if ends is not None:
            return list(ends) if isinstance(ends, (list, tuple)) else [ends]
    return []
