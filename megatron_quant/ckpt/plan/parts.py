"""The tensors of an export, and the rectangles of them that ranks write."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_quant.ckpt.dialects import StorageScheme, Stored
from megatron_quant.ckpt.plan.stacks import Stack
from megatron_quant.ckpt.storage import TensorEntry
from megatron_quant.formats import Region
from megatron_quant.models import Box, Param, Source


@dataclass(frozen=True, slots=True)
class Piece:
    """The box of one file tensor that a part fills."""

    entry: TensorEntry
    stored: Stored
    box: Box


@dataclass(frozen=True)
class ExpertPlace:
    """Where a stack has a tensor of a single expert.

    Attributes:
        stack: The stack.
        expert: Index in it.
        turn: First row that is the tensor's own.
    """

    stack: Stack
    expert: int
    turn: int


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredTensor:
    """A Hugging Face tensor and the file tensors that store it (parallel to ``scheme.stored``).

    Attributes:
        param: The logical parameter that holds it.
        source: The tensor.
        scheme: How it is stored.
        entries: Tensors that store it. No file has those of a tensor in a stack.
        place: Where a stack has it; None where the files have it as it is.
    """

    param: Param
    source: Source
    scheme: StorageScheme
    entries: tuple[TensorEntry, ...]
    place: ExpertPlace | None = None

    @property
    def in_files(self) -> tuple[TensorEntry, ...]:
        """Return the file tensors that hold it, alone or with others."""
        return self.entries if self.place is None else self.place.stack.entries


@dataclass(frozen=True, eq=False)
class RankPart:
    """A rectangle of a Hugging Face tensor that one rank writes, from its own values.

    Attributes:
        target: The tensor.
        region: The rectangle, and where the rank's parameter has it.
        owner: The rank that writes it.
    """

    target: StoredTensor
    region: Region
    owner: int

    @property
    def param(self) -> Param:
        """Return the logical parameter that holds the tensor."""
        return self.target.param

    @cached_property
    def src(self) -> Box:
        """Return the rectangle in the Hugging Face tensor."""
        return box_of(self.region)

    @property
    def pieces(self) -> Iterator[Piece]:
        """Yield the boxes of file tensors that it fills."""
        target = self.target
        filled = target.scheme.boxes(target.source.shape, self.src)
        for entry, stored, box in zip(target.entries, target.scheme.stored, filled, strict=True):
            if box is not None:
                yield Piece(entry, stored, box)

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Return the tensors that store the target."""
        return self.target.entries

    @cached_property
    def nbytes(self) -> int:
        """Count the bytes that it fills."""
        return self.target.scheme.nbytes(self.target.source.shape, self.src)


def box_of(region: Region) -> Box:
    """Return the rectangle of the tensor that a region is."""
    return Box(region.start, region.size)
