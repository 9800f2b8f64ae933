"""This rank's part of a place: where it is scored, and what an option changes there."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from megatron_quant.search import Place


class Change(Protocol):
    """A change of the model that an option makes."""

    def put(self) -> Callable[[], None]:
        """Make it; return what undoes it."""


@dataclass(frozen=True)
class Fitted:
    """A quantizer that a module gets, as one of its attributes, while an option is in place."""

    module: nn.Module
    attribute: str
    quantizer: nn.Module

    def put(self) -> Callable[[], None]:
        """Put it in place; return what brings back the one that was there."""
        before = self.module.get_submodule(self.attribute)
        self.module.add_module(self.attribute, self.quantizer)
        return lambda: self.module.add_module(self.attribute, before)


@dataclass(frozen=True)
class Scope:
    """A module at whose output a place is scored.

    counted: whether this rank's part of the output counts; some outputs are equal on all ranks of
    a tensor-parallel group.
    """

    module: nn.Module
    name: str
    counted: bool


@dataclass(frozen=True)
class LivePlace:
    """This rank's part of a place; a rank of another pipeline stage has no scopes of it.

    options: what each option changes.
    """

    place: Place
    scopes: tuple[Scope, ...] = ()
    options: tuple[tuple[Change, ...], ...] = field(default=())

    @contextmanager
    def rounded(self, option: int) -> Iterator[None]:
        """Have the model round the place as an option says while the context lasts."""
        with ExitStack() as undone:
            for change in self.options[option] if self.options else ():
                undone.callback(change.put())
            yield
