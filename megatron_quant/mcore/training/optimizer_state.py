"""Read a distributed optimizer's state of each parameter, from a checkpoint of any layout."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from megatron_quant.dist import Groups
from megatron_quant.mcore.checkpoint import (
    OPTIMIZER,
    RESHARDABLE,
    Chunks,
    TorchDist,
    check_keys,
    read_tensors,
    shapes_of,
    sharded_state,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


def load_optimizer(
    chunks: Chunks, optimizer: Any, stored: TorchDist, step: int, groups: Groups
) -> None:
    """Fill Adam's moments and main parameters as after ``step`` steps. Collective.

    optimizer: Megatron's distributed one, of ``chunks``. Learning rates stay as they are, because a
    schedule sets them. Raises CheckpointError, on every rank alike, for a key that the checkpoint
    lacks or has in another shape.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in parts:
        _allocate(part.optimizer)
    state = optimizer.sharded_state_dict(
        sharded_state(chunks, singleton=True), is_loading=True, metadata=RESHARDABLE
    )
    sharded, _, factories = load_preprocess({OPTIMIZER: state})
    tensors, _ = extract_sharded_base(sharded)
    check_keys(shapes_of(tensors), stored, groups)
    loaded = apply_factory_merges(read_tensors(tensors, stored, groups), factories)[OPTIMIZER]
    for index, part in enumerate(parts):
        own = loaded if len(parts) == 1 else loaded[index]
        _set_step(part.optimizer, None)  # Megatron-Core looks for every state that exists
        part.load_parameter_state_from_fully_reshardable(own["param_state"])
        _set_step(part.optimizer, step)


def _allocate(optimizer: torch.optim.Optimizer) -> None:
    """Give torch's AdamW a step count: Megatron-Core sets only its moments, and AdamW refuses."""
    if isinstance(optimizer, torch.optim.AdamW):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[p] = {name: torch.zeros_like(p) for name in _MOMENTS}
    _set_step(optimizer, 0)


def _set_step(optimizer: torch.optim.Optimizer, step: int | None) -> None:
    """Set Adam's count: Transformer Engine keeps it by group, torch by parameter."""
    if not isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["step"] = step or 0
        return
    for state in optimizer.state.values():
        state.pop("step", None)
        if step is not None:
            state["step"] = torch.tensor(float(step))
