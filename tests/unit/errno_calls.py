"""Arms ``errno_shim.c``, which is preloaded into this process."""

import ctypes
import errno
from pathlib import Path

CALLS = {
    "open": errno.EIO,
    "openat": errno.EIO,
    "rename": errno.EIO,
    "fsync": errno.EIO,
    "write": errno.ENOSPC,
    "pwrite": errno.ENOSPC,
    "ftruncate": errno.ENOSPC,
    "fallocate": errno.ENOSPC,
}
"""Each kind of call, and what it fails with."""


def arm(below: Path, call: str, number: int = 0) -> None:
    """Have the ``number``-th such call below a folder fail, none with 0; count anew."""
    shim = ctypes.CDLL(None)
    shim.shim_arm(str(below).encode(), call.encode(), ctypes.c_long(number), CALLS[call])


def disarm() -> None:
    ctypes.CDLL(None).shim_arm(b"", b"", ctypes.c_long(0), 0)


def seen() -> int:
    """How many calls there were since they were armed."""
    shim = ctypes.CDLL(None)
    shim.shim_seen.restype = ctypes.c_long
    return int(shim.shim_seen())
