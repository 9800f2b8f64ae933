"""Find the numbers that ``torch.save`` wrote of one tensor: a zip in the middle of a larger file.

Its pickle is never loaded before every opcode of it is known to build nothing but such a tensor.
"""

import io
import pickle
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_quant.errors import CheckpointError

_PICKLE = 4096
"""Bytes of the pickle that says dtype, shape and strides of one tensor."""
_LOCAL = 30
"""Bytes of a zip's header before each file, where its name begins."""
_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MEMOIZE"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("NEWTRUE", "NEWFALSE", "NONE"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"),
}
_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in (
        *(("BFloat16", torch.bfloat16), ("Half", torch.float16), ("Float", torch.float32)),
        *(("Double", torch.float64), ("Byte", torch.uint8), ("Long", torch.int64)),
        *(("Int", torch.int32), ("Bool", torch.bool), ("Float8_e4m3fn", torch.float8_e4m3fn)),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """Numbers at ``offset`` of a file, and how a tensor of ``shape`` lies in them.

    count: numbers there are. strides, first: in numbers, as torch has them.
    """

    dtype: torch.dtype
    offset: int
    count: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    name: str


def find_saved(file: Path, offset: int, nbytes: int) -> SavedTensor:
    """Find the tensor that ``torch.save`` wrote in ``nbytes`` at ``offset`` of ``file``.

    Raises CheckpointError where another thing lies there, or the file cannot be read.
    """
    try:
        with file.open("rb") as stream, zipfile.ZipFile(_Part(stream, offset, nbytes)) as found:
            return _find(found, offset)
    except Exception as e:  # whatever a zip or a pickle that is none makes of itself
        reason = str(e) or type(e).__name__
        raise CheckpointError(
            f"{file} cannot be read at byte {offset}: {reason}; fetch or save it again"
        ) from None


def _find(found: zipfile.ZipFile, offset: int) -> SavedTensor:
    infos = {info.filename.partition("/")[2]: info for info in found.infolist()}
    if "byteorder" in infos and _content(found, infos["byteorder"]) != b"little":
        raise ValueError("its numbers are big-endian")
    pickled = _content(found, infos["data.pkl"])
    odd = [op.name for op, _, _ in pickletools.genops(pickled) if op.name not in _OPCODES]
    if odd:
        raise ValueError(f"no tensor is pickled with {odd[0]}")
    storage, first, shape, strides = _Reader(io.BytesIO(pickled)).load()
    data = infos[f"data/{storage.name}"]
    if data.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    count, reach = data.file_size // storage.dtype.itemsize, first
    for n, step in zip(shape, strides, strict=True):
        if not all(type(x) is int and x >= 0 for x in (n, step)):
            raise ValueError("its shape is none")
        reach += (n - 1) * step
    if type(first) is not int or not 0 <= first <= reach < max(count, 1):
        raise ValueError("its shape is larger than what is stored")
    stream: Any = found.fp
    stream.seek(data.header_offset)
    head = stream.read(_LOCAL)
    after = sum(int.from_bytes(head[i : i + 2], "little") for i in (26, 28))  # name and extra field
    begins = data.header_offset + _LOCAL + after
    return SavedTensor(
        dtype=storage.dtype,
        offset=offset + begins,
        count=count,
        shape=tuple(shape),
        strides=tuple(strides),
        first=first,
    )


def _content(found: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > _PICKLE or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is larger than one of a tensor")
    return found.read(info)


class _Reader(pickle.Unpickler):
    """Unpickles (storage, first, shape, strides), from stand-ins for torch's functions alone."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("collections", "OrderedDict"): _nothing,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, name, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(name, str):
            raise pickle.UnpicklingError("it names no storage")
        return _Storage(dtype, name)


def _tensor(storage: _Storage, first: int, shape: object, strides: object, *_: object) -> object:
    return storage, first, shape, strides


def _parameter(tensor: object, *_: object) -> object:
    return tensor


def _nothing() -> None:
    """Stand for the hooks of a tensor: there are none."""


class _Part(io.RawIOBase):
    """``size`` bytes of a file, as a file of their own."""

    def __init__(self, stream: io.BufferedReader, start: int, size: int) -> None:
        self._stream, self._start, self._size, self._at = stream, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(origin + offset, 0)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        self._stream.seek(self._start + self._at)
        found = self._stream.read(wanted)
        self._at += len(found)
        return found
