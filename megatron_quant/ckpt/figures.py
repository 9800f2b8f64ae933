"""Figures of an export plan: what planning costs, and how evenly the ranks share the work."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_quant.ckpt.check import check_plan
from megatron_quant.ckpt.plan import ExportPlan

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Figures:
    """What a plan took and what it gives.

    seconds: to plan, with the proof that every byte has one owner. nbytes: memory that the plan
    takes, None where the system does not say. ranks: of the layout. smallest, largest: bytes that
    a rank writes. mean: over all ranks.
    """

    seconds: float
    nbytes: int | None
    ranks: int
    smallest: int
    largest: int
    mean: float

    @property
    def imbalance(self) -> float:
        """What the busiest rank writes, over the mean: 1 is even."""
        return self.largest / self.mean


def measured(make: Callable[[], ExportPlan], ranks: int) -> tuple[ExportPlan, Figures]:
    """The plan that ``make`` makes, with its figures; it is checked too."""
    before, start = _resident(), time.perf_counter()
    plan = make()
    check_plan(plan)
    seconds = time.perf_counter() - start
    after = _resident()
    nbytes = after - before if after and before else None
    written = [sum(part.nbytes for part in plan.parts_of(rank)) for rank in range(ranks)]
    mean = sum(written) / ranks
    return plan, Figures(seconds, nbytes, ranks, min(written), max(written), mean)


def _resident() -> int | None:
    """Bytes of this process in memory."""
    if not _STATUS.exists():
        return None
    found = (line.split()[1] for line in _STATUS.read_text().splitlines() if "VmRSS" in line)
    return 1024 * int(next(found))
