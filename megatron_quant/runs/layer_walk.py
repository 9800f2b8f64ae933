"""Run text through transformers' model of a checkpoint, a layer at a time, on every rank."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_quant.dist import Groups, gather, together
from megatron_quant.runs.phases import Phases

if TYPE_CHECKING:
    from megatron_quant.streaming import Borders, Seen, Skeleton, Walk


def walked(
    build: "Callable[[], Skeleton]",
    walk: "Callable[[Skeleton, Callable[[int], None]], Walk]",
    steps: "Callable[[Skeleton], int]",
    groups: Groups,
    phases: Phases,
) -> "tuple[Seen, Borders | None, str]":
    """Walk through the layers; return what was seen, the borders, and why it cannot be. Collective.

    Args:
        build: Makes the model.
        walk: Makes the walk, which calls the function that it is given with steps done.
        steps: How many there are.
        groups: The ranks, which share the batches.
        phases: Where progress is shown.

    Returns:
        The reason is empty where it went well, and the same on all ranks.
    """
    from megatron_quant.streaming import CannotWalk, Seen

    def work() -> "tuple[Seen, Borders | None, str]":
        try:
            with phases.time("load"):
                skeleton = build()
            with phases.bar("calibrate", steps(skeleton)) as progress:
                seen, borders = walk(skeleton, progress).run()
            return seen, borders, ""
        except CannotWalk as reason:
            return Seen(), None, str(reason)

    seen, borders, reason = together(groups, work)
    return seen, borders, next(filter(None, gather(reason, groups)), "")
