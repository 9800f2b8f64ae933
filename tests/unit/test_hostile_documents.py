"""Journals, manifests, headers and descriptions that somebody else wrote, or that are torn."""

import json
import os
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pytest
import torch

from megatron_quant.ckpt.storage.names import MANIFEST
from megatron_quant.ckpt.storage.safetensors_header import (
    Draft,
    UnknownDtype,
    entries_of,
    header_bytes,
)
from megatron_quant.ckpt.write import journal
from megatron_quant.ckpt.write.journal import read_journals
from megatron_quant.ckpt.write.manifest import digest_problems
from megatron_quant.documents import Limits
from megatron_quant.errors import CheckpointError, ExportError
from megatron_quant.models.spec import Box
from tests.unit import exported
from tests.unit.hostile import VALUES, outcomes

GOOD = ["model.a", [0, 0], [2, 4], "digest"]
KNOWN = {("model.a", Box((0, 0), (2, 4))): "digest"}


def write_journal(directory: Path, content: bytes) -> Path:
    path = directory / ".megatron_quant_journal_0.partial"
    path.write_bytes(content)
    return path


def test_lines_of_a_journal_that_are_none_say_nothing(tmp_path: Path) -> None:
    lines: list[Any] = [*VALUES, [], GOOD[:3], [*GOOD, 1], [GOOD]]
    for place in range(4):
        lines += [[*GOOD[:place], value, *GOOD[place + 1 :]] for value in VALUES if value != []]
    lines += [["model.a", [value], [1], "x"] for value in VALUES if type(value) is not int]
    texts = [json.dumps(line) for line in lines if not _is_whole(line)] + [json.dumps(GOOD)]
    for torn in range(1, len(texts[-1])):
        texts.append(json.dumps(["model.b", [0], [1], "x"])[:-torn] if torn < 20 else "")
    write_journal(tmp_path, "\n".join(texts).encode() + b"\n\xff\xfe\0{}\n" + os.urandom(10_000))
    assert read_journals([tmp_path / ".megatron_quant_journal_0.partial"]) == KNOWN


def _is_whole(line: Any) -> bool:
    """Whether a line may be one, of whatever tensor."""
    return isinstance(line, list) and len(line) == 4 and line[1:] == GOOD[1:]


def test_a_journal_without_lines_is_read_piece_by_piece(tmp_path: Path) -> None:
    with write_journal(tmp_path, b"").open("wb") as stream:
        stream.write(b"[" * 1_000_000)
        stream.truncate(300_000_000)
        stream.seek(0, os.SEEK_END)
        stream.write(b"\n" + json.dumps(GOOD).encode())
    before = getrusage(RUSAGE_SELF).ru_maxrss
    assert read_journals([tmp_path / ".megatron_quant_journal_0.partial"]) == KNOWN
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_a_journal_that_nobody_wrote_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_journal(tmp_path, b" " * 101)
    monkeypatch.setattr(journal, "_JOURNAL", Limits(100, 0))
    with pytest.raises(ExportError, match="has 101 bytes, more than the 100"):
        read_journals([tmp_path / ".megatron_quant_journal_0.partial"])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ExportError, match="is no regular file"):
        read_journals([tmp_path / ".megatron_quant_journal_0.partial"])


def test_every_value_in_a_header() -> None:
    drafts = [Draft("model.a", torch.bfloat16, (2, 4), 16), Draft("b", torch.uint8, (), 1)]
    header = header_bytes(drafts)
    assert [(e.name, e.shape, e.offset, e.nbytes) for e in entries_of("it", header)] == [
        ("model.a", (2, 4), len(header), 16),
        ("b", (), len(header) + 16, 1),
    ]

    def read(document: Any) -> None:
        try:
            list(entries_of("it", b"12345678" + json.dumps(document).encode()))
        except UnknownDtype as error:
            raise CheckpointError(str(error)) from None

    taken, refused = outcomes(json.loads(header[8:]), read)
    assert taken > 30 and refused > 100


def test_every_value_in_a_manifest(tmp_path: Path) -> None:
    directory = exported.export(
        tmp_path / "it", "modelopt", exported.plan("fp8"), exported.source_weights()
    )
    stated = {"version": 2, "plan": "", "tensors": {"model.a": "digest"}, "digest": {}}

    def read(document: Any) -> None:
        (directory / MANIFEST).write_text(json.dumps(document))
        problems = list(digest_problems(directory, 1))
        assert len(problems) == 1 and "\n" not in problems[0]

    taken, refused = outcomes(stated, read)
    assert taken > 100 and refused == 0


def test_a_header_that_is_no_object_is_a_problem_of_its_file(tmp_path: Path) -> None:
    for content in (b"[]", b'"text"', b'{"a": 1}', b'{"a": {"dtype": "F99"}}'):
        (tmp_path / MANIFEST).write_text('{"version": 2, "tensors": {}}')
        (tmp_path / "a.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
        (problem,) = digest_problems(tmp_path, 1)
        assert "header of a.safetensors" in problem or "a has dtype 'F99'" in problem
