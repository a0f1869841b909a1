"""The loop: nothing is lost, a killed run ends like one that was not, bad input ends in one line and leaves nothing
to load."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from acc.calibrate.stream import Stream
from acc.compress import apply as apply_module
from acc.compress.apply import apply
from acc.compress.recipe import Recipe
from acc.formats.model import Skeleton
from acc.formats.source import open_source
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def ids(rows: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(2))


def recipe(method: str = "spqr", **step) -> Recipe:
    return Recipe.from_dict({"steps": [{"method": method, "bits": 3, "group_size": 16, **step}]})


def run(folder, out, chosen=None, **options):
    chosen = chosen or recipe()
    return apply(chosen, open_source(str(folder)), out, [ids()] if chosen.needs else [], **options)


def hashes(folder) -> dict[str, str]:
    """sha256 of every file; the timing file aside."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.jsonl"
    }


def copy_of(folder, target, change=lambda tensors: None):
    """The checkpoint with its tensors changed."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, target / path.name, metadata={"format": "pt"})
        else:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def in_bfloat16(tensors):
    tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_the_same_run_gives_the_same_bytes(checkpoint, tmp_path, family):
    run(checkpoint(family), tmp_path / "a")
    run(checkpoint(family), tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_the_recipe_says_what_blocks_were_run_in(checkpoint, tmp_path, products):
    """So that it makes the same bytes on a processor with other instructions."""
    folder = copy_of(checkpoint("llama"), tmp_path / "model", in_bfloat16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    made = {}
    for quick, dtype in ((True, "bfloat16"), (False, "float32")):
        products(quick)
        run(folder, tmp_path / dtype)
        made[dtype] = Recipe.read(tmp_path / dtype / "recipe.yaml")
        assert made[dtype].dtype == dtype
    for dtype, again in made.items():  # both without instructions
        run(folder, tmp_path / f"{dtype} again", again)
        assert hashes(tmp_path / f"{dtype} again") == hashes(tmp_path / dtype)


def test_a_killed_run_resumes_to_the_same_bytes(checkpoint, tmp_path):
    """SIGKILL in a subprocess after the first block was journaled, then `resume`."""
    folder, out = checkpoint("qwen3_moe"), tmp_path / "killed"
    script = f"""
import sys, time, torch
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_apply as t
from acc.formats.store import Store
write = Store.write
def slow(self, unit, *rest):
    write(self, unit, *rest)
    if unit == "block 1":
        print("now", flush=True)
        time.sleep(60)
