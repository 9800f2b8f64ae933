"""Read records of calibration files and data sets: texts, and chats for a chat template."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_quant import documents
from megatron_quant.documents import Limits, parse_json
from megatron_quant.errors import CalibrationError

MAX_ROWS = 4096
"""Rows read of a parquet file or a hub data set: enough to calibrate, little of a large one."""
_DATA = Limits(4096 * documents.MB, 500_000_000)
_CHATS = ("messages", "conversations")
_NEEDS = "needs a string 'text', or a chat as 'messages' or 'conversations'"
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""ShareGPT's name of a speaker -> that of chat templates."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        where: Place of the record, for errors.
        messages: Messages in the form of chat templates, each with ``role``.
    """

    where: str
    messages: tuple[dict[str, Any], ...]


Document = str | Chat


def of_lines(text: str, where: str) -> Iterator[Document]:
    """Yield the records of JSON lines; CalibrationError names the first line that is none."""
    for i, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            at = f"{where}:{i}"
            yield of_record(parse_json(line, at, _DATA, CalibrationError), at)


def of_json(text: str, where: str) -> Iterator[Document]:
    """Yield the records of a JSON document (a list of them, or one), or of JSON lines."""
    if _has_lines(text):
        yield from of_lines(text, where)
        return
    value = parse_json(text, where, _DATA, CalibrationError)
    if not isinstance(value, list):
        yield of_record(value, where)
        return
    for i, record in enumerate(value):
        at = f"{where}[{i}]"
        yield record if isinstance(record, str) else of_record(record, at)


def is_settings(text: str) -> bool:
    """Return whether a JSON document is one object that has none of a record's keys."""
    if not text.lstrip().startswith("{") or _has_lines(text):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False  # reading it refuses it by name
    return not any(key in value for key in ("text", *_CHATS))


def of_record(record: object, where: str) -> Document:
    """Return a record's ``text``, or its conversation; CalibrationError where it has neither."""
    if isinstance(record, Mapping):
        if isinstance(text := record.get("text"), str):
            return _unicode(text, where)
        for key in _CHATS:
            if isinstance(messages := record.get(key), list) and messages:
                return Chat(where, tuple(_message(m, f"{where}: {key}") for m in messages))
        keys = ", ".join(map(str, record)) or "nothing"
        raise CalibrationError(f"{where}: {_NEEDS}; it has {documents.clipped(keys)}")
    raise CalibrationError(f"{where}: {_NEEDS}; it is {documents.shown(record)}")


def of_rows(rows: Iterable[object], where: str) -> Iterator[Document]:
    """Yield the records of a table's rows."""
    return (of_record(row, f"{where}, row {i}") for i, row in enumerate(rows))


def of_parquet(path: Path) -> list[Document]:
    """Read the first rows of a parquet file.

    Raises:
        CalibrationError: Where the file cannot be read, or ``pyarrow`` is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CalibrationError(
            f"reading {path} needs: pip install pyarrow; or save its texts to a .jsonl with 'text'"
        ) from None
    rows: list[object] = []
    try:
        with parquet.ParquetFile(path) as file:
            kept = [n for n in file.schema_arrow.names if n in ("text", *_CHATS)]
            for batch in file.iter_batches(MAX_ROWS, columns=kept or None):
                rows += batch.to_pylist()
                if len(rows) >= MAX_ROWS:
                    break
    except (ArrowException, OSError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise CalibrationError(f"cannot read calibration data {path}: {reason}") from None
    return list(of_rows(rows[:MAX_ROWS], str(path)))


def _has_lines(text: str) -> bool:
    """Return whether a JSON text is several documents, one a line."""
    lines = (line for line in text.split("\n") if line.strip())
    first, second = next(lines, ""), next(lines, "")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(second)


def _message(message: object, where: str) -> dict[str, Any]:
    """Return a message with ``role`` and a ``content`` that is text."""
    if not isinstance(message, Mapping):
        raise CalibrationError(f"{where}: {documents.shown(message)} is no message")
    rest = {str(k): v for k, v in message.items() if k not in ("from", "value")}
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not (content is None or isinstance(content, str)):
        raise CalibrationError(
            f"{where}: a message needs a string 'role' and 'content', or 'from' and 'value'; "
            f"{documents.shown(dict(message))}"
        )
    return {**rest, "role": _ROLES.get(role, role), "content": _unicode(content or "", where)}


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _unicode(text: str, where: str) -> str:
    """Return ``text``; raise CalibrationError for half a surrogate pair, where tokenizers panic."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise CalibrationError(f"{where}: the text is no Unicode: {e.reason}") from None
    return text
