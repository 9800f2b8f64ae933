"""Read JSON and YAML that somebody else may have written, from files or bytes.

The caller chooses the error; a document's content raises no other. Bytes, values and depth are
limited before the parser runs. Only regular files are read: a pipe or a device could block the
process or fill its memory.
"""

import json
import os
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from megatron_quant.errors import CheckpointError, QuantError

MB = 1_000_000
_SHOWN = 120  # characters of a value in a message
_SCALAR = 1000  # characters of a YAML scalar that is not text: parsing numbers is quadratic


@dataclass(frozen=True)
class Limits:
    """Limits of a document: bytes, values (keys count too), and levels of nesting."""

    nbytes: int
    values: int
    depth: int = 64


CONFIG = Limits(64 * MB, 2_000_000)
"""Limits of a config. The largest published ones list every unquantized module."""
INDEX = Limits(256 * MB, 3_000_000)
"""Limits of an index or a manifest: a line for every tensor."""
HEADER = Limits(100 * MB, 3_000_000)
"""Limits of a safetensors header: three lists for every tensor."""
RECIPE = Limits(2 * MB, 100_000)
"""Limits of a recipe. Its parser is slow."""


def read_bytes(path: Path, limits: Limits, error: type[QuantError] = CheckpointError) -> bytes:
    """Return the content of ``path``; raise ``error`` if it is no regular file or too large."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check_file(path, os.fstat(fd), limits, error)
            with open(fd, "rb", closefd=False) as stream:
                content = stream.read(limits.nbytes + 1)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL or a surrogate in the name
        reason = getattr(e, "strerror", None) or str(e)
        raise error(f"{path} cannot be read: {reason}") from None
    if len(content) > limits.nbytes:
        raise error(_too_large(path, len(content), limits))
    return content


def check_file(path: Path, limits: Limits, error: type[QuantError] = CheckpointError) -> None:
    """Raise ``error`` unless ``path`` is a regular file that is safe to give to a library."""
    try:
        found = path.stat()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise error(f"{path} cannot be read: {reason}") from None
    _check_file(path, found, limits, error)


def check_regular(path: Path, error: type[QuantError] = CheckpointError) -> None:
    """Run :func:`check_file` without a size limit."""
    check_file(path, Limits(2**63, 0), error)


def _check_file(path: Path, found: os.stat_result, limits: Limits, error: type[QuantError]) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is no regular file")
    if found.st_size > limits.nbytes:
        raise error(_too_large(path, found.st_size, limits))


def _too_large(path: Path, size: int, limits: Limits) -> str:
    return (
        f"{path} has {size} bytes, more than the {limits.nbytes} that such a file may have: it is "
        "damaged, or another kind of file"
    )


def read_json(
    path: Path, limits: Limits = CONFIG, error: type[QuantError] = CheckpointError
) -> Any:
    """Read the value in the JSON file ``path``."""
    return parse_json(read_bytes(path, limits, error), str(path), limits, error)


def parse_json(
    content: bytes | str,
    where: str,
    limits: Limits = CONFIG,
    error: type[QuantError] = CheckpointError,
) -> Any:
    """Parse a JSON document; ``where`` names it in the message of ``error``.

    NaN and Infinity are read, because configs of transformers have them. Text that is not Unicode,
    such as half of a surrogate pair, is refused.
    """
    refused = f"{where} cannot be read as JSON"
    try:
        text = _utf8(content)
        opened = text.count("[") + text.count("{")
        values = opened + text.count(",")
        if len(text) > limits.nbytes:
            raise error(f"{refused}: it has more than {limits.nbytes} characters")
        if values > limits.values:
            raise error(f"{refused}: it has {values} values, more than {limits.values}")
        value = json.loads(text)
        if opened > limits.depth and _depth(value) > limits.depth:
            raise RecursionError
        if "\\u" in text:
            _text(value).encode()
    except RecursionError:
        raise error(f"{refused}: it is nested deeper than {limits.depth} levels") from None
    except ValueError as e:  # UnicodeError is one too
        raise error(f"{refused}: {e}") from None
    return value


def _utf8(content: bytes | str) -> str:
    return content if isinstance(content, str) else content.decode("utf-8-sig")


def _text(value: Any) -> str:
    """Join all text in a JSON value."""
    found: list[str] = []
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            left += [*one, *one.values()]
    return "\n".join(found)


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        inner = [v for v in level if isinstance(v, list | dict)]
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
    return depth


def parse_yaml(
    content: bytes | str, where: str, error: type[QuantError], limits: Limits = RECIPE
) -> Any:
    """Parse a YAML document; ``where`` names it in the message of ``error``.

    Aliases are read; their values count against the limit each time they are named.
    """
    try:
        loader = yaml.SafeLoader(_utf8(content))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node, limits)
            value = loader.construct_document(node)
            _text(value).encode()
            return value
        finally:
            loader.dispose()
    except RecursionError:
        raise error(f"{where} is nested deeper than {limits.depth} levels") from None
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, TypeError) as e:
        # a bad date, number or merge: PyYAML raises whatever its parser does
        reason = " ".join(str(e).split())
        raise error(
            f'{where} is not valid YAML: {reason} (patterns need quotes: "*mlp*")'
        ) from None


def _check_nodes(
    node: yaml.Node, limits: Limits, depth: int = 0, seen: dict[yaml.Node, int | None] | None = None
) -> int:
    """Count a node's values, aliases included; ValueError if they are too many."""
    seen = {} if seen is None else seen
    if node in seen:
        found = seen[node]
        if found is None:
            raise ValueError("an alias is inside of what it stands for")
        return found
    if depth > limits.depth:
        raise RecursionError
    seen[node] = None
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > _SCALAR and node.tag != "tag:yaml.org,2002:str":
            raise ValueError(f"a number of {len(node.value)} characters")
        inner: list[yaml.Node] = []
    elif isinstance(node, yaml.MappingNode):
        inner = [n for pair in node.value for n in pair]
    else:
        inner = node.value
    count = 1
    for one in inner:
        count += _check_nodes(one, limits, depth + 1, seen)
        if count > limits.values:
            raise ValueError(f"more than {limits.values} values")
    seen[node] = count
    return count


