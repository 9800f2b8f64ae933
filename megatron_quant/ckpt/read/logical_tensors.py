"""Open a checkpoint as its logical tensors, however it stores them."""

from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from megatron_quant.ckpt.read.checks import check_plain
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.read.source import TensorSource, Weights
from megatron_quant.ckpt.read.stack_views import viewed
from megatron_quant.models import (
    Box,
    Param,
    Structure,
    describe_structure,
    has_table,
    is_carried,
    lookup,
)

_ELEMENTS, _ROWS = 1 << 22, 128
"""About how many elements a block has that is read at a time; its rows are a multiple of the other.

They are few enough that computing with them reuses memory that the process already has."""


def logical(checkpoint: Weights) -> tuple[Weights, Structure]:
    """Return the checkpoint by engines' names, and what each name means in the model.

    Raises ArchitectureError for a tensor that cannot be identified.
    """
    shapes = {name: info.shape for name, info in checkpoint.dense().items()}
    structure = describe_structure(checkpoint.config, shapes)
    return viewed(checkpoint, structure.views), structure


def params_of(checkpoint: QuantizedCheckpoint) -> tuple[Param, ...]:
    """Return the logical parameters of a checkpoint, by its config or else by its tensors.

    Raises ArchitectureError for a tensor that cannot be identified, for example if an expert is
    missing.
    """
    config, table = checkpoint.config, has_table(checkpoint.config)
    # verification reports tensors that a table names and the checkpoint lacks
    wanted = [n for n in checkpoint if not table or is_carried(config, n)]
    return describe_structure(config, {n: checkpoint.shape(n) for n in wanted}).params


def open_original(directory: Path) -> Weights:
    """Open the checkpoint that an export was made from, by the names that engines use."""
    checkpoint = open_source(directory)
    return checkpoint if has_table(checkpoint.config) else logical(checkpoint)[0]


def row_blocks(shape: tuple[int, ...]) -> Iterator[Box]:
    """Cut a tensor into blocks of rows: whole blocks of any format, equal for all sources."""
    rows = shape[0] if shape else 1
    step = max(_ELEMENTS // max(prod(shape[1:]), 1) // _ROWS, 1) * _ROWS
    for start in range(0, rows, step):
        size = (min(step, rows - start), *shape[1:]) if shape else ()
        yield Box((start, *(0 for _ in shape[1:]))[: len(shape)], size)


def plain_part(checkpoint: TensorSource, name: str, box: Box) -> torch.Tensor:
    """Read the rectangle ``box`` of a tensor.

    Raises CheckpointError if it cannot be read, or is not an unquantized model's.
    """
    part = checkpoint.read(name, box)
    check_plain(checkpoint.path, name, part.dtype)
    return part


def kept_dtypes(checkpoint: Weights) -> dict[str, torch.dtype]:
    """Return the tensors that need a dtype other than most of the checkpoint's, with that dtype.

    Decoded tensors have no dtype of their own. If the model has a table, the table says so for what
    it describes, so only what lies beside that is returned, and all that Megatron needs in float32.
    """
    config = checkpoint.config
    plain = {n: info for n, info in checkpoint.dense().items() if not info.decoded}
    sizes: Counter[torch.dtype] = Counter()
    for info in plain.values():
        sizes[info.dtype] += prod(info.shape)
    main = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    found = {n: i.dtype for n, i in plain.items() if i.dtype != main}
    if has_table(config):
        wide = {s.name for p in lookup(config).params(config) if p.wide for s in p.sources}
        own = {n: info.dtype for n, info in plain.items() if n in wide}
        return {**own, **{n: dtype for n, dtype in found.items() if is_carried(config, n)}}
    return found
