"""Passkeys: one run over all questions answers as greedy generation would."""

from __future__ import annotations

import pytest
import torch
from acc.calibrate.passkeys import answer, passkeys, prompts_of
from acc.formats.source import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards boil green tea and count the stars "


@pytest.fixture(scope="module")
def demo():
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def asked(demo):
    return prompts_of(demo[1], demo[1](WORDS * 20, return_tensors="pt")["input_ids"][0], 460, 11, domain="x", seed=3)


def test_so_many_passkeys_as_asked_for(asked):
    assert [len(prompt.asked) for prompt in asked] == [8, 3]
    assert all(400 < len(prompt) <= 460 for prompt in asked)
    assert not torch.equal(asked[0].ids[:50], asked[1].ids[:50])


def test_the_answers_are_those_of_greedy_generation(demo, asked):
    model, _ = demo
    right = []
    for start, stop in sorted(asked[0].asked):
        prompt = asked[0].ids[None, :start]
        settings = {"max_new_tokens": stop - start, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        right.append(torch.equal(written[0, start:], asked[0].ids[start:stop]))
    assert answer(model, asked[0]) == right
    assert any(right)


def test_a_model_that_knows_nothing_answers_nothing(demo, asked):
    model, _ = demo
    last = model.model.layers[1].self_attn.o_proj.weight
    before = last.detach().clone()
    try:
        last.data.zero_()  # the layer that copies
        found = passkeys(model, asked)
    finally:
        last.data.copy_(before)
    assert found["passkeys"] == 11
    assert found["accuracy"] == 0
    assert found["accuracy_stderr"] == 0


def test_the_share_and_its_error(asked, monkeypatch):
    answers = iter([[True] * 6 + [False] * 2, [True, False, True]])
    monkeypatch.setattr("acc.calibrate.passkeys.answer", lambda model, prompt, cache: next(answers))
    found = passkeys(None, asked)
    assert found["accuracy"] == 8 / 11
    sample = torch.tensor([1.0] * 8 + [0.0] * 3, dtype=torch.float64)
    assert found["accuracy_stderr"] == pytest.approx(float(sample.std() / 11**0.5))
