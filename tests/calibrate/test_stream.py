"""The streamed forward is transformers' own, for every family; observers see what a plain hook would see."""

from __future__ import annotations

import pytest
import torch
from acc.calibrate.stream import Stream
from acc.formats.source import open_source
from acc.kernels.base import computed_in
from transformers import AutoModelForCausalLM

FAMILIES = [
    "llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss",
]  # fmt: skip
MOE = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]


def ids(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def streamed(folder, batches, **options) -> list[torch.Tensor]:
    stream = Stream(open_source(str(folder)), **options)
    for _ in stream.blocks(batches):
        pass
    return list(stream.logits())


def ordinary(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_streamed_forward_is_the_ordinary_forward(checkpoint, family):
    """Exactly, with transformers' loop over experts. Its default for experts, one grouped product, sums in another
    order:
    there the bound is 1e-6 of the logits' scale, times the few roundings that three blocks add up."""
    folder = checkpoint(family)
    batches = [ids(), ids(1, 40, seed=1)]
    reference = ordinary(folder, **({"experts_implementation": "eager"} if family in MOE else {}))
    for batch, logits in zip(batches, streamed(folder, batches)):
        assert torch.equal(logits, reference(batch).logits)
    default = ordinary(folder)
    for batch, logits in zip(batches, streamed(folder, batches)):
        torch.testing.assert_close(logits, default(batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_left_padding_reaches_the_blocks(checkpoint, family):
    folder = checkpoint(family)
    batch, mask = ids(), torch.ones(2, 24, dtype=torch.long)
    mask[0, :7] = 0
    (logits,) = streamed(folder, [(batch, mask)])
    expected = ordinary(folder)(batch, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 10, 1000])
def test_logits_are_compared_part_by_part(checkpoint, tokens):
    batch, mask = ids(), torch.ones(2, 24, dtype=torch.long)
    mask[0, :7] = 0
    others = list(torch.randn(2, 2, 24, 64, generator=torch.Generator().manual_seed(0)))
    stream = Stream(open_source(str(checkpoint("gemma3_text"))))
    for _ in stream.blocks([(batch, mask)]):
        pass
    parts = list(stream.compared(0, others, tokens))
    (whole,) = stream.logits()
    assert all(own.shape[1] <= max(1, tokens // 2) for _, own, _ in parts)
    with stream.outer():
        for at, states in enumerate(others):
            own, other = (torch.cat(each, 1) for each in zip(*(part[1:] for part in parts if part[0] == at)))
            torch.testing.assert_close(own, whole, rtol=0, atol=1e-5)
            torch.testing.assert_close(other, stream.skeleton.logits(batch, states, mask), rtol=0, atol=1e-5)


@torch.no_grad()
def test_spilled_states_change_nothing(checkpoint, tmp_path):
    batches = [ids(), ids(seed=3)]
    plain = streamed(checkpoint("qwen3_moe"), batches)
    spilled = streamed(checkpoint("qwen3_moe"), batches, spill=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain, spilled))


@torch.no_grad()
def test_replaced_weights_are_what_later_blocks_see(checkpoint):
    folder = checkpoint("qwen3_moe")
    model = ordinary(folder, experts_implementation="eager")
    for parameter in model.model.layers.parameters():
        parameter.mul_(0.9)
    source = open_source(str(folder))
    stream = Stream(source)
    for block in stream.blocks([ids()]):
        block.replace({name: source.tensor(name) * 0.9 for name in block.names})
    (logits,) = stream.logits()
    assert torch.equal(logits, model(ids()).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hessians_are_those_of_plain_hooks(checkpoint, family):
    """Every linear and every expert: token counts, and the matrix against float64 sums of what a hook on the whole
    model
    collects; matrices with one input share one statistic."""
    folder = checkpoint(family)
    batches = [ids(), ids(seed=5)]
    model = ordinary(folder, **({"experts_implementation": "eager"} if family in MOE else {}))
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, a, n=name: seen.setdefault(n, []).append(a[0].flatten(0, -2)))
        if hasattr(module, "is_transposed"):
            module.register_forward_pre_hook(lambda m, a, n=name: seen.setdefault(n, []).append(a))
    for batch in batches:
        model(batch)
    stream = Stream(open_source(str(folder)))
    checked = 0
    for block in stream.blocks(batches):
        statistics = block.observe(block.matrices, ("hessian",))
        for matrix in block.matrices:
            hessian = statistics.of(matrix)["hessian"]
            if matrix.role == "linear":
                x = torch.cat(seen[matrix.module]).double()
            elif matrix.role == "expert_input":
                x = torch.cat([h[(i == matrix.expert).any(-1)] for h, i, _ in seen[matrix.module]]).double()
            else:
                assert hessian.tokens == statistics.of(_input_of(block, matrix))["hessian"].tokens
                continue
            assert hessian.tokens == len(x)
            expected = 2 / max(len(x), 1) * x.T @ x
            torch.testing.assert_close(hessian.value().double(), expected, rtol=1e-4, atol=1e-5)
            checked += 1
        shared = {statistics.key(m) for m in block.matrices if m.module.endswith(("q_proj", "k_proj", "v_proj"))}
        assert len(shared) <= 1 or family == "deepseek_v3"
    assert checked > 3


def _input_of(block, matrix):
    return next(
        m
        for m in block.matrices
        if m.module == matrix.module and m.expert == matrix.expert and m.role == "expert_input"
    )


@torch.no_grad()
def test_padding_is_not_counted(checkpoint):
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :10] = 0
    for family in ("llama", "qwen3_moe"):
        stream = Stream(open_source(str(checkpoint(family))))
        for block in stream.blocks([(ids(), mask)]):
            statistics = block.observe(block.matrices, ("hessian",))
            linears = [m for m in block.matrices if m.role == "linear"]
            assert {statistics.of(m)["hessian"].tokens for m in linears} == {38}
            routed = {m.expert: statistics.of(m)["hessian"].tokens for m in block.matrices if m.role == "expert_input"}
            assert not routed or sum(routed.values()) == 38 * 2


@torch.no_grad()
def test_attention_seam_sees_queries_and_changes_nothing(checkpoint):
    for family in ("llama", "gemma3_text", "gpt_oss"):
        source = open_source(str(checkpoint(family)))
        plain = streamed(checkpoint(family), [ids()])
        stream, shapes = Stream(source), []

        def see(module, q, k, v, mask, shapes=shapes, **options):
            shapes.append((q.shape, k.shape))

        with stream.skeleton.observe_attention(see):
            for _ in stream.blocks([ids()]):
                pass
            logits = list(stream.logits())
        assert torch.equal(plain[0], logits[0])
        assert shapes == [((2, 4, 24, 16), (2, 2, 24, 16))] * 3


@torch.no_grad()
def test_nothing_is_left_on_the_model(checkpoint):
    stream = Stream(open_source(str(checkpoint("mixtral"))))
    for block in stream.blocks([ids()]):
        block.observe(block.matrices, ("hessian",))
    list(stream.logits())
    for module in stream.skeleton.model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
    assert all(p.is_meta for p in stream.skeleton.model.parameters())


@torch.no_grad()
def test_blocks_run_no_more_than_needed(checkpoint):
    ticks = []
    stream = Stream(open_source(str(checkpoint("llama"))), tick=ticks.append)
    for block in stream.blocks([ids()]):
        block.observe(block.matrices, ("hessian",))
    list(stream.logits())
    assert sum(ticks) == 3 * 48
    ticks.clear()
    for _ in stream.blocks([]):
        pass
    assert not ticks


@pytest.mark.parametrize("quick", [True, False])
def test_a_type_without_instructions_is_run_in_float32(checkpoint, products, quick):
    products(quick)
    for kind in (torch.bfloat16, torch.float16):
        assert computed_in(kind, "cpu") == (kind if quick else torch.float32)
        assert computed_in(kind, "cuda:1") == kind
    assert computed_in(torch.float64, "cpu") == torch.float64
    source = open_source(str(checkpoint("llama")))
    source.dtype = torch.bfloat16
    assert Stream(source).dtype == (torch.bfloat16 if quick else torch.float32)
    assert Stream(source, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_refused_by_name(tmp_path):
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, Llama4ForCausalLM, Llama4TextConfig

    config = AutoConfig.for_model("t5", d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=64)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="t5 models are not supported"):
        Stream(open_source(str(tmp_path / "t5")))
    config = Llama4TextConfig(
        hidden_size=64, intermediate_size=32, intermediate_size_mlp=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, vocab_size=64, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(tmp_path / "llama4")
    with pytest.raises(ValueError, match=r"llama4.* models are not supported: .*experts"):
        Stream(open_source(str(tmp_path / "llama4")))
