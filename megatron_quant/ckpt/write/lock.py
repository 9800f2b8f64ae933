"""Let one run at a time write a directory, by a lock that ends with the process."""

import errno
import fcntl
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

from megatron_quant.ckpt.storage import EXPORT_DIR, UNSUPPORTED
from megatron_quant.errors import ExportError

LOCK = ".megatron_quant_lock.partial"
"""The file that is locked, in the directory of the export."""
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (*UNSUPPORTED, errno.ENOLCK)


class Lock:
    """A lock that is held until :meth:`release`, or until the process ends in any way.

    It is a POSIX lock: forks do not inherit it, and NFS keeps it across hosts. If the file system
    has no locks, a line says so and nothing is locked.
    """

    def __init__(self, directory: Path, place: str = EXPORT_DIR) -> None:
        """Take the lock. Raises ExportError if another process holds it, and OSError.

        place: the flag that chose the place, or a word for it; another one is the way out.
        """
        self._path, self._place = directory / LOCK, place
        self._stream: IO[str] | None = None
        while self._stream is None:
            stream = _opened(self._path)
            try:
                self._take(stream)
            except BaseException:
                stream.close()
                raise
            if _is_at(self._path, stream):
                self._stream = stream
            else:  # its holder removed it between the two calls
                stream.close()

    def _take(self, stream: IO[str]) -> None:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise ExportError(
                    f"{self._path.parent} is being written by another run ({_holder(stream)}): "
                    f"wait for its end, or choose another {self._place}"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            logging.getLogger(__name__).warning(
                "%s: this file system has no locks: make sure that no other run writes there",
                self._path.parent,
            )
        try:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
        except OSError:
            with suppress(OSError):
                self._path.unlink()
            raise

    def release(self) -> None:
        """Let others in, and remove the file."""
        if self._stream is not None:
            with suppress(OSError):
                self._path.unlink()
            self._stream.close()
            self._stream = None


def _opened(path: Path) -> IO[str]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "r+", errors="replace")


def _is_at(path: Path, stream: IO[str]) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _holder(stream: IO[str]) -> str:
    said = "".join(c for c in stream.read(200) if c.isprintable())
    return said or "its process is not known"
