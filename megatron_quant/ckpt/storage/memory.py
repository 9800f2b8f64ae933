"""Give freed memory back to the system, so that bounding held memory bounds used memory."""

import ctypes

_LIBC = ctypes.CDLL(None)


def give_back() -> None:
    """Return freed memory in the heap to the system; do nothing where the C library cannot.

    glibc keeps a freed block that lies before any small one, and torch's aligned blocks do not
    quite fit into the holes. A process that held two tensors at a time came to use eight.
    """
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
