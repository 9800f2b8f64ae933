"""Give weights the scales that a source has: as they are, or MXFP4's as those of NVFP4.

MXFP4 has a power of two for 32 values; NVFP4 has an E4M3 number for 16, and an fp32 number for the
tensor. E4M3 holds 18 powers of two. Where those of a tensor lie within them, every code stays what
it was: nothing is rounded a second time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.read.scale_keeping import Scales
from megatron_quant.errors import CheckpointError
from megatron_quant.formats import Region
from megatron_quant.models import Box, whole
from megatron_quant.recipes import Decision, QuantPlan

_LOWEST, _HIGHEST = -9, 8
"""Exponents of the powers of two in E4M3."""
_SPAN = _HIGHEST - _LOWEST
_BIAS = 127
"""E8M0 code of 1."""
_GROUP = 32


@dataclass(frozen=True, kw_only=True)
class KeptScales:
    """The scales of a quantized source, for the formats of a plan.

    Attributes:
        checkpoint: The source.
        plan: A plan whose weights keep its scales, from :func:`keeping` or :func:`carrying`.
        every: Whether all weights keep them, or those alone that are carried.
        shared: Modules that share a tensor scale by slot, where they are not the slot's own.
    """

    checkpoint: QuantizedCheckpoint
    plan: QuantPlan
    every: bool = True
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _tops: dict[tuple[str, ...], int] = field(default_factory=dict, repr=False)

    def keeps(self, decision: Decision) -> bool:
        """Return whether the weight of ``decision`` keeps the source's scales."""
        return decision.carried or (self.every and decision.quantized)

    def read(self, slot: str, module: str, region: Region) -> Scales:
        """Read the scales of all blocks of a weight that ``region`` touches, and the tensor's.

        Args:
            slot: The weight's slot in the plan.
            module: The member of the slot that the weight is.
            region: A rectangle of the weight, with whole rows where a format changes.

        Raises:
            CheckpointError: If NVFP4 cannot hold the scales of a weight in MXFP4.
        """
        box = Box(region.start, region.size)
        found = self.checkpoint.packed(module).scales(box)
        decision = self.plan.by_name[slot]
        assert decision.weights is not None
        if decision.weights.name == self.checkpoint.modules[module].weights.name:
            return found
        assert region.start[1] == 0, (module, region)
        top = self._top(self.shared.get(slot, decision.slot.sources))
        powers = (found["scale"].to(torch.int32) - top + _HIGHEST).clamp(_LOWEST, _HIGHEST)
        blocks = torch.exp2(powers.float()).repeat_interleave(2, 1)
        columns = -(-region.size[1] // decision.weights.group_size)
        return {
            "block_scale": blocks[:, :columns].to(torch.float8_e4m3fn).contiguous(),
            "tensor_scale": torch.tensor(2.0 ** (top - _BIAS - _HIGHEST)),
        }

    def _top(self, modules: tuple[str, ...]) -> int:
        """Return the largest E8M0 code of fused weights, which share NVFP4's tensor scale."""
        if modules not in self._tops:
            codes = torch.cat([self._codes(m).flatten() for m in modules])
            if int(codes.max() - codes.min()) > _SPAN:  # those of zeros need not be held
                codes = torch.cat([self._codes(m)[self._nonzero(m)] for m in modules])
            if codes.numel() and int(codes.max() - codes.min()) > _SPAN:
                raise CheckpointError(
                    f"{self.checkpoint.path}: the scales of {' and '.join(modules)} reach over "
                    f"{int(codes.max() - codes.min())} powers of two, and NVFP4 holds {_SPAN}; "
                    "leave out --keep-scales"
                )
            self._tops[modules] = int(codes.max()) if codes.numel() else _BIAS
        return self._tops[modules]

    def _codes(self, module: str) -> Tensor:
        packed = self.checkpoint.packed(module)
        return packed.scales(whole(packed.shape))["scale"].to(torch.int32)

    def _nonzero(self, module: str) -> Tensor:
        """Return which groups of a weight have a value other than 0, bool [N, K/32]."""
        w_NK = self.checkpoint.packed(module).whole()
        padded = w_NK.new_zeros(w_NK.shape[0], -(-w_NK.shape[1] // _GROUP) * _GROUP)
        padded[:, : w_NK.shape[1]] = w_NK
        found: Tensor = padded.unflatten(1, (-1, _GROUP)).any(-1)
        return found
