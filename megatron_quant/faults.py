"""Carry the error that a rank raised to the other ranks and to the screen."""

import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_quant.documents import printable
from megatron_quant.errors import QuantError, RankError

MINUTES = 120.0
"""How long ranks wait for the slowest one by default."""
_HAD = "_megatron_quant_had"
_OUT_OF_MEMORY = (
    "this rank has too little memory: use more ranks (a larger --tp, --pp or --ep), a smaller "
    "--calib-batch-size or --calib-seq-length, or --stream"
)


@dataclass(frozen=True)
class Fault:
    """An error of one rank, in a form that every other rank can read.

    line: the message for people. error: a user's error, which every rank raises alike; None for a
    bug or a foreign exception. interrupted: whether it was Ctrl-C.
    """

    line: str
    error: QuantError | None = None
    interrupted: bool = False


@dataclass(frozen=True)
class Had:
    """The message of an error that all ranks raise, and the ranks that had it first.

    is_bug: whether it is an error that a user cannot act on.
    """

    line: str
    ranks: tuple[int, ...]
    is_bug: bool


def had(error: BaseException) -> Had | None:
    """Return the note that :func:`shared` left on ``error``; None if only this rank has it."""
    found = vars(error).get(_HAD)
    return found if isinstance(found, Had) else None


def trace_of(error: BaseException) -> str:
    """Return the traceback as Python prints it."""
    return "".join(traceback.format_exception(error))


def line_of(error: BaseException) -> str:
    """Return one printable line: a user's error's message, or another's type and message."""
    text = one_line(str(error))
    if isinstance(error, QuantError):
        return text
    kind = type(error).__name__
    line = f"{kind}: {text}" if text else kind
    return f"{line}; {_OUT_OF_MEMORY}" if is_out_of_memory(error) else line


def one_line(text: str) -> str:
    """Return ``text`` without line breaks and with control characters escaped."""
    return printable(" ".join(text.split()))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the host's or the GPU's memory was full."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "alloc_failed" in text
    )


def told(rank: int, line: str, is_bug: bool) -> RankError:
    """Return the error of a rank that ends because ``rank`` had the error ``line``."""
    error = RankError(f"rank {rank} failed: {line}")
    vars(error)[_HAD] = Had(line, (rank,), is_bug)
    return error


def fault_of(error: BaseException) -> Fault:
    """Wrap ``error`` for the other ranks, whether it can be pickled or not."""
    if isinstance(error, OSError) and not isinstance(error, QuantError):
        error = translated(error)
    line = line_of(error)
    if isinstance(error, QuantError):
        return Fault(line, _portable(error))
    return Fault(line, interrupted=isinstance(error, KeyboardInterrupt))


def translated(error: OSError) -> QuantError:
    """Turn a system error into a user's error that says what is wrong with which file."""
    found = QuantError(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    found.__cause__ = error
    return found


def _portable(error: QuantError) -> QuantError:
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # anything that an exception holds may fail to pickle
        return QuantError(str(error))
    return (
        error if type(copy) is type(error) and str(copy) == str(error) else QuantError(str(error))
    )


def shared(error: BaseException | None, faults: Sequence[Fault | None], rank: int) -> BaseException:
    """Return the error that ``rank``, which had ``error``, raises for all ranks' ``faults``.

    It is that of the lowest rank that has one, and the exception itself on that rank. At least one
    fault is not None. KeyboardInterrupt comes first, because nothing is removed after it.
    """
    having = [(r, fault) for r, fault in enumerate(faults) if fault is not None]
    interrupts = [(r, fault) for r, fault in having if fault.interrupted]
    first, fault = (interrupts or having)[0]
    raised: BaseException
    if first == rank:
        assert error is not None
        raised = translated(error) if isinstance(error, OSError) else error
    elif fault.interrupted:
        raised = KeyboardInterrupt(f"rank {first} was interrupted")
    elif fault.error is not None:
        raised = fault.error
    else:
        raised = RankError(f"rank {first} failed: {fault.line}")
    if raised is not error and raised.__cause__ is None:
        raised.__cause__ = error
    if had(raised) is None:
        ranks = tuple(r for r, other in having if other.line == fault.line)
        bug = fault.error is None and not fault.interrupted
        vars(raised)[_HAD] = Had(fault.line, ranks, bug)
    return raised
