"""Decide which slots calibration tokens must reach, and how to scale an expert without any."""

from collections.abc import Collection, Iterable, Mapping

from megatron_quant.errors import CalibrationError
from megatron_quant.recipes.plan import QuantPlan, Slot


def largest_shared(plan: QuantPlan, amaxes: Mapping[str, float]) -> dict[str, float]:
    """Map :attr:`Slot.sharing` to the largest amax among the slots that share it.

    Args:
        plan: Plan that has the slots.
        amaxes: Amaxes by slot name.
    """
    largest: dict[str, float] = {}
    for name, value in amaxes.items():
        sharing = plan.by_name[name].slot.sharing
        largest[sharing] = max(largest.get(sharing, 0.0), value)
    return largest


def check_reached(slots: Iterable[Slot], reached: Collection[str]) -> None:
    """Raise CalibrationError for the first of ``slots`` none of whose sharers was reached.

    Args:
        slots: Slots to check.
        reached: Values of :attr:`Slot.sharing`.
    """
    for slot in slots:
        if slot.sharing not in reached:
            raise CalibrationError(
                f"no calibration token reached {slot.module}: give more data with --calib-size"
            )


def accept_cold(cold: Iterable[Slot], layer_max: bool) -> tuple[str, ...]:
    """Return the names of the experts' slots that no token reached.

    Args:
        cold: Those slots.
        layer_max: Whether they take their layer's largest amax.

    Raises:
        CalibrationError: Where there are such slots and ``layer_max`` is False.
    """
    cold = tuple(cold)
    if cold and not layer_max:
        experts = dict.fromkeys((s.module.rpartition(".")[0], s.expert) for s in cold)
        (module, expert), others = next(iter(experts)), len(experts) - 1
        raise CalibrationError(
            f"expert {expert} of {module} saw no calibration token"
            f"{f' (and {others} more experts)' if others else ''}: raise --calib-size, or take "
            "the layer's largest amax with --cold-experts layer-max"
        )
    return tuple(slot.name for slot in cold)
