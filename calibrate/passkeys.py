"""Whether a model finds again what stands somewhere in a long text: passkeys, asked for by greedy generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .prompts import Prompt, passkey_prompt

PER_PROMPT = 8  # passkeys that one prompt states


def prompts_of(tokenizer: Any, text: Tensor, length: int, count: int, *, domain: str, seed: int) -> list[Prompt]:
    """Prompts of `length` tokens that ask for `count` passkeys together, each from another part of `text [tokens]`."""
    prompts = []
    for number, first in enumerate(range(0, count, PER_PROMPT)):
        here = text.roll(-number * length)
        keys = min(PER_PROMPT, count - first)
        prompts.append(passkey_prompt(tokenizer, here, length, domain, count=keys, seed=seed + number))
    return prompts


@torch.no_grad()
def answer(model: Any, prompt: Prompt, cache: Any = None) -> list[bool]:
    """Whether the model answers each question of the prompt right, in the order in which they are asked.

    The text up to the first answer is read at once, everything after it token by token. Each question follows the
    earlier ones with their right answers. What the model would write greedily is right as a whole just when each digit
    is the likeliest one after the right digits before it, so these are fed, and one run asks all questions.
    `cache`: an empty cache to be used; None for the model's own.
    """
    ids = prompt.ids.to(model.device)[None]
    asked = sorted(prompt.asked)
    first, last = asked[0][0], asked[-1][1]
    right = torch.zeros(last, dtype=torch.bool)
    out = model(ids[:, :first], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for place in range(first, last):
        right[place] = bool(out.logits[0, -1].argmax() == ids[0, place])
        if place + 1 < last:
            out = model(ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
    return [bool(right[start:stop].all()) for start, stop in asked]


def passkeys(
    model: Any,
    prompts: Sequence[Prompt],
    new_cache: Callable[[], Any] = lambda: None,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> dict[str, Any]:
    """The share of passkeys that are answered right, over all prompts; `new_cache` makes a cache for each.

    `accuracy_stderr` is the standard error of the share; None for a single passkey. JSON-simple.
    """
    found: list[bool] = []
    for number, prompt in enumerate(prompts):
        found += answer(model, prompt, new_cache())
        progress((number + 1) / len(prompts), f"prompt {number + 1}")
    share = sum(found) / len(found)
    error = math.sqrt(share * (1 - share) / (len(found) - 1)) if len(found) > 1 else None
    return {
        "passkeys": len(found),
        "accuracy": share,
        "accuracy_stderr": error,
        "prompts": len(prompts),
        "seqlen": max(len(prompt) for prompt in prompts),
    }
