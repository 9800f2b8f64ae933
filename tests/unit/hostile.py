"""Values that no reader expects, put into every place of a document."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest

from megatron_quant.errors import QuantError

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2.5,
    10**9,
    10**400,
    1e308,
    float("nan"),
    "",
    "4",
    "x" * 1000,
    "re:(a+)+$",
    "(",
    "a\x1b[2J\n\u202e",
    [],
    [[]],
    [None],
    [1, "a"],
    {},
    {"a": None},
    {"a": {"a": [{}]}},
)


def changed(document: Any) -> Iterator[tuple[str, Any]]:
    """Where and what, and the document with that: every value in every place, and without it."""
    for place in _places(document, ()):
        for value in VALUES:
            yield f"{place} = {str(value)[:40]!r}", _with(document, place, value)
        if place and isinstance(place[-1], str):
            yield f"{place} is not there", _with(document, place, ...)


def _places(value: Any, at: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*at, key))
    elif isinstance(value, list) and value:
        yield from _places(value[0], (*at, 0))


def _with(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    made = deepcopy(document)
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return made


def outcomes(document: Any, read: Callable[[Any], object]) -> tuple[int, int]:
    """How many changes of the document are read, and how many refused in one line that is short.

    Whatever else is raised fails the test, with the place and the value.
    """
    taken = refused = 0
    for where, one in changed(document):
        try:
            read(one)
            taken += 1
        except QuantError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 1500, (where, message)
            refused += 1
        except BaseException as error:
            pytest.fail(f"{where}: {type(error).__name__}: {error}")
    return taken, refused
