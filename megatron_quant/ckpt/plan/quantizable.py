"""Turn logical parameters into the slots that a recipe decides on."""

from collections.abc import Sequence

from megatron_quant.models import Param, Role
from megatron_quant.recipes import Slot


def slots(params: Sequence[Param]) -> tuple[Slot, ...]:
    """Make one slot per parameter, in order; ``fixed`` holds the role of all but linear weights."""
    return tuple(
        Slot(
            name=param.name,
            sources=tuple(source.module for source in param.sources),
            shape=param.shape,
            fixed="" if param.role is Role.LINEAR else param.role.value,
            expert=param.expert,
            fused=param.fused,
            called=param.called,
        )
        for param in params
    )
