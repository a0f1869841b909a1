"""Text to tokens: packing, special tokens, chats, bad input, hub data sets, samples of the model."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import random
import struct

import pytest
import torch
from acc.calibrate import documents
from acc.calibrate.text import load_text, load_tokens, sample_self
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "dog",
    "came",
    "by",
    "while",
    "rain",
    "fell",
    "over",
    "hills",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }} {{ eos_token }}{% endfor %}"
)


def prose(words: int, seed: int = 0) -> str:
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) for _ in range(words))


def make_tokenizer(bos: str | None = "<s>", adds: str = "$A", template: str | None = None, **options):
    """A byte-level BPE tokenizer; `adds` is what it puts around a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "[g]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([prose(500)], trainer)
    specials = [(t, core.token_to_id(t)) for t in ("<s>", "</s>", "[g]")]
    core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token="</s>", chat_template=template, **options
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(adds="<s> $A")


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes | list) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


@pytest.mark.parametrize(("nsamples", "seqlen"), [(1, 1), (3, 7), (5, 64), (1, 200)])
def test_a_text_file_is_tokenised_once_and_cut_from_the_start(tokenizer, write, nsamples, seqlen):
    text = prose(400) + "\r\n\n" + prose(50, 1)
    expected = tokenizer(text)["input_ids"]
    made = load_text(write("a.txt", text), tokenizer, nsamples=nsamples, seqlen=seqlen, seed=3)
    assert made.batches.shape == (nsamples, seqlen)
    assert made.batches.dtype == torch.int64
    assert made.batches.flatten().tolist() == expected[: nsamples * seqlen]
    assert made.tokens + made.tokens_left == len(expected)
    assert made.notes == ()


