"""Plan how often data runs for gptq: the second moments of few layers are held at a time."""

from dataclasses import dataclass

from megatron_quant.errors import CalibrationError
from megatron_quant.recipes import Decision, QuantPlan


@dataclass(frozen=True)
class MomentPass:
    """Layers whose second moments are held at a time: Megatron modules, and bytes on a rank."""

    modules: tuple[str, ...]
    nbytes: int


def moment_passes(plan: QuantPlan, ep: int, limit: int | None) -> tuple[MomentPass, ...]:
    """Deal the layers that gptq rounds out to passes, the last layers first; equal on all ranks.

    Args:
        plan: Decisions on every slot, in the model's order.
        ep: Number of ranks that share a layer's experts.
        limit: Most bytes of second moments on a rank; None for any number.

    Raises:
        CalibrationError: If one layer alone takes more than ``limit``.
    """
    sizes: dict[str, int] = {}
    for decision in (d for d in plan.decisions if d.rounds and d.quantized):
        slot = decision.slot
        share = 1 if slot.expert is None else ep
        sizes[slot.module] = sizes.get(slot.module, 0) + _nbytes(decision) // share
    passes: list[MomentPass] = []
    for module, nbytes in reversed(sizes.items()):
        if limit is not None and nbytes > limit:
            raise CalibrationError(
                f"--calib-memory: the second moments of the inputs of {module} take {nbytes} bytes "
                f"on a rank, and it is {limit}: give at least that, or a larger --ep for experts"
            )
        last = passes[-1] if passes else None
        if last is None or (limit is not None and last.nbytes + nbytes > limit):
            passes.append(MomentPass((module,), nbytes))
        else:
            passes[-1] = MomentPass((*last.modules, module), last.nbytes + nbytes)
    return tuple(passes)


def _nbytes(decision: Decision) -> int:
    """Return the bytes of the sums of x x^T, and of what codes of the inputs lose."""
    matrices = 2 if decision.serves_codes else 1
    return matrices * 4 * decision.slot.shape[1] ** 2
