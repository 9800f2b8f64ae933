"""The line of progress, on a terminal and elsewhere."""

import io
import re

from rich.console import Console

from megatron_quant.cli.console import ConsolePhases
from megatron_quant.runs.phases import Quiet, Timed


def shown(terminal: bool) -> str:
    out = io.StringIO()
    phases = ConsolePhases(Console(file=out, force_terminal=terminal, width=160))
    with phases.transfer("export", 2 * 10**9) as progress:
        progress(10**9)
        progress(10**9)
    return out.getvalue()


def test_bytes_their_rate_and_the_time_left() -> None:
    line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(terminal=True)).splitlines()[-1]
    assert re.search(r"^export .* 2\.0/2\.0 GB .*(B/s|\?).* 0:00:\d\d 0:00:00", line), line


def test_nothing_where_there_is_no_terminal() -> None:
    assert shown(terminal=False).strip() == ""


def test_phases_are_told_in_the_order_in_which_they_began() -> None:
    timed = Timed(Quiet())
    with timed.time("plan"), timed.bar("load", 3) as progress, timed.transfer("export", 9):
        progress(1)
    assert list(timed.seconds) == ["plan", "load", "export"]
    assert all(seconds > 0 for seconds in timed.seconds.values())
