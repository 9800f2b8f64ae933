"""Read a rank's share of a checkpoint where ranks of the job have no part in the model.

Megatron's own loading is a collective of all ranks of torch.distributed.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_quant.dist import Groups
from megatron_quant.mcore.checkpoint.piece_reader import PieceReader
from megatron_quant.mcore.checkpoint.torch_dist import TorchDist


def is_part_of_job(groups: Groups) -> bool:
    """Return whether the job has ranks that do not hold the model."""
    return dist.is_initialized() and groups.size < dist.get_world_size()


def read_alone(sharded: dict[str, Any], stored: TorchDist) -> dict[str, Any]:
    """Read every ShardedTensor of ``sharded``, a dict of dicts and lists, in its local shape.

    Rows that the checkpoint lacks, of a vocabulary that was padded less, are zero. Raises
    CheckpointError where it cannot be read.
    """
    keys = {tensor.key for tensor in _tensors(sharded)}
    reader = PieceReader(stored.path, stored.tensors(keys))
    loaded: dict[str, Any] = _read(sharded, reader, stored)
    return loaded


def _tensors(held: Any) -> list[ShardedTensor]:
    if isinstance(held, ShardedTensor):
        return [held]
    inner = held.values() if isinstance(held, dict) else held
    return [tensor for value in inner for tensor in _tensors(value)]


def _read(held: Any, reader: PieceReader, stored: TorchDist) -> Any:
    if isinstance(held, dict):
        return {name: _read(value, reader, stored) for name, value in held.items()}
    if isinstance(held, list):
        return [_read(value, reader, stored) for value in held]
    start, lead = held.global_offset, (1,) * held.prepend_axis_num
    whole, size = stored.shapes[held.key], (*lead, *held.local_shape)
    there = tuple(max(0, min(s + n, w) - s) for s, n, w in zip(start, size, whole, strict=True))
    found = torch.zeros(size, dtype=held.dtype)
    if 0 not in there:
        found[tuple(map(slice, there))] = reader.read(held.key, start, there).to(held.dtype)
    return found.view(held.local_shape)
