"""Read parts of tensors from the source checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from megatron_quant.ckpt.dialects import WEIGHT_SCALE
from megatron_quant.ckpt.plan import RankPart
from megatron_quant.ckpt.read import TensorSource
from megatron_quant.folding import Fold
from megatron_quant.models import Role


@dataclass(frozen=True)
class PartSource:
    """A checkpoint, read part by part.

    Attributes:
        checkpoint: The checkpoint.
        dtype: Dtype in which weights are quantized.
        fold: What is folded into its tensors.
    """

    checkpoint: TensorSource
    dtype: torch.dtype
    fold: Fold = field(default_factory=Fold)

    def read(self, part: RankPart) -> torch.Tensor:
        """Read the part's rectangle of its Hugging Face tensor, in the dtype of the run."""
        name = part.target.source.name
        held = self.checkpoint.read(name, part.src).to(self._dtype_of(part))
        return self.fold.apply(name, part.src, held)

    def _dtype_of(self, part: RankPart) -> torch.dtype:
        return self.dtype if part.target.scheme.weights else part.target.entries[0].dtype


def needs_amax(part: RankPart) -> bool:
    """Return whether encoding the part must wait for the amax of everything with its scale."""
    scheme = part.target.scheme
    if part.param.role is Role.CACHE or scheme.weights is None:
        return False
    return scheme.weights.tensor_scale or any(s.field == WEIGHT_SCALE for s in scheme.stored)


def scaled(parts: tuple[RankPart, ...]) -> Iterator[RankPart]:
    """Yield those of ``parts`` that need an amax."""
    return filter(needs_amax, parts)
