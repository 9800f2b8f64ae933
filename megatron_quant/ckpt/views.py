"""A checkpoint as its logical tensors, whatever it stores them in."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from megatron_quant.ckpt.expert_stacks import ExpertStacks
from megatron_quant.ckpt.quantization import has_expert_stacks
from megatron_quant.ckpt.quantized import QuantizedCheckpoint, matrices
from megatron_quant.ckpt.reader import Checkpoint, open_directory
from megatron_quant.ckpt.source import read_config
from megatron_quant.models.spec import Box, Param
from megatron_quant.models.stacks import View, unstack
from megatron_quant.models.structure import Structure, describe, has_table, is_draft

Original = QuantizedCheckpoint | ExpertStacks
"""A checkpoint that an export was made from."""


@dataclass(frozen=True)
class Viewed(Checkpoint):
    """``stored`` with the tensors of ``views`` in place of the stacks that hold them."""

    stored: Checkpoint
    views: Mapping[str, View]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The rectangle ``box`` of tensor ``name``, in its stored dtype; nothing else is read."""
        view = self.views.get(name)
        if view is None:
            return self.stored.read(name, box)
        part = self.stored.read(view.stored, view.box(box))[0]
        if view.transposed:
            part = part.t()
        return part[:: view.step].contiguous()


def unstacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint by the names that engines load; :func:`logical` says what they are.

    Raises ArchitectureError for a stack whose experts cannot be told apart.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return _viewed(checkpoint, unstack(checkpoint.config, shapes))


def logical(checkpoint: Checkpoint) -> tuple[Checkpoint, Structure]:
    """The checkpoint by the names that engines load, and what these are to the model.

    Raises ArchitectureError where a tensor cannot be told.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    structure = describe(checkpoint.config, shapes)
    return _viewed(checkpoint, structure.views), structure


def _viewed(checkpoint: Checkpoint, views: Mapping[str, View]) -> Checkpoint:
    if not views:
        return checkpoint
    stacks = {view.stored for view in views.values()}
    tensors = {n: info for n, info in checkpoint.tensors.items() if n not in stacks}
    for name, view in views.items():
        tensors[name] = replace(checkpoint.tensors[view.stored], shape=view.shape)
    return Viewed(
        checkpoint.path,
        checkpoint.config,
        tensors,
        checkpoint.files,
        stored=checkpoint,
        views=views,
    )


def params_of(checkpoint: QuantizedCheckpoint) -> tuple[Param, ...]:
    """The logical parameters of a checkpoint, by its config or else by what it has.

    Raises ArchitectureError where a tensor cannot be told, as where an expert is missing.
    """
    config, table = checkpoint.config, has_table(checkpoint.config)
    wanted = [n for n in checkpoint if not table or is_draft(config, n)]
    return describe(config, {n: checkpoint.shape(n) for n in wanted}).params


def open_original(directory: Path) -> Original:
    """The checkpoint that an export was made from, by the names that engines load."""
    if has_expert_stacks(read_config(directory)):
        return ExpertStacks(directory)
    files = open_directory(directory)
    if not files.config.get("quantization_config"):
        files, _ = logical(files)
    return QuantizedCheckpoint.over(files, matrices(files))


def kept_dtypes(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """Tensors whose dtype is not that of most of the checkpoint, with it: they need it."""
    sizes: Counter[torch.dtype] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.dtype] += prod(info.shape)
    ((main, _),) = sizes.most_common(1)
    return {n: i.dtype for n, i in checkpoint.tensors.items() if i.dtype != main}
