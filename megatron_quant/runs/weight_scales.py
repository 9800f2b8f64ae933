"""The amaxes that the scales of a streamed checkpoint's weights follow from."""

from collections.abc import Iterable

import torch

from megatron_quant.ckpt.plan import RankPart
from megatron_quant.dist import Groups
from megatron_quant.runs.job import Job
from megatron_quant.runs.phases import Phases
from megatron_quant.streaming import (
    PartSource,
    Sharing,
    per_expert,
    scaled,
    searched_amaxes,
    shared,
    shared_amaxes,
    slot_amaxes,
)

_SHARING: dict[str, Sharing] = {"shared": shared, "per_expert": per_expert}


def weight_amaxes(
    job: Job, source: PartSource, groups: Groups, phases: Phases
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return each slot's amax, and the amax that its scale is made of. Collective."""
    own, sharing = job.exported.parts_of(groups.rank), _SHARING[job.expert_scales]
    with phases.bar("amax", _nbytes(scaled(own))) as progress:
        found = slot_amaxes(source, job.quant, own, groups, progress)
    amaxes = shared_amaxes(job.quant, found, sharing)
    with phases.time("search"):
        return found, searched_amaxes(source, job.quant, own, amaxes, sharing, groups)


def _nbytes(parts: Iterable[RankPart]) -> int:
    return sum(part.nbytes for part in parts)
