"""Typed access to a JSON or YAML object that somebody else wrote.

The caller says what a key's value must be. Any other value is one error that names the key, the
value and what is expected. ``true`` is not a number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_quant.documents import shown
from megatron_quant.errors import CheckpointError, QuantError

MOST = 2**31 - 1
"""The largest count of anything: kernels of engines index with 32 bits."""


@dataclass(frozen=True)
class Fields:
    """An object and its keys. A key that is null counts as absent.

    values: the object. where: its name in messages. error: the class that is raised.
    """

    values: Mapping[str, Any]
    where: str = "config.json"
    error: type[QuantError] = CheckpointError

    def get(self, key: str) -> Any:
        """Return the value, of any type; None if there is none."""
        return self.values.get(key)

    def refused(self, key: str, expected: str) -> QuantError:
        """Return the error for a value that is not what was ``expected``."""
        return self.error(f"{key}={shown(self.get(key))} in {self.where} must be {expected}")

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """Return a whole number from 1 to ``most``."""
        value = self._or(key, default)
        if type(value) is not int or value < 1:
            raise self.refused(key, "a whole number above 0")
        if value > most:
            raise self.refused(key, f"at most {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number above 0."""
        value = self._or(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refused(key, "a number above 0")
        try:
            return float(value)
        except OverflowError:
            raise self.refused(key, "a number above 0 that a float holds") from None

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self._or(key, default)
        if not isinstance(value, bool):
            raise self.refused(key, "true or false")
        return value

    def whole(self, key: str) -> int | None:
        """Return a whole number of either sign; None if there is none."""
        value = self.get(key)
        if value is not None and type(value) is not int:
            raise self.refused(key, "a whole number")
        return value

    def text(self, key: str, default: str = "") -> str:
        """Return a string."""
        value = self._or(key, default)
        if not isinstance(value, str):
            raise self.refused(key, "a string")
        return value

    def part(self, key: str) -> "Fields":
        """Return an object; an empty one if there is none."""
        value = self._or(key, {})
        if not isinstance(value, Mapping):
            raise self.refused(key, "an object")
        return Fields(value, f"{key} of {self.where}", self.error)

    def parts(self, key: str) -> "dict[str, Fields]":
        """Return the objects in an object, by their keys."""
        inner = self.part(key)
        return {name: inner.part(name) for name in inner.values}

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings; empty if there is none."""
        value = self._or(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.refused(key, "a list of strings")
        return tuple(value)

    def only(self, key: str, allowed: tuple[object, ...]) -> None:
        """Refuse a value that is given but not one of ``allowed``."""
        value = self.get(key)
        if value is not None and not any(_same(value, one) for one in allowed):
            known = " or ".join(repr(one) for one in allowed)
            raise self.error(
                f"{key}={shown(value)} in {self.where} is not supported, only {known} is; "
                "use a model without it"
            )

    def _or(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is None:
            raise self.error(f"{self.where} has no {key!r}; add it, as transformers writes it")
        return default if value is None else value


def _same(value: object, other: object) -> bool:
    """Return whether two values are equal in JSON: 1 equals 1.0, but not true."""
    return value == other and isinstance(value, bool) is isinstance(other, bool)
