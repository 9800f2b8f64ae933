"""Lay tensors out in files: the order, the offsets and the headers of a sharded checkpoint.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, a JSON header
padded with spaces to 8 bytes, the tensors without holes).
"""

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megatron_quant.documents import HEADER, check_regular, clipped, parse_json, printable, shown
from megatron_quant.errors import CheckpointError
from megatron_quant.fields import Fields

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}
"""torch dtype -> its name in a safetensors header."""
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
WEIGHTS = "model.safetensors"
"""The only file of a checkpoint without an index."""
INDEX = "model.safetensors.index.json"
"""File that says in which file each tensor is."""
MAX_HEADER = 100_000_000
"""Bytes of header that safetensors' readers accept."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A tensor of ``nbytes`` that has no place yet."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor on disk: ``nbytes`` at ``offset`` of ``file``, row-major, little-endian."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OutFile:
    """One safetensors file; ``header`` are its first bytes, the entries fill the rest."""

    name: str
    header: bytes
    size: int
    entries: tuple[TensorEntry, ...]


def lay_out(units: Iterable[Sequence[Draft]], max_shard_bytes: int) -> tuple[OutFile, ...]:
    """Lay ``units`` out in their order, in files of at most ``max_shard_bytes`` of tensors.

    The drafts of a unit share a file. A unit above the limit gets its own. Within a file, tensors
    are sorted by item size, largest first and otherwise in the given order. So every tensor is
    aligned to its item size without the holes that the format forbids.
    """
    shards = _split(units, max_shard_bytes)
    return tuple(
        _file(_name(i, len(shards)), sorted(shard, key=lambda d: -d.dtype.itemsize))
        for i, shard in enumerate(shards)
    )


def _split(units: Iterable[Sequence[Draft]], limit: int) -> list[list[Draft]]:
    shards: list[list[Draft]] = [[]]
    filled = 0
    for unit in units:
        size = sum(draft.nbytes for draft in unit)
        if filled and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].extend(unit)
        filled += size
    return shards


def _name(index: int, count: int) -> str:
    return (
        "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
    )


def _file(name: str, drafts: Sequence[Draft]) -> OutFile:
    header = header_bytes(drafts)
    assert len(header) <= MAX_HEADER, f"{name}: a header of {len(header)} bytes"
    entries = []
    offset = len(header)
    for d in drafts:
        entries.append(
            TensorEntry(
                name=d.name, dtype=d.dtype, shape=d.shape, file=name, offset=offset, nbytes=d.nbytes
            )
        )
        offset += d.nbytes
    return OutFile(name, header, offset, tuple(entries))


def header_bytes(drafts: Sequence[Draft]) -> bytes:
    """Return length and JSON of the header of a file that holds ``drafts`` in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for d in drafts:
        span = [offset, offset + d.nbytes]
        header[d.name] = {"dtype": DTYPES[d.dtype], "shape": d.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> bytes:
    """Read length and JSON of a safetensors header; CheckpointError where it is not whole."""
    check_regular(path)
    try:
        with path.open("rb") as stream:
            length = stream.read(8)
            count = struct.unpack("<Q", length)[0] if len(length) == 8 else MAX_HEADER + 1
            text = stream.read(count) if count <= MAX_HEADER else b""
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}; fetch it again") from e
    if len(text) != count:
        raise CheckpointError(f"{path} is truncated or no safetensors file; fetch it again")
    return length + text


class UnknownDtype(KeyError):
    """A tensor has a dtype that torch lacks."""

    def __str__(self) -> str:
        name, dtype = self.args
        return f"{clipped(printable(name))} has dtype {shown(dtype)}"


def entries_of(file: str, header: bytes) -> Iterator[TensorEntry]:
    """Yield the tensors of a file by its header, the inverse of :func:`header_bytes`.

    Raises:
        CheckpointError: Where it is no header of safetensors.
        UnknownDtype: For a tensor of a dtype that torch lacks.
    """
    where = f"the header of {file}"
    tensors = Fields({"it": parse_json(header[8:], where, HEADER)}, where).part("it").values
    for name in tensors:
        if name != "__metadata__":
            yield _entry(name, Fields(tensors, where).part(name), file, len(header))


def _entry(name: str, tensor: Fields, file: str, first: int) -> TensorEntry:
    said = tensor.text("dtype")
    if said not in _DTYPES:
        raise UnknownDtype(name, said)
    dtype, shape, span = _DTYPES[said], tensor.get("shape"), tensor.get("data_offsets")
    if not _are_counts(shape):
        raise tensor.refused("shape", "a list of whole numbers")
    if not _are_counts(span) or len(span) != 2 or span[1] - span[0] != prod(shape) * dtype.itemsize:
        raise tensor.refused("data_offsets", f"where its {prod(shape)} elements begin and end")
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        file=file,
        offset=first + span[0],
        nbytes=span[1] - span[0],
    )


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
