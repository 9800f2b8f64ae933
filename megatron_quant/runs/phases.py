"""How a run shows its progress."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

Shown = TypeVar("Shown")


class Phases(Protocol):
    """Shows progress; ``megatron_quant.cli.console.ConsolePhases`` is one."""

    def bar(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a phase of ``total`` steps; it yields a function to call with steps done."""
        ...

    def transfer(self, name: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a phase that moves ``nbytes`` bytes; it yields a function to call with bytes."""
        ...

    def time(self, name: str) -> AbstractContextManager[None]:
        """Begin a phase without steps."""
        ...


class Quiet:
    """Shows nothing; for programs that import the library."""

    def bar(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a phase of ``total`` steps; show nothing."""
        return nullcontext(_ignore)

    def transfer(self, name: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a phase that moves ``nbytes`` bytes; show nothing."""
        return nullcontext(_ignore)

    def time(self, name: str) -> AbstractContextManager[None]:
        """Begin a phase without steps; show nothing."""
        return nullcontext()


class Timed:
    """Shows phases as others do, and keeps their time.

    Attributes:
        seconds: Phase -> seconds, in the order in which they began. What a phase within a phase
            takes (an export verifies before its files have their names) is in its own alone.
    """

    def __init__(self, shown: Phases) -> None:
        """``shown``: who shows them."""
        self._shown = shown
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds of the phases that ended within the open one

    def bar(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Time a phase of ``total`` steps."""
        return self._timed(name, self._shown.bar(name, total))

    def transfer(self, name: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Time a phase that moves ``nbytes`` bytes."""
        return self._timed(name, self._shown.transfer(name, nbytes))

    def time(self, name: str) -> AbstractContextManager[None]:
        """Time a phase without steps."""
        return self._timed(name, self._shown.time(name))

    @contextmanager
    def _timed(self, name: str, phase: AbstractContextManager[Shown]) -> Iterator[Shown]:
        start, before, self._inner = time.perf_counter(), self._inner, 0.0
        self.seconds[name] = 0.0
        try:
            with phase as shown:
                yield shown
        finally:
            taken = time.perf_counter() - start
            self.seconds[name] = taken - self._inner
            self._inner = before + taken


def _ignore(steps: int) -> None:
    """Ignore the steps."""
