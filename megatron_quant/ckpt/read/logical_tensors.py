"""A checkpoint as its logical tensors, whatever it stores them in."""

from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from megatron_quant.ckpt.read.directory import Weights, check_plain
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.read.stack_views import viewed
from megatron_quant.models import Box, Param, Structure, describe_structure, has_table, is_draft

_ELEMENTS, _ROWS = 1 << 22, 128
"""Of a block that is read at a time: about how many elements, and of what its rows are a multiple.

Few enough for what is computed with them to stay in memory that the process has already."""


def logical(checkpoint: Weights) -> tuple[Weights, Structure]:
    """Return the checkpoint by engines' names, and the meaning of each for the model.

    Raises ArchitectureError where a tensor cannot be told.
    """
    shapes = {name: info.shape for name, info in checkpoint.dense().items()}
    structure = describe_structure(checkpoint.config, shapes)
    return viewed(checkpoint, structure.views), structure


def params_of(checkpoint: QuantizedCheckpoint) -> tuple[Param, ...]:
    """Return the logical parameters of a checkpoint, by its config or else by its tensors.

    Raises ArchitectureError where a tensor cannot be told, as where an expert is missing.
    """
    config, table = checkpoint.config, has_table(checkpoint.config)
    # verification reports what a table names and the checkpoint lacks
    wanted = [n for n in checkpoint if not table or is_draft(config, n)]
    return describe_structure(config, {n: checkpoint.shape(n) for n in wanted}).params


def open_original(directory: Path) -> Weights:
    """Open the checkpoint that an export was made from, by the names that engines load."""
    checkpoint = open_source(directory)
    return checkpoint if has_table(checkpoint.config) else logical(checkpoint)[0]


def row_blocks(shape: tuple[int, ...]) -> Iterator[Box]:
    """Blocks of rows of a tensor: whole blocks of any format, alike for all sources."""
    rows = shape[0] if shape else 1
    step = max(_ELEMENTS // max(prod(shape[1:]), 1) // _ROWS, 1) * _ROWS
    for start in range(0, rows, step):
        size = (min(step, rows - start), *shape[1:]) if shape else ()
        yield Box((start, *(0 for _ in shape[1:]))[: len(shape)], size)


def plain_part(checkpoint: Weights, name: str, box: Box) -> torch.Tensor:
    """Read the rectangle ``box`` of a tensor.

    Raises CheckpointError where it cannot be read, or is none of an unquantized model.
    """
    part = checkpoint.read(name, box)
    check_plain(checkpoint.path, name, part.dtype)
    return part


def kept_dtypes(checkpoint: Weights) -> dict[str, torch.dtype]:
    """Tensors whose dtype is not that of most of the checkpoint, with it: they need it.

    What is decoded has none of its own. Of a model that has a table, which says so itself, those
    of layers for speculation alone.
    """
    config = checkpoint.config
    plain = {n: info for n, info in checkpoint.dense().items() if not info.decoded}
    sizes: Counter[torch.dtype] = Counter()
    for info in plain.values():
        sizes[info.dtype] += prod(info.shape)
    main = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    found = {n: i.dtype for n, i in plain.items() if i.dtype != main}
    if has_table(config):
        return {n: dtype for n, dtype in found.items() if is_draft(config, n)}
    return found
