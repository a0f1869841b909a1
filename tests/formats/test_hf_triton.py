"""Packed models on the Triton kernels: one launch for what shares an input, one per projection of all experts."""

from __future__ import annotations

import copy

import acc
import pytest
import torch
from acc.formats import model as streaming
from acc.formats.hf import PackedExperts, choose_kernels, packed_weights, resident
from acc.formats.source import open_source
from acc.kernels import launch_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = ["rtn", "spqr"]
QUICK = {"bits": 4, "group_size": 32}  # what takes the interpreter the least
# matrices per launch, and whether they are experts: attention, then the rest of the first block
ATTENTION = [(3, False), (1, False)]
LAUNCHES = {
    "llama": [*ATTENTION, (2, False), (1, False)],
    "qwen2": [*ATTENTION, (2, False), (1, False)],
    "mixtral": [*ATTENTION, *[(1, True)] * 3],  # gate, up and down are stored one by one
    "qwen3_moe": [*ATTENTION, *[(1, True)] * 3],
    "gpt_oss": [*ATTENTION, *[(1, True)] * 2],  # gate and up are one matrix
}
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


def ids(length: int = 3) -> torch.Tensor:
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(1), device="cpu").to(DEVICE)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """(matrices, whether they are experts) of each launch so far. The kernels are Triton's."""
    seen, launch = [], launch_triton._launch

    def count(x, out, ends, weights, numbers):
        seen.append((len(weights.codes), ends is not None))
        launch(x, out, ends, weights, numbers)

    monkeypatch.setattr(launch_triton, "_launch", count)
    monkeypatch.setenv("ACC_KERNELS", "triton")
    return seen


def load(folder, blocks=1):
    """The model with its first blocks alone: the interpreter is slow."""
    model = acc.load(folder, dtype=torch.float32, device_map=DEVICE)
    del model.model.layers[blocks:]
    for module in model.modules():  # mapped from a file, an empty tensor has its neighbour's address, and the
        for name, buffer in module._buffers.items():  # interpreter tells tensors apart by their addresses
            module._buffers[name] = None if buffer is None else buffer.clone()
    return model


def reference(model, monkeypatch):
    """The logits by the torch definitions."""
    with monkeypatch.context() as context:
        context.setenv("ACC_KERNELS", "reference")
        choose_kernels(model)
        logits = model(ids()).logits
    choose_kernels(model)
    return logits