Store.write = slow
t.run(Path({str(folder)!r}), Path({str(out)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "now"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with pytest.raises(ValueError, match="resume"):
        run(folder, out)
    fractions = []
    run(folder, out, resume=True, report=lambda fraction, what: fractions.append(fraction))
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    run(folder, tmp_path / "whole")
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not out.with_name("killed.partial").exists()


def test_resume_refuses_another_recipe_source_or_text(checkpoint, tmp_path, monkeypatch):
    from acc.formats.store import Store

    write = Store.write

    def stop_after_first(self, unit, *rest):
        write(self, unit, *rest)
        if unit == "block 0":
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write", stop_after_first)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint("llama"), tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"bits.*3.*4|steps"):
        run(checkpoint("llama"), tmp_path / "out", recipe(bits=4), resume=True)
    with pytest.raises(ValueError, match="data"):
        run(checkpoint("llama"), tmp_path / "out", resume=True, text_record={"sha256": "other"})

    def nudge(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1

    with pytest.raises(ValueError, match="source"):
        run(copy_of(checkpoint("llama"), tmp_path / "other", nudge), tmp_path / "out", resume=True)
    run(checkpoint("llama"), tmp_path / "out", resume=True)


def test_every_tensor_and_file_has_its_place(checkpoint, tmp_path):
    folder = copy_of(checkpoint("mixtral"), tmp_path / "source")
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (folder / "tokenizer.json").write_bytes(b"{}")
    run(folder, tmp_path / "out")
    source, made = open_source(str(folder)), open_source(str(tmp_path / "out"))
    assert made.names() == source.names()
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == b"{{ messages }}\r\n"
    packed = set(made.entries)
    assert all("norm" not in n and "embed" not in n and "lm_head" not in n and ".gate." not in n for n in packed)
    for name in source.names():
        assert made.info(name).shape == source.info(name).shape
        if name not in packed:
            assert torch.equal(made.tensor(name), source.tensor(name))
    report = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert {r["tensor"] for r in report} == set(source.names())
    for line in report:
        if line["method"] != "kept":
            assert 0 <= line["relative_error"] < 1
            assert line["error_of"] == "output"


def test_stored_bits_are_those_of_the_file(checkpoint, tmp_path):
    run(checkpoint("llama"), tmp_path / "out")
    made = open_source(str(tmp_path / "out"))
    report = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    for line in report:
        info = made.info(line["tensor"])
        assert line["stored_bits"] == pytest.approx(8 * info.nbytes / line["parameters"], abs=1e-4)


def test_what_was_propagated_is_what_is_read_back(checkpoint, tmp_path, monkeypatch):
    """Bit for bit: the weights each later block was calibrated behind are those of the finished file."""
    from acc.calibrate.stream import Block

    seen = {}
    replace = Block.replace

    def spy(self, tensors):
        seen.update({n: t().clone() for n, t in tensors.items()})
        replace(self, tensors)

    monkeypatch.setattr(Block, "replace", spy)
    for family in ("qwen2", "gpt_oss"):
        seen.clear()
        run(checkpoint(family), tmp_path / family)
        made = open_source(str(tmp_path / family))
        assert set(seen) == set(made.entries)
        for name, tensor in seen.items():
            assert torch.equal(tensor, made.tensor(name))


def test_a_weight_is_read_when_it_is_used(checkpoint, tmp_path, monkeypatch):
    """Without calibration no block becomes a module, and with it nothing is in memory when its weights are solved."""
    loaded = set()
    load, drop, solve = Skeleton.load_block, Skeleton.drop_block, apply_module._solve_batch

    def spy_load(self, index, tensors):
        loaded.add(index)
        return load(self, index, tensors)

    def spy_drop(self, index):
        loaded.remove(index)
        drop(self, index)

    def spy_solve(*arguments):
        assert not loaded
        return solve(*arguments)

    monkeypatch.setattr(Skeleton, "load_block", spy_load)
    monkeypatch.setattr(Skeleton, "drop_block", spy_drop)
    monkeypatch.setattr(apply_module, "_solve_batch", spy_solve)
    run(checkpoint("olmoe"), tmp_path / "spqr")
    monkeypatch.setattr(apply_module, "fingerprint_of", lambda source: {})
    monkeypatch.setattr(Skeleton, "load_block", None)
    run(checkpoint("olmoe"), tmp_path / "rtn", recipe("rtn"))


def test_statistics_beyond_the_limit_wait_for_another_pass(checkpoint):
    """Every matrix is in one pass; an expert's gate and up projection, which share their input, count once."""
    chosen = recipe()
    stream = Stream(open_source(str(checkpoint("olmoe"))))
    wanted = [matrix for matrix in stream.skeleton.matrices(0) if matrix.expert is not None]
    step = dict.fromkeys((matrix.tensor for matrix in wanted), chosen.steps[0])
    one = 4 * (64**2 + 96**2)
    for limit, passes in ((4 * one, 1), (2 * one, 2), (one, 4)):
        groups = apply_module.passes(wanted, step, limit)
        assert len(groups) == passes
        assert [matrix for group in groups for matrix in group] == wanted


def test_experts_with_few_and_no_tokens_are_events(checkpoint, tmp_path):
    """Two tokens cannot reach four experts of three layers with full rank: the report says so for each."""
    chosen = recipe()
    outcome = apply(chosen, open_source(str(checkpoint("mixtral"))), tmp_path / "out", [ids(1, 2)])
    kinds = {}
    for event in outcome.events:
        kinds.setdefault(event["event"], set()).add(event["tensor"])
    assert kinds["few_tokens"]
    assert kinds["rounding"]
    assert not kinds["few_tokens"] & kinds["rounding"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(checkpoint, tmp_path, value):
    def spoil(tensors):
        tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = value

    folder = copy_of(checkpoint("llama"), tmp_path / "bad", spoil)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight: 1 of"):
        run(folder, tmp_path / "out", recipe("rtn"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"config\.json"):
        open_source(str(tmp_path / "out.partial" / "folder"))


def test_a_pattern_that_fits_nothing_names_the_nearest(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"--ignore 'dwon_proj' matches no tensor.*down_proj"):
        run(checkpoint("llama"), tmp_path / "out", recipe("rtn", ignore=["dwon_proj"]))
    assert not list(tmp_path.glob("out*"))


def test_patterns_fit_disk_and_module_names(checkpoint, tmp_path):
    run(checkpoint("mixtral"), tmp_path / "disk", recipe("rtn", targets=["*.block_sparse_moe.experts.*.w2"]))
    run(checkpoint("mixtral"), tmp_path / "module", recipe("rtn", targets=["re:mlp\\.experts\\.\\d+\\.w2"]))
    names = [set(open_source(str(tmp_path / f)).entries) for f in ("disk", "module")]
    assert names[0] == names[1]
    assert len(names[0]) == 3 * 4


def test_a_later_step_overrides_an_earlier_one(checkpoint, tmp_path):
    chosen = Recipe.from_dict(
        {
            "steps": [
                {"method": "rtn", "bits": 3, "group_size": 16},
                {"method": "rtn", "bits": 8, "targets": ["*down_proj"]},
            ]
        }
    )
    run(checkpoint("llama"), tmp_path / "out", chosen)
    made = open_source(str(tmp_path / "out"))
    bits = {n: e.scheme["bits"] for n, e in made.entries.items()}
    assert {b for n, b in bits.items() if "down_proj" in n} == {8}
    assert {b for n, b in bits.items() if "down_proj" not in n} == {3}
    again = Recipe.read(tmp_path / "out" / "recipe.yaml")
    assert again == chosen.settled(torch.float32, "cpu")


def test_extra_tensors_survive(checkpoint, tmp_path):
    """Heads that transformers does not load, e.g. for predicting several tokens, are copied, not dropped."""
    folder = copy_of(checkpoint("llama"), tmp_path / "source", lambda t: t.update({"mtp.0.weight": torch.ones(3, 5)}))
    run(folder, tmp_path / "out", recipe("rtn"))
    assert torch.equal(open_source(str(tmp_path / "out")).tensor("mtp.0.weight"), torch.ones(3, 5))


def test_progress_only_grows_and_ends(checkpoint, tmp_path):
    seen: list[float] = []
    started = time.monotonic()
    run(checkpoint("qwen3_moe"), tmp_path / "out", report=lambda fraction, what: seen.append(fraction))
    assert time.monotonic() - started < 60
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) > 10


def test_the_head_is_packed_when_named(checkpoint, tmp_path):
    import acc

    for method in ("rtn", "spqr"):
        out = tmp_path / method
        run(checkpoint("qwen3"), out, recipe(method, targets=["*", "lm_head"]))
        made = open_source(str(out))
        assert "lm_head.weight" in made.entries
        assert len(made.entries) == 3 * 7 + 1
        assert acc.load(out)(ids()).logits.isfinite().all()
    with pytest.raises(ValueError, match="'lm_head' matches no tensor"):
        run(checkpoint("llama"), tmp_path / "tied", recipe("rtn", targets=["lm_head"]))


def test_the_report_says_where_the_time_went(checkpoint, tmp_path, monkeypatch):
    from acc.calibrate.hessian import Hessian

    update = Hessian.update

    def slow(self, x):
        time.sleep(0.05)
        update(self, x)

    monkeypatch.setattr(Hessian, "update", slow)
    outcome = run(checkpoint("llama"), tmp_path / "out")
    inputs = 4 * 2  # of each block: q k v, o, gate up, down
    assert outcome.phases["statistics"] >= 0.05 * inputs
    assert outcome.phases["forward"] < 0.05 * inputs
    assert {"load", "forward", "statistics", "solve", "pack", "write"} <= outcome.phases.keys()
    assert sum(outcome.phases.values()) == pytest.approx(outcome.seconds, abs=0.5)
    timing = [json.loads(line) for line in (tmp_path / "out" / "timing.jsonl").read_text().splitlines()]
    assert sum(line.get("phases", {}).get("statistics", 0) for line in timing) >= 0.05 * inputs - 0.001
