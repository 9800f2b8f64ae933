"""Freed memory goes back to the system, so that a bound on what is held is one on what is used."""

import ctypes

_LIBC = ctypes.CDLL(None)


def give_back() -> None:
    """Return freed memory in the heap to the system; nothing where the C library cannot.

    glibc keeps a freed block that any small one lies behind, and torch's aligned ones do not quite
    fit into the holes: a process that holds two tensors at a time came to use eight.
    """
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
