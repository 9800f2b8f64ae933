"""Times of phases: what a phase within another takes is counted once."""

import time

import pytest

from megatron_quant.runs.phases import Quiet, Timed


def test_a_phase_within_a_phase_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    timed = Timed(Quiet())
    with timed.time("write"):  # begins at 0
        with timed.time("verify"):  # 10 to 20
            pass
        with timed.time("name"):  # 30 to 40
            pass
    with timed.time("close"):  # 60 to 70; writing ended at 50
        pass
    assert timed.seconds == {"write": 30, "verify": 10, "name": 10, "close": 10}
    assert list(timed.seconds) == ["write", "verify", "name", "close"]
    assert sum(timed.seconds.values()) == 60
