"""End a failed command: one rank that had the error prints it once, before any rank exits."""

import os
import sys

from megatron_quant.cli.console import rank
from megatron_quant.errors import QuantError
from megatron_quant.faults import Had, had, line_of, trace_of, translated

TRACEBACK = "MEGATRON_QUANT_TRACEBACK"
_WAIT_SECONDS = 3.0  # wait this long for other failing ranks; a killed one never answers
_INTERRUPTED = 130  # the exit status that shells use for Ctrl-C


def fail(error: BaseException, with_trace: bool = False) -> int:
    """Print the ``error`` that ends this rank; return the exit status. Every failing rank calls it.

    An error that the user can act on is one line. A bug, or another library's error, is printed
    after its traceback. ``with_trace`` or MEGATRON_QUANT_TRACEBACK=1 shows every traceback.

    ``torchrun`` kills all ranks once the first exits. So each rank waits until the others have
    printed their errors, or for a few seconds at most.
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
    """Print in a single write, newline included: other ranks may share the pipe."""
    where = f"[rank {rank()}] " if "RANK" in os.environ else ""
    before = trace_of(shown) if shown is not None else ""
    sys.stderr.write(f"{before}{where}megatron-quant: error: {line}\n")
    sys.stderr.flush()
