"""The stream over prompts: what a learner sees, which layers are left alone, and that a killed run goes on."""

import pytest
import torch
from acc.calibrate.attention import learn
from acc.calibrate.base import Learned, Learner, Pass
from acc.calibrate.prompts import Prompt
from acc.formats.calibration import Journal
from acc.formats.source import open_source

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [Prompt(torch.randint(3, 128, (n,), generator=GENERATOR), "text", "random") for n in (12, 7, 20)]


class Outputs(Learner):
    """The attention's own output, computed anew from what is seen, and projected."""

    def __init__(self, layer):
        self.layer, self.found = layer, []

    def see(self, attended):
        group = len(attended.query) // len(attended.key)
        key = attended.key.repeat_interleave(group, 0)
        scores = attended.scaling * attended.query @ key.transpose(1, 2)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        mixed = scores.softmax(-1) @ attended.value.repeat_interleave(group, 0)
        self.found.append(mixed.transpose(0, 1).flatten(1) @ attended.projection.T)

    def result(self):
        return {str(i): out for i, out in enumerate(self.found)}


class Recompute(Pass):
    def learner(self, layer):
        return Outputs(layer)

    def conclude(self, subject, found):
        return Learned({f"{i}.{k}": t for i, of in found.items() for k, t in of.items()}, {"layers": sorted(found)})


Recompute.__module__ = "acc.calibrate.recompute"


def run(folder, tmp_path, **options):
    source = open_source(folder)
    journal = Journal(tmp_path / "out", {"x": 1}, **options)
    return learn(source, [Recompute()], PROMPTS, journal, dtype=torch.float32)["recompute"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "mixtral"])
def test_a_learner_sees_what_attention_computes_with(checkpoint, tmp_path, family):
    from transformers import AutoModelForCausalLM

    folder = checkpoint(family)
    learned = run(folder, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_hook(lambda m, a, out, i=index: seen.__setitem__(i, out[0]))
    for number, prompt in enumerate(PROMPTS):
        model(prompt.ids[None])
        for index, out in seen.items():
            if model.config.model_type != "phi3" and layer.self_attn.o_proj.bias is not None:
                out = out - model.model.layers[index].self_attn.o_proj.bias
            torch.testing.assert_close(learned.tensors[f"{index}.{number}"], out, rtol=1e-3, atol=1e-5)


def test_a_sliding_layer_is_left_alone_and_says_so(checkpoint, tmp_path):
    from acc.calibrate.stream import Stream

    folder = checkpoint("gemma3_text")
    assert run(folder, tmp_path).summary == {"layers": [1]}
    refused = [layer.refused for layer in Stream(open_source(folder)).skeleton.attention_layers()]
    assert refused[1] is None
    assert refused[0] == refused[2] == "sliding attention over 8 tokens, sparse already"


@pytest.mark.parametrize(
    ("family", "reason"), [("deepseek_v3", "multi-head latent attention"), ("gpt_oss", "sliding attention over 8")]
)
def test_a_family_without_an_open_layer_is_refused_by_name(checkpoint, tmp_path, family, reason):
    with pytest.raises(ValueError, match=f"{family} models cannot be calibrated: every layer has {reason}"):
        run(checkpoint(family), tmp_path)


def test_a_killed_run_goes_on_and_ends_the_same(checkpoint, tmp_path, monkeypatch):
    folder = checkpoint("llama")
    whole = run(folder, tmp_path / "whole").tensors
    write, written = Journal.write, []

    def dies(self, layer, found):
        if layer == 1:
            raise KeyboardInterrupt
        write(self, layer, found)

    monkeypatch.setattr(Journal, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path)
    monkeypatch.setattr(Journal, "write", lambda self, layer, found: (written.append(layer), write(self, layer, found)))
    again = run(folder, tmp_path, resume=True).tensors
    assert written == [1, 2]
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_progress_goes_from_nothing_to_all_in_every_step(checkpoint, tmp_path):
    """Also when a run goes on: the layers that are known, then the others, then the pass, each from 0 to 1."""

    class Slow(Recompute):
        def conclude(self, subject, found):
            subject.tick(0.5)
            return super().conclude(subject, found)

    Slow.__module__ = "acc.calibrate.slow"
    source, told = open_source(checkpoint("llama")), []

    def told_by(**options):
        told.clear()
        journal = Journal(tmp_path / "out", {}, **options)
        learn(source, [Slow()], PROMPTS, journal, progress=lambda share, what: told.append((share, what)))
        return [(round(share, 6), what) for share, what in told]

    tokens = [len(prompt) for prompt in PROMPTS]
    shares = [sum(tokens[:n]) / sum(tokens) for n in (1, 2, 3)]
    whole = told_by()
    assert whole[-2:] == [(0.0, "2/2 slow"), (0.5, "2/2 slow")]
    layers = whole[:-2]
    assert [share for share, _ in layers] == [round((n + s) / 3, 6) for n in range(3) for s in shares]
    assert [what for _, what in layers][::3] == [f"1/2 layer {n} of 3" for n in (1, 2, 3)]
    (tmp_path / "out.partial" / "layer-00002.safetensors").unlink()
    again = told_by(resume=True)
    steps = [what.partition(" ")[0] for _, what in again]
    assert list(dict.fromkeys(steps)) == ["1/3", "2/3", "3/3"]
    assert [share for share, what in again if what.startswith("2/3")] == [0.0, *(round(s, 6) for s in shares)]
    for step in ("1/3", "2/3"):
        found = [share for share, what in again if what.startswith(step)]
        assert found == sorted(found)
        assert all(0 <= share <= 1 for share in found)