def test_hash_and_record(tokenizer, write):
    spec = write("a.txt", prose(300))
    made = load_text(spec, tokenizer, nsamples=4, seqlen=32, seed=5)
    ids = made.batches.flatten().tolist()
    record = json.loads(json.dumps(made.record(), allow_nan=False))
    assert record["sha256"] == made.sha256 == hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).hexdigest()
    assert record["tokens"] == 128
    assert (record["data"], record["nsamples"], record["seqlen"], record["seed"]) == (spec, 4, 32, 5)
    assert record["documents"] == 1
    assert record["tokens_left"] == made.tokens_left > 0
    assert made.first_sample == tokenizer.decode(ids[:32])
    assert made.first_sample.startswith(record["first_sample"])
    assert record["order"] == "as written"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_documents_are_packed_without_gaps_or_losses(tokenizer, write, seed):
    texts = [f"{prose(3 + i, i)} {i}." for i in range(600)]  # more than one call of the tokenizer
    spec = write("a.jsonl", [{"text": t} for t in texts])
    encoded = {tuple(tokenizer(t)["input_ids"]) for t in texts}
    stream = load_tokens(spec, tokenizer, seed=seed)
    bos = tokenizer.bos_token_id
    starts = [i for i, token in enumerate(stream.ids.tolist()) if token == bos] + [stream.tokens]
    found = [tuple(stream.ids[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    assert len(found) == stream.documents == len(texts)
    assert set(found) == encoded
    assert stream.order == f"documents shuffled with seed {seed}"
    made = load_text(spec, tokenizer, nsamples=4, seqlen=64, seed=seed)
    assert torch.equal(made.batches.flatten(), stream.ids[:256])
    assert made.record()["documents"] + made.record()["documents_left"] == len(texts)


def test_the_seed_alone_decides_the_order(tokenizer, write):
    spec = write("a.jsonl", [{"text": f"{prose(5, i)} {i}"} for i in range(50)])
    state = random.getstate(), torch.get_rng_state()
    made = [load_text(spec, tokenizer, nsamples=2, seqlen=64, seed=s).sha256 for s in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    # A changed order of documents would be a changed result for the same recipe: this one is fixed for good.
    source = random.Random(0)
    keys = [source.random() for _ in range(50)]
    first = min(range(50), key=keys.__getitem__)
    found = tokenizer.decode(load_tokens(spec, tokenizer, seed=0).ids)
    assert found.startswith(f"<s>{prose(5, first)} {first}<s>")


def test_without_a_seed_documents_stay_in_order(tokenizer, write):
    spec = write("a.jsonl", [{"text": "b"}, {"text": "a"}, {"text": "c"}])
    stream = load_tokens(spec, tokenizer)
    assert tokenizer.decode(stream.ids) == "<s>b<s>a<s>c"
    assert stream.order == "as written"


def test_a_short_text_gives_fewer_sequences_and_says_so(tokenizer, write):
    spec = write("a.txt", prose(100))
    tokens = len(tokenizer(prose(100))["input_ids"])
    made = load_text(spec, tokenizer, nsamples=50, seqlen=20)
    assert made.batches.shape == (tokens // 20, 20)
    assert made.tokens_left == tokens % 20
    assert f"{tokens // 20} sequences of 20, not the 50" in made.notes[0]
    assert (made.record()["nsamples"], made.record()["nsamples_used"]) == (50, tokens // 20)
    whole = load_text(spec, tokenizer, nsamples=1, seqlen=tokens)  # exactly one sequence is enough
    assert whole.tokens_left == 0


def test_a_folder_is_read_in_sorted_order(tokenizer, write, tmp_path):
    write("d/b.txt", "second")
    write("d/a/z.jsonl", [{"content": "first"}, {"text": ""}, {"text": "and more"}])
    write("d/.git/x.txt", "hidden")
    write("d/notes.md", "not text for us")
    stream = load_tokens(str(tmp_path / "d"), tokenizer)
    assert tokenizer.decode(stream.ids) == "<s>first<s>and more<s>second"
    assert (stream.kind, stream.documents) == ("folder", 3)


def test_long_texts_cause_no_warning_and_one_call(write, caplog, monkeypatch):
    tokenizer = make_tokenizer(model_max_length=16)
    text = prose(3000)
    calls = []
    original = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda self, t, **k: calls.append(t) or original(self, t, **k)
    )
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        load_text(write("a.txt", text), tokenizer, nsamples=2, seqlen=1000)
    assert calls.count([text]) == 1
    assert not [r for r in caplog.records if "length" in r.getMessage()]


@pytest.mark.parametrize(
    ("bos", "adds", "text", "expected", "said"),
    [
        ("<s>", "<s> $A", "a cat", "<s>a cat", "BOS <s> once per document: the tokenizer adds it"),
        ("<s>", "$A", "a cat", "a cat", "no BOS: the tokenizer has <s> but does not add it"),
        (None, "$A", "a cat", "a cat", "no BOS: the tokenizer has none"),
        ("<s>", "[g] <s> $A", "a cat", "[g]<s>a cat", "BOS [g]<s> once per document: the tokenizer adds it"),
        (
            "<s>",
            "<s> $A </s>",
            "a cat",
            "<s>a cat</s>",
            "BOS <s> once per document: the tokenizer adds it; </s> after each document: the tokenizer adds it",
        ),
        ("<s>", "<s> $A", "<s>a cat", "<s>a cat", "BOS <s> once per document: the tokenizer adds it"),
    ],
    ids=["added", "not added", "none", "two", "with eos", "spelled out"],
)
def test_special_tokens_are_those_of_the_tokenizer(write, bos, adds, text, expected, said):
    tokenizer = make_tokenizer(bos=bos, adds=adds)
    stream = load_tokens(write("a.jsonl", [{"text": text}, {"text": text}]), tokenizer)
    assert tokenizer.decode(stream.ids) == expected * 2
    assert stream.bos == said
    assert tokenizer.pad_token is None


CHAT = [{"role": "user", "content": "who sat?"}, {"role": "assistant", "content": "the cat"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": CHAT, "id": 3},
        {"conversations": [{"from": "human", "value": "who sat?"}, {"from": "gpt", "value": "the cat"}]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"text": None, "messages": [{"role": "user", "content": [{"type": "text", "text": "who sat?"}]}, CHAT[1]]},
    ],
)
def test_chats_are_written_as_the_template_writes_them(write, row):
    tokenizer = make_tokenizer(adds="<s> $A", template=TEMPLATE)
    stream = load_tokens(write("a.jsonl", [row]), tokenizer)
    assert stream.ids.tolist() == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert stream.ids.tolist().count(tokenizer.bos_token_id) == 1  # not doubled
    assert stream.chat_template == "used: the tokenizer's own, for 1 chats"
    assert stream.bos == "as the chat template writes it: nothing is added"


def test_chats_without_a_template(write):
    spec = write("a.jsonl", [{"messages": CHAT}, {"text": "a mat"}])
    bare = make_tokenizer(adds="<s> $A")
    stream = load_tokens(spec, bare)
    assert bare.decode(stream.ids) == "<s>user: who sat?\n\nassistant: the cat<s>a mat"
    assert stream.chat_template.startswith("not used: the tokenizer has none; 1 chats")
    able = make_tokenizer(adds="<s> $A", template=TEMPLATE)
    assert load_tokens(spec, able, chat_template="none").ids.tolist() == stream.ids.tolist()
    assert "switched off" in load_tokens(spec, able, chat_template="none").chat_template
    mixed = load_tokens(spec, able)
    assert able.decode(mixed.ids).endswith("</s><s>a mat")
    assert mixed.bos.endswith("; chats as their template writes them")
    with pytest.raises(ValueError, match="'auto' or 'none'"):
        load_tokens(spec, able, chat_template="never")  # pyright: ignore[reportArgumentType]


def test_prompt_and_completion_strings_are_one_text(tokenizer, write):
    spec = write("a.jsonl", [{"prompt": "the cat ", "completion": "sat"}])
    assert tokenizer.decode(load_tokens(spec, tokenizer).ids) == "<s>the cat sat"


def test_a_refusing_template_names_the_line(write):
    tokenizer = make_tokenizer(template=TEMPLATE)
    spec = write("a.jsonl", [{"messages": CHAT}, {"messages": [{"role": "tool", "content": "x"}]}])
    with pytest.raises(ValueError, match=r"line 2: the tokenizer's chat template refuses this chat \(no tools here\)"):
        load_tokens(spec, tokenizer)


def test_other_spellings_of_the_same_file(tokenizer, write):
    rows = [{"text": "a\u2028b"}, {"text": "c"}]  # a separator that str.splitlines would cut at
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    specs = [
        write("a.jsonl", lines),
        write("b.jsonl", "\ufeff" + lines.replace("\n", "\r\n\r\n") + "\r\n"),
        write("c.json", json.dumps(rows, indent=2)),
        write("d.jsonl.gz", gzip.compress(lines.encode())),
    ]
    hashes = {load_tokens(spec, tokenizer).sha256 for spec in specs}
    assert len(hashes) == 1
    assert tokenizer.decode(load_tokens(specs[0], tokenizer).ids) == "<s>a\u2028b<s>c"


def test_parquet(tokenizer, write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an optional package")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a cat", "a mat"]}), tmp_path / "a.parquet")
    assert tokenizer.decode(load_tokens(str(tmp_path / "a.parquet"), tokenizer).ids) == "<s>a cat<s>a mat"
    with pytest.raises(ValueError, match="damaged parquet file"):
        load_tokens(write("b.parquet", "no table"), tokenizer)
    parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"row 1: expected 'text'.*found 'id'"):
        load_tokens(str(tmp_path / "c.parquet"), tokenizer)


def test_parquet_without_pyarrow_says_what_to_do(tokenizer, write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet: \.parquet needs pyarrow \(pip install pyarrow\)"):
        load_tokens(write("a.parquet", "x"), tokenizer)


BAD = {
    "empty": ("a.txt", "", "the file is empty"),
    "blank": ("a.txt", " \n\t", "the file is empty"),
    "empty jsonl": ("a.jsonl", "\n\n", "the file is empty"),
    "empty texts": ("a.jsonl", [{"text": " "}], "the file is empty"),
    "not utf-8": ("a.txt", b"caf\xe9 au lait", r"not UTF-8 text \(byte at offset 3\)"),
    "binary": ("a.txt", b"ab\0cd", r"a binary file \(zero byte at offset 2\)"),
    "short": ("a.txt", "a cat", r"\d+ tokens, fewer than one sequence of 4096; use --seqlen \d+ or less"),
    "not json": ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "no object": ("a.jsonl", '{"text": "a"}\n"b"\n', "line 2: expected 'text', .* it is no object"),
    "no key": ("a.jsonl", [{"text": "a"}, {"title": "b", "x": 1}], "line 2: expected 'text', .* found 'title', 'x'"),
    "half a pair": ("a.jsonl", [{"prompt": "a"}], "line 1: expected .*'prompt' and 'completion'; found 'prompt'"),
    "no string": ("a.jsonl", [{"text": 3}], "line 1: 'text' must be a string, not int"),
    "no messages": ("a.jsonl", [{"messages": "hello"}], "line 1: 'messages' must be a list of messages"),
    "no role": ("a.jsonl", [{"messages": [{"content": "hello"}]}], "line 1: 'role' must be a string"),
    "picture": (
        "a.jsonl",
        [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}],
        "line 1: 'text' must be a string, not NoneType",
    ),
    "surrogate": ("a.jsonl", '{"text": "a \\ud83d b"}', "line 1: 'text' holds half a surrogate pair at character 2"),
    "damaged gzip": ("a.jsonl.gz", b"\x1f\x8bnot really", "damaged gzip file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:-9], "damaged gzip file"),
    "bad array": ("a.json", "[1,\n2,,]", "line 2: not JSON"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_text_ends_in_one_line(tokenizer, write, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_text(write(name, content), tokenizer, nsamples=1, seqlen=4096)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_bad_options(tokenizer, write, tmp_path):
    spec = write("a.txt", prose(500))
    for options, message in (
        ({"nsamples": 0}, "--nsamples 0: must be at least 1"),
        ({"seqlen": 0}, "--seqlen 0: must be at least 1"),
        ({"seqlen": 65, "max_length": 64}, "the model has 64 positions; use --seqlen 64 or less"),
        ({"seqlen": 64, "vocab_size": 10}, "the model knows 10: they do not belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text(spec, tokenizer, **options)
    load_text(spec, tokenizer, seqlen=64, max_length=64, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="no such file or folder; expected --data"):
        load_text(str(tmp_path / "none.txt"), tokenizer)
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt or \.jsonl file in this folder"):
        load_text(str(tmp_path / "void"), tokenizer)


CARD = {
    "configs": [
        {"config_name": "en", "data_files": [{"split": "train", "path": "en/c4-train.*.json.gz"}]},
        {"config_name": "realnews", "data_files": [{"split": "train", "path": ["realnews/**/*.json.gz"]}]},
    ]
}
C4 = ["README.md", "en/c4-train.10.json.gz", "en/c4-train.2.json.gz", "en/c4-test.0.json.gz", "realnews/a.json.gz"]
PLAIN = ["README.md", "data/train-00000.parquet", "data/test-00000.parquet", "dataset_infos.json", ".gitattributes"]
BOTH = ["small/train.jsonl", "small/train.parquet", "large/train.jsonl", "large/test.jsonl"]


@pytest.mark.parametrize(
    ("files", "card", "config", "split", "expected"),
    [
        (C4, CARD, "en", None, ["en/c4-train.2.json.gz", "en/c4-train.10.json.gz"]),
        (C4, CARD, "realnews", "train", ["realnews/a.json.gz"]),
        (PLAIN, {}, None, None, ["data/train-00000.parquet"]),
        (PLAIN, {}, None, "test", ["data/test-00000.parquet"]),
        (PLAIN, {"configs": [{"config_name": "default", "data_files": "data/*"}]}, None, None, PLAIN[2:0:-1]),
        (BOTH, {}, "small", None, ["small/train.jsonl"]),
        (BOTH, {}, "large", "test", ["large/test.jsonl"]),
        (["a.jsonl", "b.jsonl"], {}, None, None, ["a.jsonl", "b.jsonl"]),
        (["LICENSE.txt", "book.txt"], {}, None, None, ["book.txt"]),
    ],
)
def test_files_of_a_hub_data_set(files, card, config, split, expected):
    assert documents.choose_files(files, card, config, split) == expected


@pytest.mark.parametrize(
    ("files", "card", "config", "split", "message"),
    [
        (C4, CARD, None, None, "name one of its configurations as hf:dataset:CONFIG: en, realnews"),
        (C4, CARD, "fr", None, "name one of its configurations"),
        (C4, CARD, "en", "validation", "no .jsonl, .parquet or .txt file for configuration 'en', split 'validation'"),
        (PLAIN, {}, None, "validation", "its data files: data/test-00000.parquet"),
        (["README.md"], {}, None, None, "its data files: none"),
    ],
)
def test_files_of_a_hub_data_set_that_are_not_there(files, card, config, split, message):
    with pytest.raises(ValueError, match=message):
        documents.choose_files(files, card, config, split)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_offline_names_the_other_ways(tokenizer, cache):
    with pytest.raises(ValueError, match=r"hf:org/data: not cached, .*offline.*; use --data FILE.txt") as caught:
        load_text("hf:org/data", tokenizer)
    assert "\n" not in str(caught.value)


def test_a_cached_data_set_serves_offline(tokenizer, cache, write):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = f"hub/datasets--org--data/snapshots/{commit}"
    write("hub/datasets--org--data/refs/main", commit)
    write(f"{folder}/README.md", "---\nconfigs:\n- config_name: default\n  data_files: part-*.jsonl\n---\n# Data\n")
    write(f"{folder}/part-2.jsonl", [{"text": f"two {i}"} for i in range(9)])
    write(f"{folder}/part-10.jsonl", '{"text": "never read, so never found bad"')
    made = load_text("hf:org/data", tokenizer, nsamples=2, seqlen=8)
    assert made.record()["revision"] == commit
    assert made.first_sample.startswith("<s>two ")
    with pytest.raises(ValueError, match=r"hf:org/data/part-10\.jsonl, line 1: not JSON"):
        load_text("hf:org/data", tokenizer, nsamples=99, seqlen=8)


@pytest.mark.parametrize("spec", ["hf:", "hf:a:b:c:d", "hf:@main"])
def test_a_malformed_hub_name(tokenizer, spec):
    with pytest.raises(ValueError, match=r"expected hf:dataset\[:config\[:split\]\]"):
        load_text(spec, tokenizer)


def make_model(family: str, vocab: int, **options):
    common = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(common | options))).eval()


@torch.no_grad()
def sample_plainly(model, prompt, new_tokens, seed, ends):
    """The definition: no cache, no mask, each row's present document run by itself."""
    source = torch.Generator().manual_seed(seed)
    rows = [[] for _ in prompt]
    present = [[] for _ in prompt]
    sampled = [0] * len(prompt)
    for _ in range(prompt.shape[1] + new_tokens):
        logits = []
        for r, given in enumerate(prompt.tolist()):
            token = given[len(present[r])] if len(present[r]) < len(given) else sampled[r]
            rows[r].append(token)
            present[r].append(token)
            logits.append(model(torch.tensor([present[r]])).logits[0, -1])
            if token in ends and len(present[r]) > len(given):
                present[r] = []
        sampled = torch.multinomial(torch.stack(logits).softmax(-1), 1, generator=source)[:, 0].tolist()
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        ("gemma3_text", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_sampling_equals_its_definition(family, options):
    ends = [1, 5, 9, 10]
    model = make_model(family, 12, eos_token_id=ends, **options)
    prompt = torch.tensor([[0, 3], [0, 3], [5, 5]])  # some tokenizers begin with the end token
    expected = sample_plainly(model, prompt, 30, 7, ends)
    assert torch.equal(sample_self(model, prompt, 30, 7), expected)
    restarts = sum(row.unfold(0, 3, 1).eq(torch.tensor([end, 0, 3])).all(1).sum() for row in expected for end in ends)
    assert restarts >= 2  # else the restart was not tried


def test_sampling_is_seeded_and_local():
    model = make_model("llama", 50)
    prompt = torch.zeros(5, 1, dtype=torch.long)
    state = torch.get_rng_state()
    a, b, c = (sample_self(model, prompt, 20, seed, batch=2) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (5, 21)
    assert len({tuple(row) for row in a.tolist()}) == 5
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_follows_the_distribution():
    model = make_model("llama", 6, eos_token_id=None)
    with torch.no_grad():
        expected = model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    drawn = sample_self(model, torch.zeros(4000, 1, dtype=torch.long), 1, 0, batch=4000)[:, 1]
    assert torch.allclose(drawn.bincount(minlength=6) / 4000, expected, atol=0.03)


def test_sampling_refuses_a_broken_model():
    model = make_model("llama", 6)
    model.lm_head.weight.data[2, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite after 1 tokens"):
        sample_self(model, torch.tensor([[0]]), 3, 0)


@pytest.mark.parametrize(
    ("bos", "adds", "said"),
    [
        ("<s>", "<s> $A", "BOS <s> once per document: sampling starts from it"),
        ("<s>", "$A", "BOS <s> once per document: sampling starts from it"),
        (None, "[g] $A", "BOS [g] once per document: sampling starts from it"),
        (None, "$A", "no BOS: the tokenizer has none, sampling starts from random tokens"),
    ],
)
def test_text_sampled_from_the_model(bos, adds, said):
    tokenizer = make_tokenizer(bos=bos, adds=adds)
    prompts = []

    def generate(prompt, new_tokens, seed):
        prompts.append(prompt)
        source = torch.Generator().manual_seed(seed)
        drawn = torch.randint(3, len(tokenizer), (len(prompt), new_tokens), generator=source)
        return torch.cat([prompt, drawn], 1)

    made = [load_text("self", tokenizer, nsamples=20, seqlen=9, seed=s, generate=generate) for s in (4, 4, 5)]
    assert made[0].batches.shape == (20, 9)
    assert made[0].sha256 == made[1].sha256 != made[2].sha256
    assert made[0].stream.bos == said
    assert (made[0].record()["kind"], made[0].record()["order"]) == ("sampled from the model", "sampled with seed 4")
    first = prompts[0][:, 0].tolist()
    if "random" in said:
        assert len(set(first)) > 10
        assert not set(first) & set(tokenizer.all_special_ids)
    else:
        assert set(first) == {tokenizer.convert_tokens_to_ids(said.split()[1])}


def test_sampled_text_needs_a_model(tokenizer):
    with pytest.raises(ValueError, match="--data self"):
        load_text("self", tokenizer)
    with pytest.raises(ValueError, match="name a file"):
        load_tokens("self", tokenizer)
