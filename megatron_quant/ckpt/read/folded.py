"""A checkpoint as it is with factors folded into it: what an export of awq is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_quant.ckpt.read.checks import PLAIN_DTYPES
from megatron_quant.ckpt.read.source import TensorInfo, Weights, Wrapped
from megatron_quant.ckpt.storage import read_object
from megatron_quant.documents import INDEX
from megatron_quant.errors import CheckpointError
from megatron_quant.folding import DOCUMENT, Fold, parse_fold
from megatron_quant.models import Box


@dataclass(frozen=True)
class FoldedWeights(Wrapped):
    """``source`` with the values that ``fold`` gives its tensors.

    stored: dtypes in which tensors that stay unquantized are folded. Others are in fp32.
    """

    fold: Fold
    stored: Mapping[str, torch.dtype]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of tensor ``name``, folded."""
        part = self.source.read(name, box)
        if not self.fold.changes(name):
            return part
        return self.fold.apply(name, box, part.to(self.stored.get(name, torch.float32)))


def with_fold(source: Weights, directory: Path, stored: Mapping[str, TensorInfo]) -> Weights:
    """Return ``source`` as the export in ``directory`` was made from it.

    Args:
        source: The checkpoint that was quantized.
        directory: The export.
        stored: Its tensors.

    Raises:
        CheckpointError: Where the factors beside the export cannot be read, or do not fit
            ``source``.
    """
    path = directory / DOCUMENT
    if not path.exists():
        return source
    fold = parse_fold(read_object(path, INDEX), str(path))
    for name, dim, length in fold.needs():
        info = source.info(name)
        if info is None or len(info.shape) <= dim or info.shape[dim] != length:
            raise CheckpointError(
                f"{path}: {name} of {source.path} cannot have {length} factors; fetch the file "
                "again"
            )
    plain = {name: t.dtype for name, t in stored.items() if t.dtype in PLAIN_DTYPES}
    return FoldedWeights(source, fold, plain)