def shown(value: object) -> str:
    """Spell ``value`` for a message: as Python does, on one line, and not too long."""
    return clipped(repr(_few(value, 4)))


def _few(value: object, depth: int) -> object:
    """Return the part of a value that is shown, without going through all of it."""
    if isinstance(value, str | bytes):
        return value[: _SHOWN + 1]
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list | dict) and depth == 0:
        return ...
    if isinstance(value, list):
        return [_few(v, depth - 1) for v in value[:20]]
    if isinstance(value, dict):
        return {_few(k, 0): _few(value[k], depth - 1) for k in islice(value, 20)}
    return value


def clipped(text: str) -> str:
    """Return ``text``, cut if it is too long for a message."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def printable(text: str) -> str:
    """Escape characters of ``text`` that move the cursor or reorder text on a screen.

    Line ends and tabs are escaped too, so that a name stays on one line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == " " else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    if unicodedata.category(char) == "Zs":  # other spaces are harmless
        return char
    return char.encode("unicode_escape").decode("ascii")


def check_output_file(flag: str, path: Path | None) -> None:
    """Refuse, before the work, a file of ``flag`` that could not be written after it."""
    if path is None:
        return
    reason = ""
    if path.is_dir():
        reason = "is a directory"
    elif not path.parent.is_dir():
        reason = "is in a directory that does not exist"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "may not be written"
    if reason:
        raise QuantError(f"{flag} {path} {reason}; choose another file")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` into the file ``path`` as UTF-8. Raises as :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write the file ``path``: it is there whole, or as it was before.

    Raises:
        QuantError: For what the disk refuses.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a terminal
            path.write_bytes(content)
            return
        to = path.resolve()  # of a link, what it leads to
        unfinished = to.with_name(f"{to.name}.incomplete")
        try:
            unfinished.write_bytes(content)
            os.replace(unfinished, to)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as e:
        raise QuantError(
            f"{path} cannot be written: {e.strerror or e}; choose another file"
        ) from None


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Write ``found`` into the file ``path``, for people and programs. Raises as write_text."""
    write_text(path, json.dumps(found, indent=2) + "\n")


def write_yaml(path: Path, found: Mapping[str, Any]) -> None:
    """Write ``found`` into the file ``path`` as YAML, keys in the order given."""
    write_text(path, yaml.safe_dump(dict(found), sort_keys=False, width=100))
