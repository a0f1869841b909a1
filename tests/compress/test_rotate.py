"""Rotation: the logits stay where they are, or the family is refused with the reason; and what lies on disk agrees."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from acc.calibrate.stream import Stream
from acc.compress.apply import apply
from acc.compress.recipe import Recipe
from acc.compress.rotate import Rotate
from acc.formats.source import open_source
from acc.registry import listing, lookup
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEN = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]
COMMON = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64}
OTHERS: dict[str, dict] = {
    "mistral": {"sliding_window": None},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "mlp_bias": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "gemma": {},
    "gemma2": {},
    "olmo2": {},
    "olmo3": {},
    "starcoder2": {},
}
ONLY_HEADS = ["gemma3_text", "gemma2", "olmo2", "olmo3", "starcoder2"]
PARTS = {"residual": {"heads": False}, "heads": {"residual": False}, "all": {}}


class Wide(TorchFunctionMode):
    """Norms, softmaxes and routers that ask for fp32 get fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.view:  # reinterprets bytes
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            return args[0].double()
        wide = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        return func(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})


def logits(source) -> torch.Tensor:
    stream = Stream(source, dtype=torch.float64)
    with Wide():
        for _ in stream.blocks([ids(2, 24)]):
            pass
        return next(iter(stream.logits()))


def ids(rows: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """`other("gemma")` -> a tiny checkpoint of a family that the other tests do without; hidden size 48 = 12 x 4."""

    def make(family: str) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(COMMON | OTHERS[family])))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape) + (parameter.dim() == 1))
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return folder

    return make


EXACT = [(family, part) for family in [*TEN, *OTHERS] for part in PARTS if part == "heads" or family not in ONLY_HEADS]


@pytest.mark.parametrize(("family", "part"), EXACT)
def test_the_logits_stay(checkpoint, other, family, part):
    source = open_source(str(checkpoint(family) if family in TEN else other(family)))
    rotate = Rotate(**PARTS[part])
    rotated = rotate.rewrite(source, torch.float64)
    before, after = logits(source), logits(rotated)
    assert before.dtype == torch.float64
    assert (after - before).abs().max() < 1e-12 * before.abs().max()
    moved = {n for n in source.names() if not torch.allclose(rotated.tensor(n), source.tensor(n).double(), rtol=1e-3)}
    assert any("o_proj.weight" in name for name in moved)
    assert ("model.embed_tokens.weight" in moved) == rotate.residual
    assert rotate.prove(source) < 1e-5


@pytest.mark.parametrize("family", ONLY_HEADS)
def test_where_the_logits_would_not_stay_the_family_is_refused(checkpoint, other, family):
    source = open_source(str(checkpoint(family) if family in TEN else other(family)))
    with pytest.raises(ValueError, match=rf"{family}: the residual stream cannot be rotated: .*; rotate only the"):
        Rotate().rewrite(source)


@pytest.mark.parametrize("name", listing("compress", "Rewrite"))
def test_every_rewrite_keeps_names_shapes_and_types(checkpoint, name):
    source = open_source(str(checkpoint("gpt_oss")))
    made = lookup("compress", name)().rewrite(source)
    again = lookup("compress", name)().rewrite(source)
    assert set(source.names()) <= set(made.names())
    assert made.identity() == source.identity()
    for tensor in made.names():
        found, info = made.tensor(tensor), made.info(tensor)
        assert (tuple(found.shape), found.dtype, found.nbytes) == (info.shape, info.dtype, info.nbytes)
        assert torch.equal(found, again.tensor(tensor))


def test_tensors_in_pieces_are_the_whole(checkpoint, monkeypatch):
    module = sys.modules[Rotate.__module__]
    source = open_source(str(checkpoint("gpt_oss")))
    whole = Rotate().rewrite(source)
    found = {name: whole.tensor(name) for name in whole.names()}
    monkeypatch.setattr(module, "CHUNK", 1000)
    for name, tensor in found.items():
        assert torch.equal(whole.tensor(name), tensor)


def test_another_seed_is_another_basis(checkpoint):
    source = open_source(str(checkpoint("llama")))
    name = "model.layers.1.mlp.up_proj.weight"
    one, same, two = (Rotate(seed=seed).rewrite(source).tensor(name) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, two)


