"""Calibration texts and token batches."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_quant.calib.data import load_texts, shard, share, token_batches
from megatron_quant.calib.records import Chat
from megatron_quant.errors import CalibrationError


class Characters:
    """A tokenizer with a token per character: what is asserted can be read off the text."""

    def __init__(self, eos_token_id: int | None = 0) -> None:
        self.eos_token_id = eos_token_id
        self.seen = 0
        self.chat_template = ""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        self.seen += len(text)
        return {"input_ids": [[ord(c) for c in t] for t in text]}

    def apply_chat_template(self, conversation: list[dict[str, Any]], *, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in conversation)


def words(batch: torch.Tensor) -> list[str]:
    return ["".join(chr(i) if i else "|" for i in row) for row in batch.tolist()]


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "words.anything"
    path.write_text("grüße\nhere", encoding="utf-8")
    assert load_texts(str(path)) == ["grüße\nhere"]


def test_jsonl_takes_text_of_every_line(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", {"text": "a\u2028b", "id": 1}, {"text": " "}, {"text": "c"}
    )
    assert load_texts(str(path)) == ["a\u2028b", "c"]


def test_folder_is_sorted_and_recursive(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.py").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.rst").write_text("third")
    (tmp_path / "d.md").write_text("\n")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    write_jsonl(tmp_path / "e.jsonl", {"text": "fourth"}, {"text": "fifth"})
    assert load_texts(str(tmp_path)) == ["first", "second", "third", "fourth", "fifth"]


def test_standard_library() -> None:
    texts = load_texts("stdlib")
    assert texts == load_texts("stdlib")
    assert sum(map(len, texts)) > 5_000_000
    assert any("class ArgumentParser" in text for text in texts)
    assert not any("import _pytest" in text for text in texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": ', r"a\.jsonl:2 cannot be read as JSON: Expecting value"),
        (b'{"text": "\\ud800"}\n', r"a\.jsonl:1 cannot be read as JSON: .*surrogates not allowed"),
        (b'{"txt": "a"}\n', r"a\.jsonl:1: needs a string 'text', or a chat .*; it has txt"),
        (b'{"text": 3}\n', "needs a string 'text'.*; it has text"),
        (b'["a"]\n', r"needs a string 'text'.*; it is \['a'\]"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "a message needs a str",
        ),
        (b'{"messages": ["hello"]}', "a.jsonl:1: messages: 'hello' is no message"),
        (b"\xff\n", r"cannot read calibration text .*a\.jsonl: it is not UTF-8 text"),
        (b"\n\n", r"no text in '.*a\.jsonl': give a text file"),
    ],
)
def test_bad_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_texts(str(path))


def test_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no text in .* folder of \.txt, \.md, \.py"):
        load_texts(str(tmp_path))


TEXTS = [{"text": "one"}, {"text": "two"}]
LINES = "\n".join(map(json.dumps, TEXTS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps(TEXTS)),
        ("indented.json", json.dumps(TEXTS, indent=1)),
        ("strings.json", json.dumps(["one", "two"])),
        ("lines.json", LINES),
        ("lines.ndjson", LINES),
        ("CAPS.JSONL", LINES),
        ("CAPS.JSON", json.dumps(TEXTS)),
        ("marked.jsonl", "\ufeff" + LINES),
    ],
)
def test_records_by_what_they_are(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert load_texts(str(tmp_path / name)) == ["one", "two"]
    assert load_texts(str(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": []}', "a.json: needs a string 'text', or a chat .*; it has train"),
        ('[{"instruction": "x"}]', r"a\.json\[0\]: needs a string 'text'.*; it has instruction"),
        ("plain words", "a.json cannot be read as JSON"),
        ('["\\udc80"]', "a.json cannot be read as JSON: .*surrogates not allowed"),
    ],
)
def test_a_json_file_that_holds_no_texts(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load_texts(str(tmp_path / "a.json"))


def test_settings_among_texts_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_text("text")
    (tmp_path / "dataset_info.json").write_text('{"features": 1}')
    assert load_texts(str(tmp_path)) == ["text"]
    (tmp_path / "rows.json").write_text("[1]")
    with pytest.raises(CalibrationError, match=r"rows\.json\[0\]: needs a string 'text'"):
        load_texts(str(tmp_path))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                {"role": "assistant", "content": "A"},
            ]
        },
    ],
)
def test_chats_go_through_the_chat_template(record: object, tmp_path: Path) -> None:
    texts = load_texts(str(write_jsonl(tmp_path / "chat.jsonl", record)))
    tokenizer = Characters()
    with pytest.raises(CalibrationError, match=r"chat\.jsonl:1 is a chat, and .* no chat template"):
        token_batches(texts, tokenizer, 1, 4, 1)
    tokenizer.chat_template = "a template"
    assert words(token_batches(texts, tokenizer, 1, 20, 1)[0]) == ["<user>Q<assistant>A|"]


def test_a_chat_that_the_template_refuses() -> None:
    tokenizer = Characters()
    tokenizer.chat_template = "a template"
    chat = Chat("a.jsonl:1", ({"role": "user"},))
    with pytest.raises(CalibrationError, match=r"a\.jsonl:1: .*template rejects it: 'content'"):
        token_batches([chat], tokenizer, 1, 4, 1)


def test_parquet(tmp_path: Path) -> None:
    """A table where its reader is there, of texts and of chats."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["one", "two"], "id": [1, 2]}), tmp_path / "a.parquet")
    assert load_texts(str(tmp_path / "a.parquet")) == ["one", "two"]
    messages = [[{"role": "user", "content": "Q"}]]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "b.parquet")
    assert load_texts(str(tmp_path / "b.parquet")) == [
        Chat(f"{tmp_path / 'b.parquet'}, row 0", ({"role": "user", "content": "Q"},))
    ]
    pq.write_table(pa.table({"id": [1]}), tmp_path / "c.parquet")
    with pytest.raises(CalibrationError, match=r"c\.parquet, row 0: needs a string .* has id"):
        load_texts(str(tmp_path / "c.parquet"))
    (tmp_path / "d.parquet").write_bytes(b"no table")
    with pytest.raises(CalibrationError, match=r"cannot read calibration data .*d\.parquet: "):
        load_texts(str(tmp_path / "d.parquet"))


