"""Produce each part that an export asks for, from the source checkpoint alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from megatron_quant.ckpt.plan import RankPart
from megatron_quant.ckpt.read import KeptScales
from megatron_quant.ckpt.write import Produced, check_finite, encoded, produce_cache_scale
from megatron_quant.formats import E4M3_MAX
from megatron_quant.models import Role
from megatron_quant.recipes import QuantPlan
from megatron_quant.streaming.part_source import PartSource
from megatron_quant.streaming.search import searched_stat

_CAST = torch.tensor(E4M3_MAX)
"""Amax of keys and values that are cast to FP8 unscaled: their scale is 1."""


@dataclass(frozen=True, kw_only=True)
class Producer:
    """A producer that reads, encodes and forgets each part.

    Attributes:
        source: The source checkpoint.
        quant: The resolved recipe.
        weight_amax: Amax by slot, fp32 [], if needed.
        input_amax: Amax of inputs by slot, fp32 [], if needed.
        kept: Scales that the weights keep; None if they get their own.
    """

    source: PartSource
    quant: QuantPlan
    weight_amax: Mapping[str, torch.Tensor]
    input_amax: Mapping[str, torch.Tensor] = field(default_factory=dict)
    kept: KeptScales | None = None

    def __call__(self, part: RankPart) -> Iterator[Produced]:
        """Yield the tensors of ``part``."""
        if part.param.role is Role.CACHE:
            return produce_cache_scale(part, _CAST)
        w, name = self.source.read(part), part.param.name
        weight_amax, decision = self.weight_amax.get(name), self.quant.by_name[name]
        stat, scales = searched_stat(w, decision, weight_amax, part.src.start), None
        if self.kept is not None and decision.quantized:
            scales = self.kept.read(name, part.target.source.module, part.region)
        if weight_amax is None:  # otherwise finding the amax has checked every weight
            check_finite(part, w)
        return encoded(part, w, weight_amax, self.input_amax.get(name), stat, scales)


def unscaled(source: PartSource, quant: QuantPlan) -> Producer:
    """Return a producer of parts that need no amax, such as those of draft layers."""
    return Producer(source=source, quant=quant, weight_amax={})