def recipe(rotate: dict | None, *methods: dict) -> Recipe:
    steps = [{"method": "rotate", **rotate}] if rotate is not None else []
    return Recipe.from_dict({"steps": [*steps, *methods]})


SPQR = {"method": "spqr", "bits": 3, "group_size": 16}
RTN8 = {"method": "rtn", "bits": 8, "group_size": 16}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_rotated_and_packed_the_model_is_still_itself(checkpoint, tmp_path, family):
    """In stock transformers, at 8 bits: a basis that some part does not share would leave nothing of the logits. The
    median of positions, as rounding lets some choose another expert."""
    import acc

    apply(recipe({}, RTN8), open_source(str(checkpoint(family))), tmp_path / "out", [])
    before = AutoModelForCausalLM.from_pretrained(checkpoint(family))(ids()).logits
    after = acc.load(tmp_path / "out")(ids()).logits
    assert ((after - before).norm(dim=-1) / before.norm(dim=-1)).median() < 0.1


@torch.no_grad()
def test_the_demo_model_rotated_and_packed(tmp_path):
    """In bf16, where the rotated weights are rounded once more: about as far off as without rotation."""
    import acc

    source, apart = open_source("demo"), {}
    words = AutoTokenizer.from_pretrained(source.folder)((source.folder / "README.md").read_text())["input_ids"]
    batch = torch.tensor(words[:1024]).view(4, 256)
    before = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)(batch[:2]).logits
    for name, rotate in {"plain": None, "rotated": {}}.items():
        apply(recipe(rotate, {"method": "spqr", "bits": 4}), source, tmp_path / name, [batch])
        after = acc.load(tmp_path / name, dtype=torch.float32)(batch[:2]).logits
        apart[name] = float(((after - before).norm(dim=-1) / before.norm(dim=-1)).median())
    assert apart["rotated"] < min(0.15, 1.5 * apart["plain"])


