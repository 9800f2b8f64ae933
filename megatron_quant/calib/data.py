"""Calibration data: texts from a file, a folder, the standard library or the hub, as token ids."""

import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_quant.calib import records
from megatron_quant.calib.records import Chat, Document
from megatron_quant.errors import CalibrationError

STDLIB = "stdlib"
"""The default data set: the sources of the Python standard library, which every host has."""

_LINES = (".jsonl", ".ndjson")
_SUFFIXES = (".txt", ".md", ".py", ".rst", *_LINES, ".json", ".parquet")
"""Suffixes of the files of a folder that are read, in any case."""
# These folders are not the library itself, or some hosts' packages lack them.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_TEXTS_AT_ONCE = 8


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any:
        """Return a mapping whose ``input_ids`` is one list of token ids per text."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], *, tokenize: bool) -> Any:
        """Return the text of a conversation, where ``tokenize`` is off."""


def load_texts(spec: str) -> list[Document]:
    """Load the documents that ``spec`` names, in one order on every rank and run.

    Empty documents are left out.

    Args:
        spec: ``stdlib``; a text file; JSON lines or a JSON list (.jsonl, .ndjson, .json) of records
            with a string ``text`` or a chat (``messages``, ``conversations``); a .parquet file of
            such records, with ``pyarrow`` installed; a folder of such files, recursively, sorted;
            or a dataset of the Hugging Face hub, ``id`` or ``id:configuration``, with ``datasets``
            installed.

    Raises:
        CalibrationError: Where there is nothing to read, and for a record without text or chat.
    """
    path = Path(spec)
    if spec == STDLIB:
        texts = [text for p in _stdlib_files() for text in _read(p)]
    elif spec and path.is_dir():
        texts = [text for p in _files(path) for text in _read(p, in_folder=True)]
    elif path.is_file():
        texts = _read(path)
    else:
        texts = _load_hub(spec)
    documents = [text for text in texts if isinstance(text, Chat) or text.strip()]
    if not documents:
        raise CalibrationError(
            f"no text in {spec!r}: give a text file, a .jsonl with 'text', or a folder of "
            f"{', '.join(_SUFFIXES)} files"
        )
    return documents


def token_batches(
    texts: Sequence[Document], tokenizer: Tokenizer, samples: int, seq_length: int, batch_size: int
) -> list[torch.Tensor]:
    """Cut ``samples`` sequences from the start of ``texts``, as int64 tensors [B, S].

    Documents follow one another, each closed by the end-of-sequence token where the tokenizer has
    one, and are cut every S = ``seq_length`` tokens, without padding. The tokenizer's chat template
    turns conversations into text. B is ``batch_size``, or less in the last batch.

    Args:
        texts: Documents in order.
        tokenizer: A transformers tokenizer.
        samples: Number of sequences.
        seq_length: Tokens of a sequence.
        batch_size: Sequences of a batch.

    Raises:
        CalibrationError: Where there is too little text.
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
            f"the calibration text has {found} samples of {seq_length} tokens, but {samples} are "
            "asked for: give more text, or ask for fewer or shorter samples"
        )
    data = torch.tensor(tokens[: samples * seq_length], dtype=torch.int64)
    return list(data.view(samples, seq_length).split(batch_size))


def share(batches: Sequence[torch.Tensor], rank: int, size: int) -> list[torch.Tensor]:
    """Return the samples of data-parallel rank ``rank`` of ``size``, in as many batches on each.

    No sample is run twice if every rank can have one: experts are given tokens of several ranks at
    once, and could not tell those that repeat. Batches are then of about equal sizes, one sample
    more than the given ones at most. With fewer samples than ranks it is :func:`shard`.
    """
    if size == 1:
        return list(batches)
    samples = torch.cat(list(batches))
    if len(samples) < size:
        return shard(batches, rank, size)
    least, most = len(samples) // size, -(-len(samples) // size)
    rounds = min(least, -(-most // len(batches[0])))
    return list(samples[rank::size].tensor_split(rounds))


def shard(batches: Sequence[torch.Tensor], rank: int, size: int) -> list[torch.Tensor]:
    """Return the batches of data-parallel rank ``rank`` of ``size``, dealt out in turn.

    Every rank gets equally many, because a forward is collective. The deal goes on from the first
    batch where they run out. A maximum does not change when a batch is seen twice.
    """
    assert batches and 0 <= rank < size
    rounds = -(-len(batches) // size)
    return [batches[(i * size + rank) % len(batches)] for i in range(rounds)]


def _tokenize(texts: Sequence[Document], tokenizer: Tokenizer) -> Iterator[list[int]]:
    eos = tokenizer.eos_token_id
    closing = [] if eos is None else [eos]
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        few = [_text(t, tokenizer) for t in texts[start : start + _TEXTS_AT_ONCE]]
        # verbose is off: it warns of documents beyond the model's context, which do no harm here.
        for ids in tokenizer(few, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [*ids, *closing]


def _text(document: Document, tokenizer: Tokenizer) -> str:
    if isinstance(document, str):
        return document
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{document.where} is a chat, and the checkpoint's tokenizer has no chat template: "
            "give records with 'text', or put its chat_template.jinja beside the tokenizer"
        )
    try:
        text = tokenizer.apply_chat_template(list(document.messages), tokenize=False)
    except Exception as e:  # a template raises whatever it likes
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CalibrationError(
            f"{document.where}: the tokenizer's chat template rejects it: {reason}"
        ) from None
    return str(text)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def _stdlib_files() -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [f for f in folders if f not in _NOT_STDLIB]  # site-packages can be huge
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _read(path: Path, in_folder: bool = False) -> list[Document]:
    """Read the documents of a file by its suffix.

    in_folder: leave out a JSON file that holds settings, as many folders of texts have.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return records.of_parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = "it is not UTF-8 text" if isinstance(e, UnicodeDecodeError) else e.strerror
        raise CalibrationError(f"cannot read calibration text {path}: {reason}") from None
    if suffix in _LINES:
        return list(records.of_lines(text, str(path)))
    if suffix == ".json":
        if in_folder and records.is_settings(text):
            return []
        return list(records.of_json(text, str(path)))
    return [text]


def _load_hub(spec: str) -> list[Document]:
    missing = f"no calibration text file or folder {spec!r}"
    if Path(spec).suffix.lower() in _SUFFIXES or not _HUB_ID.fullmatch(spec):
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
