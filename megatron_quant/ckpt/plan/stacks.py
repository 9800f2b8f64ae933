"""Put tensors of single experts into the stacks that some engines load alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from megatron_quant.ckpt.dialects import (
    BLOCKS,
    GROUP,
    Dialect,
    StackPlace,
    StorageScheme,
    stack_name,
    stack_place,
    stack_shape,
)
from megatron_quant.ckpt.storage import Draft, TensorEntry
from megatron_quant.errors import FormatError
from megatron_quant.models import Source

Stored = tuple[Source, StorageScheme]


@dataclass(frozen=True)
class Stack:
    """The file tensors of all experts' tensors of one kind, parallel to their schemes' ``stored``.

    Attributes:
        suffixes: What a single expert's tensors are called.
        entries: The stacks.
    """

    suffixes: tuple[str, ...]
    entries: tuple[TensorEntry, ...]


def places_of(wanted: Sequence[Stored], dialect: Dialect) -> dict[str, StackPlace]:
    """Return where stacks have experts' tensors, by name, for layers whose experts are stacked.

    Quantized experts are stacked where the dialect does so, others always.

    Args:
        wanted: Tensors and how each is stored.
        dialect: Dialect of the export.
    """
    found = {s.name: place for s, _ in wanted if (place := stack_place(s.name)) is not None}
    single = {
        found[source.name].experts
        for source, scheme in wanted
        if source.name in found and scheme.weights is not None and not dialect.stacks
    }
    return {name: place for name, place in found.items() if place.experts not in single}


def drafts_of(members: Sequence[tuple[StackPlace, Source, StorageScheme]]) -> list[Draft]:
    """Return the file tensors of one stack.

    Args:
        members: Place, tensor and scheme of everything in it.

    Raises:
        FormatError: For rows that have no whole groups.
    """
    place, source, scheme = members[0]
    experts = 1 + max(member.expert for member, _, _ in members)
    assert len(members) == experts * place.turns, f"{place.stack}: {len(members)} tensors"
    described = zip(
        suffixes_of(place, scheme), scheme.stored, scheme.shapes(source.shape), strict=True
    )
    drafts = []
    for suffix, stored, shape in described:
        if suffix == BLOCKS and source.shape[1] % GROUP:
            raise FormatError(
                f"{source.name}: its {source.shape[1]} inputs are not a multiple of {GROUP}, as "
                "stacks of experts in MXFP4 need; exclude the experts in the recipe"
            )
        whole = stack_shape(suffix, shape, experts, place.turns)
        name, size = stack_name(place.stack, suffix), prod(whole) * stored.dtype.itemsize
        drafts.append(Draft(name, stored.dtype, whole, size))
    return drafts


def suffixes_of(place: StackPlace, scheme: StorageScheme) -> tuple[str, ...]:
    """Return what the tensors that store one of a stack's are called."""
    if scheme.weights is None:
        return (place.leaf,)
    return tuple(stored.suffix for stored in scheme.stored)


def single_entries(drafts: Sequence[Draft], stack: Sequence[TensorEntry]) -> Iterator[TensorEntry]:
    """Yield entries of a tensor that no file has alone: it is made like any other, then stacked."""
    for draft, entry in zip(drafts, stack, strict=True):
        yield replace(entry, name=draft.name, shape=draft.shape, nbytes=draft.nbytes)


def grouped(names: Sequence[str], places: Mapping[str, StackPlace]) -> dict[str, list[int]]:
    """Group tensors that share a stack, in the order of the first of each; others stay alone.

    Args:
        names: All tensors.
        places: Result of :func:`places_of`.
    """
    units: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        place = places.get(name)
        key = name if place is None else f"{place.stack}.{place.leaf}"
        units.setdefault(key, []).append(number)
    return units
