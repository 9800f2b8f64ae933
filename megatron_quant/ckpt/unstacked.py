"""A checkpoint that stores experts in stacks, with the single ones that engines load."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.reader import TensorInfo, Weights, check_tensors
from megatron_quant.models.spec import Box, Param
from megatron_quant.models.stacks import View, unstack


@dataclass(frozen=True)
class Viewed:
    """``stored`` with the tensors of ``views`` in place of the stacks that hold them."""

    stored: Weights
    views: Mapping[str, View]
    tensors: Mapping[str, TensorInfo]

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.stored.path

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return self.stored.config

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def info(self, name: str) -> TensorInfo | None:
        """Dtype, shape and file of what :meth:`read` gives; None where there is no such tensor."""
        return self.tensors.get(name)

    def dense(self) -> Mapping[str, TensorInfo]:
        """All tensors."""
        return self.tensors

    def check(self, params: Iterable[Param]) -> tuple[str, ...]:
        """As :func:`megatron_quant.ckpt.reader.check_tensors`."""
        return check_tensors(self.path, self.config, self.tensors, params)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The rectangle ``box`` of tensor ``name``, as ``stored`` gives it; no more is read."""
        view = self.views.get(name)
        if view is None:
            return self.stored.read(name, box)
        part = self.stored.read(view.stored, view.box(box))[0]
        if view.transposed:
            part = part.t()
        return part[:: view.step].contiguous()


def viewed(checkpoint: Weights, views: Mapping[str, View]) -> Weights:
    """``checkpoint`` itself where there is nothing to view."""
    if not views:
        return checkpoint
    stored = checkpoint.dense()
    stacks = {view.stored for view in views.values()}
    tensors = {n: info for n, info in stored.items() if n not in stacks}
    for name, view in views.items():
        tensors[name] = replace(stored[view.stored], shape=view.shape)
    return Viewed(checkpoint, views, tensors)


def unstacked(checkpoint: Weights) -> Weights:
    """The checkpoint by the names that engines load, whatever its tensors are to the model.

    Raises ArchitectureError for a stack whose experts cannot be told apart.
    """
    shapes = {name: info.shape for name, info in checkpoint.dense().items()}
    return viewed(checkpoint, unstack(checkpoint.config, shapes))