def test_parquet_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.PARQUET").write_bytes(b"PAR1")
    with pytest.raises(CalibrationError, match=r"a\.PARQUET needs: pip install pyarrow; or save"):
        load_texts(str(tmp_path / "a.PARQUET"))


@pytest.mark.parametrize("spec", ["missing.txt", "/no/such/folder", "a/b/c", ""])
def test_missing_path(spec: str) -> None:
    with pytest.raises(CalibrationError, match=f"no calibration text .*'{spec}': check the path"):
        load_texts(spec)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is there")
@pytest.mark.parametrize("spec", ["wikitext", "org/name", "org/name:config-1.0"])
def test_hub_without_datasets(spec: str) -> None:
    with pytest.raises(CalibrationError, match=f"'{spec}'; .* needs: pip install datasets"):
        load_texts(spec)


def test_dataset_of_the_hub(tmp_path: Path) -> None:
    """A local folder in the hub's layout: the same call, without a network."""
    pytest.importorskip("datasets")
    from megatron_quant.calib.hub import load_hub_texts

    write_jsonl(tmp_path / "train.jsonl", {"text": "one"}, {"text": "two"})
    assert load_hub_texts(str(tmp_path)) == ["one", "two"]
    with pytest.raises(CalibrationError, match=r"cannot read dataset .*:other' from the hub"):
        load_hub_texts(f"{tmp_path}:other")
    write_jsonl(tmp_path / "train.jsonl", {"article": "one"})
    with pytest.raises(CalibrationError, match=r"row 0: needs a string 'text'.*; it has article"):
        load_hub_texts(str(tmp_path))


def test_documents_are_closed_and_cut() -> None:
    batches = token_batches(["abc", "de", "fghijk"], Characters(), 3, 4, 2)
    assert [b.dtype for b in batches] == [torch.int64] * 2
    assert [words(b) for b in batches] == [["abc|", "de|f"], ["ghij"]]


def test_tokenizer_without_end_of_sequence() -> None:
    batches = token_batches(["abc", "de"], Characters(None), 1, 5, 8)
    assert words(batches[0]) == ["abcde"]


def test_reads_no_more_documents_than_needed() -> None:
    tokenizer = Characters()
    token_batches(["some text"] * 1000, tokenizer, 2, 16, 1)
    assert tokenizer.seen < 100


def test_transformers_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    batches = token_batches(["a b b", "b"], tokenizer, 2, 3, 2)
    assert [b.tolist() for b in batches] == [[[1, 2, 2], [0, 2, 0]]]


def test_too_little_text() -> None:
    message = "the calibration text has 2 samples of 4 tokens, but 3 are asked for: give more"
    with pytest.raises(CalibrationError, match=message):
        token_batches(["abc", "def", "gh"], Characters(), 3, 4, 1)


@pytest.mark.parametrize("sizes", [(0, 4, 1), (1, 0, 1), (1, 4, 0)])
def test_sizes_below_one(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(CalibrationError, match="must be at least 1, got 0"):
        token_batches(["abcdef"], Characters(), *sizes)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_shards_are_equally_long_and_cover_everything(size: int) -> None:
    batches = [torch.tensor([[i]]) for i in range(5)]
    shards = [[b.item() for b in shard(batches, rank, size)] for rank in range(size)]
    assert len({len(s) for s in shards}) == 1
    assert {i for s in shards for i in s} == set(range(5))
    assert shards[0][0] == 0


def test_shards_go_round() -> None:
    batches = [torch.tensor([[i]]) for i in range(5)]
    assert [b.item() for b in shard(batches, 1, 2)] == [1, 3, 0]


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("samples", [1, 2, 6, 7, 9, 16])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_shares_repeat_nothing(size: int, samples: int, batch: int) -> None:
    batches = list(torch.arange(samples).view(-1, 1).split(batch))
    shares = [share(batches, rank, size) for rank in range(size)]
    assert len({len(s) for s in shares}) == 1
    assert all(1 <= len(b) <= batch + 1 for s in shares for b in s)
    seen = sorted(int(i) for s in shares for b in s for i in b)
    if samples >= size:
        assert seen == list(range(samples))
        assert sum(map(len, shares)) <= max(len(batches) + size, samples)
    else:
        assert set(seen) == set(range(samples))