@pytest.mark.parametrize(
    ("family", "method"), [*((family, "rtn") for family in LAUNCHES), ("llama", "spqr"), ("gpt_oss", "spqr")]
)
@torch.no_grad()
def test_logits_and_number_of_launches(packed, monkeypatch, launches, family, method):
    model = load(packed(family, method, **QUICK))
    expected = reference(model, monkeypatch)
    assert launches == []
    first = model(ids()).logits
    launches.clear()
    second = model(ids()).logits
    assert launches == LAUNCHES[family]
    torch.testing.assert_close(first, expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(second, expected, rtol=0, atol=3e-5)


def first_experts(model):
    return next(module for module in model.modules() if isinstance(module, PackedExperts))


def runner(family):
    """What runs the part of a model that this is about, `model -> result`: all experts of a block, or q, k and v."""

    def experts(model):
        return first_experts(model)(*routed(tokens=1))

    def attention(model):
        x, block = routed(tokens=1)[0].to(model.dtype), model.model.layers[0].self_attn
        return torch.cat([projection(x) for projection in (block.q_proj, block.k_proj, block.v_proj)], dim=-1)

    return attention if family == "llama" else experts


def routed(tokens):
    """Hidden states, two of four experts for each, their weights; where there are many, some slots have none."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, 64, generator=generator)
    index = torch.randint(0, 5 if tokens > 2 else 4, (tokens, 2), generator=generator)
    return hidden.to(DEVICE), index.to(DEVICE), torch.rand(tokens, 2, generator=generator).to(DEVICE)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
@torch.no_grad()
def test_what_is_saved_after_a_forward_is_what_was_loaded(packed, tmp_path, launches, family):
    folder = packed(family, "spqr", **QUICK)
    model = load(folder, blocks=3)
    bytes_ = resident(model)[0]
    runner(family)(model)
    assert launches
    assert resident(model)[0] == bytes_
    model.save_pretrained(tmp_path / "again")
    first, again = open_source(folder), open_source(tmp_path / "again")
    assert first.raw_names() == again.raw_names()
    for name in first.raw_names():
        assert torch.equal(first.raw(name), again.raw(name)), name


@pytest.mark.parametrize("family", ["llama", *MIXTURES])
@torch.no_grad()
def test_a_model_that_has_run_can_be_copied_loaded_anew_and_cast(packed, family):
    model, run = load(packed(family, "spqr", **QUICK)), runner(family)
    expected, twin = run(model), copy.deepcopy(model)
    zeros = {name: torch.zeros_like(b) for name, b in model.state_dict().items() if name.endswith("outlier_value")}
    model.load_state_dict(zeros, strict=False)
    assert not torch.allclose(run(model), expected, atol=1e-3)
    assert torch.equal(run(twin), expected)
    model.load_state_dict(twin.state_dict(), assign=True)
    run(model)
    assert torch.equal(run(model), expected)
    stored = [weight.tensors() for weight in packed_weights(model)]
    model.to(torch.bfloat16)
    for before, after in zip(stored, packed_weights(model), strict=True):
        for suffix, tensor in after.tensors().items():
            assert tensor.dtype == before[suffix].dtype
            assert torch.equal(tensor, before[suffix])
    if family == "gpt_oss":  # its biases were cast, too
        model.to(torch.float32)
    assert torch.isfinite(run(model)).all()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_pieces_lie_in_one_memory_once_they_have_run(packed, method):
    model = load(packed("mixtral", method, **QUICK))
    module, run = first_experts(model), runner("mixtral")
    seen = []
    for _ in range(2):
        run(model)
        pieces = [[module._pieces["gate_up_proj", expert][place] for expert in range(4)] for place in range(2)]
        seen.append([{p.get_buffer("weight").untyped_storage().data_ptr() for p in place} for place in pieces])
        assert [len(memories) for memories in seen[-1]] == [1, 1]
        model.to(torch.float64)
        model.to(torch.float32)
    assert seen[0] == seen[1]  # not copied again
    memory = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in module.buffers() if b.numel()}
    assert sum(memory.values()) == sum(b.numel() * b.element_size() for b in module.buffers())
    for weight in packed_weights(model):
        weight.check()


@pytest.fixture
def experts(packed):
    """`experts(family, ...)` -> the experts of its first block that has any."""

    def make(family, method="rtn", **step):
        return first_experts(load(packed(family, method, **QUICK, **step)))

    return make


@pytest.mark.parametrize(("family", "method"), [*((family, "rtn") for family in MIXTURES), ("mixtral", "spqr")])
@torch.no_grad()
def test_all_experts_at_once_are_the_experts_one_by_one(experts, launches, family, method):
    module = experts(family, method)
    case = routed(tokens=5)
    assert (case[1] == module.num_experts).any()
    y = module(*case)
    assert launches == LAUNCHES[family][2:]
    assert torch.equal(y, module(*case))
    expected = streaming.run_experts(module._original[0], module.project, *case)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    launches.clear()
    nobody = torch.full_like(case[1], 4)
    assert torch.equal(module(case[0], nobody, case[2]), torch.zeros_like(case[0]))
    empty = [part[:0] for part in case]
    assert module(*empty).shape == (0, 64)


@torch.no_grad()
def test_a_norm_after_the_experts_is_applied(experts, monkeypatch):
    module = experts("gpt_oss")
    case, plain = routed(tokens=1), module(*routed(tokens=1))
    monkeypatch.setattr(module._original[0], "has_post_expert_norm", True)
    module._original[0].post_expert_norm = torch.nn.Tanh()
    expected = streaming.run_experts(module._original[0], module.project, *case)
    torch.testing.assert_close(module(*case), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)


@torch.no_grad()
def test_observers_are_told_what_each_expert_sees(experts, launches, monkeypatch):
    module, seen = experts("mixtral"), []
    case = routed(tokens=2)
    expected = module(*case)
    monkeypatch.setattr(streaming, "_EXPERT_OBSERVERS", [lambda module, expert, *_: seen.append(expert)])
    torch.testing.assert_close(module(*case), expected, rtol=1e-5, atol=1e-5)
    assert set(seen) == set(case[1].flatten().tolist())


@pytest.mark.parametrize("ignore", ["*.experts.2.*", "re:experts\\.0\\..*w1", "*w2*"])
@torch.no_grad()
def test_partly_packed_experts_go_one_by_one(experts, launches, ignore):
    module = experts("mixtral", ignore=[ignore])
    case = routed(tokens=1)
    y = module(*case)
    assert launches
    assert not any(together for _, together in launches)
    torch.testing.assert_close(
        y, streaming.run_experts(module._original[0], module.project, *case), rtol=1e-6, atol=1e-6
    )


@torch.no_grad()
def test_on_the_cpu_as_it_comes_experts_go_one_by_one(experts, launches, monkeypatch):
    module = experts("mixtral").cpu()
    case = [part.cpu() for part in routed(tokens=1)]
    pieces = [piece.get_buffer("weight").data_ptr() for pieces in module._pieces.values() for piece in pieces]
    for forced in ("reference", "cache", "compiled", ""):
        monkeypatch.setenv("ACC_KERNELS", forced)
        choose_kernels(module)
        module(*case)
    assert launches == []
    assert pieces == [p.get_buffer("weight").data_ptr() for pieces in module._pieces.values() for p in pieces]


@torch.no_grad()
def test_a_model_compiles_as_one_graph(packed, launches):
    model = load(packed("llama", "rtn", **QUICK))
    expected = model(ids(), use_cache=False).logits
    launches.clear()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(ids(), use_cache=False).logits
    assert launches == LAUNCHES["llama"]
    torch.testing.assert_close(y, expected, rtol=0, atol=3e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_experts_compile_as_one_graph(experts, launches):
    module, case = experts("mixtral"), routed(tokens=1)
    expected = module(*case)
    launches.clear()
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(*case)
    assert launches == LAUNCHES["mixtral"][2:]
    assert torch.equal(y, expected)
    torch._dynamo.reset()


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("family", LAUNCHES)
@torch.no_grad()
def test_cuda_graph(packed, family):
    model, x = load(packed(family, "spqr", **QUICK)), ids()
    for _ in range(2):
        model(x, use_cache=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(x, use_cache=False).logits
    x.copy_(x.flip(1))
    graph.replay()
    assert torch.equal(logits, model(x, use_cache=False).logits)
