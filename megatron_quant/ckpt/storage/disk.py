"""Write to a disk that may be full, and say so in one line."""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_quant.errors import CheckpointError, ExportError

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system that lacks a call."""
EXPORT_DIR = "--export-dir"
_WRITABLE = "choose another {place}, one that you may write"
_DIRECTORY = "choose another {place}, one that is a directory"
_WAYS_OUT = {
    errno.ENOSPC: "free some space or choose another {place}",
    errno.EDQUOT: "free some of the quota or choose another {place}",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EROFS: _WRITABLE,
    errno.ENOTDIR: _DIRECTORY,
    errno.EEXIST: _DIRECTORY,
    errno.ENOENT: "choose another {place}, one that all ranks see",
}


@contextmanager
def explained(path: Path, doing: str, place: str = EXPORT_DIR) -> Iterator[None]:
    """Turn an OSError of the block into an ExportError that names the file and the way out.

    Args:
        path: File to name where the OSError names none.
        doing: What failed, for the message.
        place: The flag that chose the place, or a word for it; another one is the way out.
    """
    try:
        yield
    except OSError as error:
        way_out = _WAYS_OUT.get(error.errno or 0, "choose another {place}").format(place=place)
        if error.errno == errno.EFBIG and place == EXPORT_DIR:
            way_out = f"choose a smaller --max-shard-size, or {way_out}"
        named = error.filename or path
        raise ExportError(f"{named}: {doing}: {error.strerror or error}; {way_out}") from error


def allocate(fd: int, size: int) -> None:
    """Give the file ``size`` bytes, claimed from the disk where the file system can.

    It makes the system's own call. glibc's ``posix_fallocate`` reads every page where the file
    system has no such call, and a file that was written would be read.
    """
    os.ftruncate(fd, size)
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if not size or call is None:
        return
    while call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code in UNSUPPORTED:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, however few bytes the system takes at a time."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def read_source(path: Path) -> bytes:
    """Read a whole file of a source. Raises CheckpointError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; make it readable, or fetch it again"
        ) from error


def write_file(path: Path, content: bytes, fsync: bool) -> None:
    """Write a whole file, with ``fsync`` onto the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        if fsync:
            os.fsync(stream.fileno())


def forget(fd: int, offset: int, nbytes: int) -> None:
    """Drop a range of the file from the system's cache, where the system can."""
    if nbytes and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def append(fd: int, data: bytes) -> None:
    """Write all of ``data`` at the end of a file that was opened for appending."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` survive a power cut, where the file system can."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def overlap(one: Path, other: Path) -> bool:
    """Return whether one of two directories is the other, or lies in it."""
    one, other = one.resolve(), other.resolve()
    if one == other or one in other.parents or other in one.parents:
        return True
    return one.exists() and other.exists() and one.samefile(other)
