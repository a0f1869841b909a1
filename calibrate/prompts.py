"""What a model is shown while its attention is calibrated: text, and text with passkeys to be found again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, int]  # first token and the one after the last
# nouns that most tokenizers have whole: each names one passkey of a prompt
WORDS = """
    apple river stone cloud paper tiger window garden silver bridge candle forest island mirror orange pocket rocket
    summer temple violin winter basket castle dragon
"""
NAMES = WORDS.split()


@dataclass(frozen=True)
class Prompt:
    """A sequence of tokens, and where in it something is stated and asked for again."""

    ids: Tensor  # [T] int64
    kind: str  # "text" or "passkey"
    domain: str  # which text it is made of
    stated: tuple[Span, ...] = ()  # the digits of each passkey in the context
    asked: tuple[Span, ...] = ()  # the same digits as answers, in the order of `stated`; the model is to predict these

    def __len__(self) -> int:
        return self.ids.numel()


def text_prompts(ids: Tensor, lengths: Sequence[int], domain: str) -> list[Prompt]:
    """Prompts of these lengths, cut one after the other from `ids [tokens]`.

    Raises ValueError when the text is too short."""
    if sum(lengths) > ids.numel():
        raise ValueError(
            f"{domain}: has {ids.numel()} tokens, and {sum(lengths)} are needed; give more text, or lower --nsamples"
            " or --seqlen"
        )
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [Prompt(ids[end - n : end].clone(), "text", domain) for n, end in zip(lengths, ends)]


def passkey_prompt(tokenizer: Any, haystack: Tensor, length: int, domain: str, *, count: int, seed: int) -> Prompt:
    """`length` tokens (or a few fewer): `count` lines that state a passkey each, at random depths of `haystack
    [tokens]`, which goes on from its beginning where it ends; then the lines again, as questions with their answers.

    Digits only are the answer, tokenised as in the statement. Raises ValueError when `length` is too short for them.
    """
    draw = random.Random(seed)
    names = draw.sample(NAMES, count)
    lines = [_line(tokenizer, name, f"{draw.randrange(10**5):05d}") for name in names]
    spare = length - 2 * sum(len(ids) for ids, _ in lines) - 2
    if spare < 2 * count:
        raise ValueError(f"a prompt of {length} tokens has no room for {count} passkeys; take a larger --seqlen")
    opening = tokenizer.bos_token_id
    ids = [] if opening is None else [opening]
    hay = haystack.repeat(-(-spare // haystack.numel()))[:spare].tolist()
    depths = sorted(draw.sample(range(1, spare - 1), count))
    stated, last = [], 0
    for (line, digits), depth in zip(lines, depths):
        ids += hay[last:depth]
        stated.append((len(ids) + digits[0], len(ids) + digits[1]))
        ids += line
        last = depth
    ids += hay[last:]
    order = draw.sample(range(count), count)
    asked: dict[int, Span] = {}
    for index in order:
        line, digits = lines[index]
        asked[index] = (len(ids) + digits[0], len(ids) + digits[1])
        ids += line
    return Prompt(torch.tensor(ids), "passkey", domain, tuple(stated), tuple(asked[i] for i in range(count)))


def _line(tokenizer: Any, name: str, digits: str) -> tuple[list[int], Span]:
    """The tokens of one statement, and where its digits stand."""
    before = tokenizer(f"\nThe pass key of {name} is", add_special_tokens=False)["input_ids"]
    value = tokenizer(f" {digits}", add_special_tokens=False)["input_ids"]
    after = tokenizer(".\n", add_special_tokens=False)["input_ids"]
    return before + value + after, (len(before), len(before) + len(value))
