"""Run text through transformers' model of a checkpoint, a layer at a time, on every rank."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_quant.dist import Groups, Meetings, gather, in_step
from megatron_quant.errors import CalibrationError
from megatron_quant.runs.phases import Phases

if TYPE_CHECKING:
    from megatron_quant.streaming import Borders, Seen, Skeleton, Walk


def walked(
    build: "Callable[[], Skeleton]",
    walk: "Callable[[Skeleton, Callable[[int], None], Meetings], Walk]",
    steps: "Callable[[Skeleton], int]",
    groups: Groups,
    phases: Phases,
) -> "tuple[Seen, Borders | None, str]":
    """Walk through the layers; return what was seen, the borders, and why it cannot be. Collective.

    Args:
        build: Makes the model.
        walk: Makes the walk, which calls the function that it is given with steps done. Where it
            goes behind rounded layers, its ranks meet.
        steps: How many there are.
        groups: The ranks, which share the batches.
        phases: Where progress is shown.

    Returns:
        The reason is empty where it went well, and the same on all ranks.

    Raises:
        CalibrationError: On every rank, for a model whose layers cannot run one after another, and
            ranks that wait for one another.
    """
    from megatron_quant.streaming import CannotWalk, Seen

    def work(meetings: Meetings) -> "tuple[Seen, Borders | None, str]":
        made: Walk | None = None
        try:
            with phases.time("load"):
                skeleton = build()
            with phases.bar("calibrate", steps(skeleton)) as progress:
                made = walk(skeleton, progress, meetings)
                seen, borders = made.run()
            return seen, borders, ""
        except CannotWalk as reason:
            if made is not None and made.behind is not None:  # the others wait for this rank
                raise CalibrationError(
                    f"--sequential goes layer by layer, which transformers' model cannot "
                    f"({reason}); leave it out, or take --algorithm max or mse"
                ) from reason
            return Seen(), None, str(reason)

    seen, borders, reason = in_step(groups, work)
    return seen, borders, next(filter(None, gather(reason, groups)), "")
