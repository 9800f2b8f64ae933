"""The parts of stacks: one expert's tensors, which a rank makes and writes together."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from megatron_quant.ckpt.plan.parts import ExpertPlace, Piece, RankPart
from megatron_quant.ckpt.storage import TensorEntry
from megatron_quant.models import Box


@dataclass(frozen=True)
class Slab:
    """One expert's part of a stack.

    Attributes:
        parts: The tensors whose rows it has in turn; each is whole.
    """

    parts: tuple[RankPart, ...]

    @property
    def place(self) -> ExpertPlace:
        """Return where the stack has the first of the tensors."""
        place = self.parts[0].target.place
        assert place is not None
        return place

    @property
    def owner(self) -> int:
        """Return the rank that makes and writes it."""
        return self.parts[0].owner

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Return the boxes of file tensors that it fills."""
        stored = self.parts[0].target.scheme.stored
        return tuple(
            Piece(e, s, Box((self.place.expert, *(0 for _ in e.shape[1:])), (1, *e.shape[1:])))
            for e, s in zip(self.place.stack.entries, stored, strict=True)
        )

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Return the file tensors that it fills a part of."""
        return self.place.stack.entries

    @cached_property
    def nbytes(self) -> int:
        """Count the bytes that it fills."""
        return sum(part.nbytes for part in self.parts)


def with_slabs(parts: Iterable[RankPart]) -> tuple[RankPart | Slab, ...]:
    """Put the parts of stacks together, each at the place of its first; others stay alone."""
    found: dict[object, list[RankPart]] = {}
    for part in parts:
        place = part.target.place
        key = part if place is None else (place.stack.entries[0].name, place.expert)
        found.setdefault(key, []).append(part)
    return tuple(
        of_key[0] if of_key[0].target.place is None else Slab(tuple(sorted(of_key, key=_turn)))
        for of_key in found.values()
    )


def _turn(part: RankPart) -> int:
    place = part.target.place
    assert place is not None
    return place.turn
