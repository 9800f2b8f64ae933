"""A checkpoint as its logical tensors, whatever it stores them in."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.reader import TensorInfo, Weights, check_plain, check_tensors
from megatron_quant.ckpt.sources import open_source
from megatron_quant.models.spec import Box, Param
from megatron_quant.models.stacks import View
from megatron_quant.models.structure import Structure, describe, has_table

_ELEMENTS, _ROWS = 1 << 22, 128
"""Of a block that is read at a time: about how many elements, and of what its rows are a multiple.

Few enough for what is computed with them to stay in memory that the process has already."""


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
        return check_tensors(self.path, self.tensors, params)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The rectangle ``box`` of tensor ``name``, as ``stored`` gives it; no more is read."""
        view = self.views.get(name)
        if view is None:
            return self.stored.read(name, box)
        part = self.stored.read(view.stored, view.box(box))[0]
        if view.transposed:
            part = part.t()
        return part[:: view.step].contiguous()


def logical(checkpoint: Weights) -> tuple[Weights, Structure]:
    """The checkpoint by the names that engines load, and what these are to the model.

    Raises ArchitectureError where a tensor cannot be told.
    """
    stored = {} if has_table(checkpoint.config) else checkpoint.dense()
    structure = describe(checkpoint.config, {name: info.shape for name, info in stored.items()})
    if not structure.views:
        return checkpoint, structure
    stacks = {view.stored for view in structure.views.values()}
    tensors = {n: info for n, info in stored.items() if n not in stacks}
    for name, view in structure.views.items():
        tensors[name] = replace(stored[view.stored], shape=view.shape)
    return Viewed(checkpoint, structure.views, tensors), structure


def params_of(checkpoint: QuantizedCheckpoint) -> tuple[Param, ...]:
    """The logical parameters of a checkpoint, by its config or else by what it has.

    Raises ArchitectureError where a tensor cannot be told, as where an expert is missing.
    """
    shapes = {} if has_table(checkpoint.config) else {n: checkpoint.shape(n) for n in checkpoint}
    return describe(checkpoint.config, shapes).params


def open_original(directory: Path) -> Weights:
    """The checkpoint that an export was made from, by the names that engines load."""
    checkpoint = open_source(directory)
    return checkpoint if has_table(checkpoint.config) else logical(checkpoint)[0]


def parts(
    checkpoint: Weights, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """A tensor of ``shape`` in blocks of rows: whole blocks of any format, alike for all sources.

    Raises CheckpointError where it cannot be read, or is none of an unquantized model.
    """
    rows = shape[0] if shape else 1
    step = max(_ELEMENTS // max(prod(shape[1:]), 1) // _ROWS, 1) * _ROWS
    for start in range(0, rows, step):
        size = (min(step, rows - start), *shape[1:]) if shape else ()
        part = checkpoint.read(name, Box((start, *(0 for _ in shape[1:]))[: len(shape)], size))
        check_plain(checkpoint.path, name, part.dtype)
        yield part.to(dtype)


def kept_dtypes(checkpoint: Weights) -> dict[str, torch.dtype]:
    """Tensors whose dtype is not that of most of the checkpoint, with it: they need it.

    What is decoded has none of its own.
    """
    plain = {n: info for n, info in checkpoint.dense().items() if not info.decoded}
    sizes: Counter[torch.dtype] = Counter()
    for info in plain.values():
        sizes[info.dtype] += prod(info.shape)
    ((main, _),) = sizes.most_common(1)
    return {n: i.dtype for n, i in plain.items() if i.dtype != main}
