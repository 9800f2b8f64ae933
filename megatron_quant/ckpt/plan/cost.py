"""Measure an export plan: the cost of planning, and how evenly the ranks share the work."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_quant.ckpt.plan.export_plan import ExportPlan

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Cost:
    """Seconds of CPU time, and bytes of memory; None where the system does not say."""

    seconds: float
    nbytes: int | None


@dataclass(frozen=True)
class Spread:
    """Bytes that each of ``ranks`` writes: the least, the most, and the mean."""

    ranks: int
    smallest: int
    largest: int
    mean: float

    @property
    def imbalance(self) -> float:
        """Return the busiest rank's bytes over the mean: 1 is even."""
        return self.largest / self.mean


def measured(make: Callable[[], ExportPlan]) -> tuple[ExportPlan, Cost]:
    """Make a plan with ``make``, and return it with its cost."""
    before, start = _resident(), time.process_time()
    plan = make()
    seconds, after = time.process_time() - start, _resident()
    return plan, Cost(seconds, None if before is None or after is None else after - before)


def spread(plan: ExportPlan, ranks: int) -> Spread:
    """Return the bytes that each of the layout's ranks writes, as a summary."""
    written = [sum(part.nbytes for part in plan.parts_of(rank)) for rank in range(ranks)]
    return Spread(ranks, min(written), max(written), sum(written) / ranks)


def _resident() -> int | None:
    """Return the bytes of this process in memory."""
    if not _STATUS.exists():
        return None
    found = (line.split()[1] for line in _STATUS.read_text().splitlines() if "VmRSS" in line)
    return 1024 * int(next(found))
