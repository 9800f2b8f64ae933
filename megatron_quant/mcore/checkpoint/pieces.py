"""Where the bytes of a distributed checkpoint's tensors lie, as its ``.metadata`` says.

What a pickle said is believed in nothing: every field is looked at before it is used.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from megatron_quant.documents import shown

_Where = dict[tuple[str, tuple[int, ...]], Any]
"""Key and offset of a piece -> torch's account of where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePiece:
    """A rectangle of a tensor, saved by ``torch.save`` in ``nbytes`` at ``offset`` of ``file``."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PiecedTensor:
    """A tensor of the checkpoint: the unsharded shape, and the pieces that ranks wrote of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[FilePiece, ...]


def shape_of(size: object) -> tuple[int, ...]:
    """Return a shape, or an offset; ValueError for what is none."""
    if not isinstance(size, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in size):
        raise ValueError("a shape is no list of whole numbers")
    return tuple(size)


def pieces_of(metadata: Any, keys: Iterable[str]) -> dict[str, PiecedTensor]:
    """Find the tensors ``keys`` in ``metadata``, torch's description of a checkpoint.

    Raises ValueError where it contradicts itself, or says of a piece what cannot be read.
    """
    wanted = set(keys)
    where: _Where = {}
    for index, info in metadata.storage_data.items():
        if index.fqn in wanted:
            start = () if index.offset is None else shape_of(index.offset)
            where[index.fqn, start] = info
    return {key: _tensor(key, metadata.state_dict_metadata[key], where) for key in sorted(wanted)}


def _tensor(key: str, described: Any, where: _Where) -> PiecedTensor:
    dtype, shape = described.properties.dtype, shape_of(described.size)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has no dtype")
    pieces = tuple(_pieces(key, shape, described.chunks, where))
    if sum(prod(p.size) for p in pieces) != prod(shape):
        raise ValueError(f"the pieces of {key} are not all of it")
    return PiecedTensor(dtype, shape, pieces)


def _pieces(
    key: str, shape: tuple[int, ...], chunks: Iterable[Any], where: _Where
) -> Iterator[FilePiece]:
    for chunk in chunks:
        start, size = shape_of(chunk.offsets), shape_of(chunk.sizes)
        inside = len(start) == len(size) == len(shape) and all(
            o + n <= whole for o, n, whole in zip(start, size, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"a piece of {key} is outside of it")
        if not prod(size):
            continue  # a rank that has nothing of the tensor, as FSDP cuts it
        info = where.get((key, start))
        if info is None:
            raise ValueError(f"nothing says where a piece of {key} is")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{key} is compressed")
        file, offset, nbytes = info.relative_path, info.offset, info.length
        numbers = all(type(n) is int and 0 <= n < 2**63 for n in (offset, nbytes))
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or not numbers:
            raise ValueError(f"{key} lies in {shown(file)}, which is no file beside it")
        yield FilePiece(start=start, size=size, file=file, offset=offset, nbytes=nbytes)