@torch.no_grad()
def test_a_tied_head_is_untied_everywhere(checkpoint, tmp_path):
    import acc
    from acc.formats.engine import export

    source = open_source(str(checkpoint("llama")))
    outcome = apply(recipe({}, SPQR), source, tmp_path / "out", [ids()])
    made = open_source(str(tmp_path / "out"))
    assert made.config["tie_word_embeddings"] is False
    assert made.names() == ["lm_head.weight", *source.names()]
    size = made.info("lm_head.weight").nbytes
    event = {"tensor": "lm_head.weight", "event": "untied", "from": "model.embed_tokens.weight", "bytes": size}
    assert event in outcome.events
    lines = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert {line["tensor"] for line in lines} == set(made.names())
    assert "- untied: 1" in (tmp_path / "out" / "README.md").read_text()
    packed = acc.load(tmp_path / "out")(ids()).logits
    (tmp_path / "dense").mkdir()
    export(made, tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.lm_head.weight is not dense.model.embed_tokens.weight
    torch.testing.assert_close(dense(ids()).logits, packed, rtol=0, atol=1e-4)


def test_heads_alone_leave_the_head_tied(checkpoint, tmp_path):
    source = open_source(str(checkpoint("llama")))
    apply(recipe({"residual": False}, SPQR), source, tmp_path / "out", [ids()])
    made = open_source(str(tmp_path / "out"))
    assert made.names() == source.names()
    assert made.config["tie_word_embeddings"] is True
    for name in source.names():
        if name not in made.entries:
            assert torch.equal(made.tensor(name), source.tensor(name))


def test_the_untied_head_can_be_packed(checkpoint, tmp_path):
    chosen = recipe({}, {**RTN8, "targets": ["*", "lm_head"]})
    outcome = apply(chosen, open_source(str(checkpoint("llama"))), tmp_path / "out", [])
    assert "lm_head.weight" in open_source(str(tmp_path / "out")).entries
    assert any(event.get("event") == "untied" for event in outcome.events)


@torch.no_grad()
def test_without_a_method_the_output_is_a_plain_checkpoint(checkpoint, tmp_path):
    apply(recipe({}), open_source(str(checkpoint("mixtral"))), tmp_path / "out", [])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = (
        AutoModelForCausalLM.from_pretrained(f)(ids()).logits for f in (checkpoint("mixtral"), tmp_path / "out")
    )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing is packed" in card
    assert "import acc" not in card


def test_recipe_round_trip_and_resume(checkpoint, tmp_path, monkeypatch):
    from acc.formats.store import Store

    source, chosen = open_source(str(checkpoint("llama"))), recipe({"heads": False, "seed": 5}, SPQR)
    apply(chosen, source, tmp_path / "whole", [ids()])
    assert Recipe.read(tmp_path / "whole" / "recipe.yaml") == chosen.settled(source.dtype, "cpu")
    write = Store.write

    def stop_after_first(self, unit, *rest):
        write(self, unit, *rest)
        if unit == "block 0":
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write", stop_after_first)
    with pytest.raises(KeyboardInterrupt):
        apply(chosen, source, tmp_path / "out", [ids()])
    monkeypatch.undo()
    for different in (recipe({"heads": False, "seed": 6}, SPQR), recipe(None, SPQR)):
        with pytest.raises(ValueError, match="steps"):
            apply(different, source, tmp_path / "out", [ids()], resume=True)
    apply(chosen, source, tmp_path / "out", [ids()], resume=True)
    for path in (tmp_path / "whole").iterdir():
        if path.name != "timing.jsonl":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"method": "rotate", "residual": False, "heads": False}], "nothing would be rotated"),
        ([{"method": "rotate", "head": True}, SPQR], "there is no option 'head'; there is heads"),
        ([{"method": "rotate", "targets": ["*"]}, SPQR], "there is no option 'targets'"),
        ([SPQR, {"method": "rotate"}], "steps.1: rotate changes the whole model, so it stands before every method"),
        ([], "a recipe needs one or more"),
    ],
)
def test_wrong_recipes_are_one_line(steps, said):
    with pytest.raises(ValueError, match=r"^recipe: ") as error:
        Recipe.from_dict({"steps": steps})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_rotation_is_found_before_anything_is_packed(checkpoint, tmp_path, monkeypatch):
    """A router that were forgotten, say: the table of families is not believed, the logits are."""
    module = sys.modules[Rotate.__module__]
    reads = {pattern: norm for pattern, norm in module.READS.items() if "router" not in pattern}
    monkeypatch.setattr(module, "READS", reads)
    monkeypatch.setattr(module, "APART", module.APART + r"|mlp\.gate\.weight")
    with pytest.raises(ValueError, match=r"mixtral: rotate does not leave this model as it is: its logits move by \d"):
        apply(recipe({}, RTN8), open_source(str(checkpoint("mixtral"))), tmp_path / "out", [])
    assert not list(tmp_path.glob("out*"))


def test_what_is_unknown_is_refused(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "more").mkdir()
    for path in Path(checkpoint("llama")).iterdir():
        (tmp_path / "more" / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "more" / "model.safetensors"
    known = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # as old files have it
    save_file(known, file, metadata={"format": "pt"})
    Rotate().rewrite(open_source(str(tmp_path / "more")))
    save_file(known | {"mtp.0.weight": torch.ones(3, 64)}, file, metadata={"format": "pt"})
    source = open_source(str(tmp_path / "more"))
    with pytest.raises(ValueError, match=r"llama: .*mtp\.0\.weight is no part of the model"):
        Rotate().rewrite(source)
    assert torch.equal(Rotate(residual=False).rewrite(source).tensor("mtp.0.weight"), torch.ones(3, 64))


@pytest.mark.parametrize(("family", "reason"), [("gpt_neox", "subtract the mean"), ("cohere2", "it is exact for")])
def test_unknown_families_are_refused_by_name(tmp_path, family, reason):
    config = {**COMMON, "num_key_value_heads": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).save_pretrained(tmp_path / family)
    with pytest.raises(ValueError, match=rf"{family} models cannot be rotated: .*{reason}"):
        Rotate().rewrite(open_source(str(tmp_path / family)))


def test_values_that_are_clipped_are_refused(checkpoint, tmp_path):
    (tmp_path / "clip").mkdir()
    for path in Path(checkpoint("olmoe")).iterdir():
        (tmp_path / "clip" / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config | {"clip_qkv": 8.0}))
    source = open_source(str(tmp_path / "clip"))
    with pytest.raises(ValueError, match="olmoe: heads cannot be rotated: this model clips"):
        Rotate().rewrite(source)
    Rotate(heads=False).prove(source)
