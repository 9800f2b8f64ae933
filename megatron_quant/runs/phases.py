"""How a run shows its progress."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


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


def _ignore(steps: int) -> None:
    """Ignore the steps."""
