"""Calibration data: texts from a file, a folder, the standard library or the hub, as token ids."""

import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_quant.errors import CalibrationError

STDLIB = "stdlib"
"""The default data set: the sources of the Python standard library, which every host has."""

_SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl")
# Not of the library itself, or absent from some hosts' packages of it.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_TEXTS_AT_ONCE = 8


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any:
        """A mapping whose ``input_ids`` is one list of token ids per text."""


def load_texts(spec: str) -> list[str]:
    """The documents that ``spec`` names, in an order that is the same on every rank and run.

    spec: ``stdlib``; a text file; a ``.jsonl`` with a string ``text`` in every line; a folder
    (.txt, .md, .py, .rst and .jsonl files in it, recursively, sorted); or a dataset of the
    Hugging Face hub, ``id`` or ``id:configuration``, where the package ``datasets`` is installed.
    Empty documents are left out. Raises CalibrationError where there is nothing to read.
    """
    path = Path(spec)
    if spec == STDLIB:
        texts = [text for p in _stdlib_files() for text in _read(p)]
    elif spec and path.is_dir():
        texts = [text for p in _files(path) for text in _read(p)]
    elif path.is_file():
        texts = _read(path)
    else:
        texts = _load_hub(spec)
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise CalibrationError(
            f"no text in {spec!r}: give a text file, a .jsonl with 'text', or a folder of "
            f"{', '.join(_SUFFIXES)} files"
        )
    return documents


def token_batches(
    texts: Sequence[str], tokenizer: Tokenizer, samples: int, seq_length: int, batch_size: int
) -> list[torch.Tensor]:
    """``samples`` sequences from the start of ``texts``, as int64 tensors [B, S].

    Documents follow one another, each closed by the end-of-sequence token where the tokenizer
    has one, and are cut every S = ``seq_length`` tokens, without padding. B is ``batch_size``,
    or less in the last batch. Raises CalibrationError where there is too little text.
    """
    sizes = {"samples": samples, "seq_length": seq_length, "batch_size": batch_size}
    for name, value in sizes.items():
        if value < 1:
            raise CalibrationError(f"calibration {name} must be at least 1, got {value}")
    tokens: list[int] = []
    for ids in _tokenize(texts, tokenizer):
        tokens += ids
        if len(tokens) >= samples * seq_length:
            break
    found = len(tokens) // seq_length
    if found < samples:
        raise CalibrationError(
            f"the calibration text has {found} samples of {seq_length} tokens, {samples} are asked "
            "for: give more text, fewer samples or shorter ones"
        )
    data = torch.tensor(tokens[: samples * seq_length], dtype=torch.int64)
    return list(data.view(samples, seq_length).split(batch_size))


def shard(batches: Sequence[torch.Tensor], rank: int, size: int) -> list[torch.Tensor]:
    """The batches of data-parallel rank ``rank`` of ``size``, dealt out in turn.

    Every rank gets equally many, because a forward is collective: the deal goes on from the first
    batch where they run out. A maximum does not change when a batch is seen twice.
    """
    assert batches and 0 <= rank < size
    rounds = -(-len(batches) // size)
    return [batches[(i * size + rank) % len(batches)] for i in range(rounds)]


def _tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    eos = tokenizer.eos_token_id
    closing = [] if eos is None else [eos]
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        few = list(texts[start : start + _TEXTS_AT_ONCE])
        # verbose is off: that a document is longer than the model's context does not matter here.
        for ids in tokenizer(few, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [*ids, *closing]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in _SUFFIXES and p.is_file())


def _stdlib_files() -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [f for f in folders if f not in _NOT_STDLIB]  # site-packages can be huge
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = "it is not UTF-8 text" if isinstance(e, UnicodeDecodeError) else e.strerror
        raise CalibrationError(f"cannot read calibration text {path}: {reason}") from None
    if path.suffix != ".jsonl":
        return [text]
    lines = enumerate(text.split("\n"), start=1)
    return [_json_text(line, f"{path}:{i}") for i, line in lines if line.strip()]


def _json_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as e:
        raise CalibrationError(f"{where}: not a JSON line: {e}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise CalibrationError(f"{where}: needs an object with a string 'text'")
    return record["text"]


def _load_hub(spec: str) -> list[str]:
    missing = f"no calibration text file or folder {spec!r}"
    if Path(spec).suffix in _SUFFIXES or not _HUB_ID.fullmatch(spec):
        raise CalibrationError(f"{missing}: check the path")
    try:
        from megatron_quant.calib import hub
    except ModuleNotFoundError as e:
        if e.name != "datasets":
            raise
        raise CalibrationError(
            f"{missing}; reading it as a dataset of the hub needs: pip install datasets"
        ) from None
    return hub.load_hub_texts(spec)
