"""How the command fails: each error is told once, by a rank that had it, before any rank ends."""

import os
import sys

from megatron_quant.cli.console import rank
from megatron_quant.errors import QuantError
from megatron_quant.faults import Had, had, line_of, trace_of, translated

TRACEBACK = "MEGATRON_QUANT_TRACEBACK"
_WAIT_SECONDS = 3.0  # for ranks that fail too; one that was killed never comes
_INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended


def fail(error: BaseException, with_trace: bool = False) -> int:
    """Tell of ``error``, which ends this rank; the exit status. All ranks that fail call it.

    What a user can act on is one line; what is not, a bug or another library's error, comes after
    its traceback. with_trace, MEGATRON_QUANT_TRACEBACK=1: so does everything.

    ``torchrun`` ends all ranks when the first is gone, so none leaves before the others have told
    what they have to, or a few seconds are over.
    """
    about = had(error) or _alone(error)
    heard = _share(about.line, _WAIT_SECONDS)
    present = [r for r in about.ranks if r in heard]
    alike = present or [r for r, line in sorted(heard.items()) if line == about.line]
    if rank() == alike[0]:
        of = len(about.ranks or alike)
        shown = with_trace or about.is_bug or os.environ.get(TRACEBACK, "0") not in ("", "0")
        _print(about.line + (f" (on {of} ranks)" if of > 1 else ""), error if shown else None)
    _share("", _WAIT_SECONDS)
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _share(said: str, seconds: float) -> dict[int, str]:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return {rank(): said}
    # Only here: torch takes seconds to import.
    from megatron_quant.rendezvous import share

    return share(said, seconds)


def _alone(error: BaseException) -> Had:
    """Describe an error that no collective has seen; other ranks' lines tell who has it too."""
    if isinstance(error, OSError) and not isinstance(error, QuantError):
        error = translated(error)
    expected = isinstance(error, QuantError | KeyboardInterrupt)
    return Had(line_of(error), (), not expected)


def _print(line: str, shown: BaseException | None) -> None:
    """In one write, newline included: other ranks may write to the same pipe."""
    where = f"[rank {rank()}] " if "RANK" in os.environ else ""
    before = trace_of(shown) if shown is not None else ""
    sys.stderr.write(f"{before}{where}megatron-quant: error: {line}\n")
    sys.stderr.flush()
