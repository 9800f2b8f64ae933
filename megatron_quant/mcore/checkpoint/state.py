"""Add to a model's ``sharded_state_dict`` how it is quantized.

The quantized layers give their own amaxes. A child module of the model gives the rest: a
description (recipe, formats, expert scales, versions) as the bytes of a JSON document, and the
grids of block statistics that a search chose.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from torch import nn

from megatron_quant.documents import MB, Limits, parse_json
from megatron_quant.layers import LocalWeight, QuantLayer, block_amax, set_block_amax
from megatron_quant.mcore.checkpoint.grids import SavedGrid, grids_of
from megatron_quant.mcore.checkpoint.stored import CHILD, DESCRIPTION
from megatron_quant.mcore.model import LiveModel

DESCRIBED = Limits(4 * MB, 100_000)
"""Limits of a description."""
_PAGE = 4096  # bytes; descriptions are padded to a multiple, so that their shape is stable


def encode(description: Mapping[str, Any]) -> torch.Tensor:
    """Encode a JSON document as uint8 [bytes], padded with spaces."""
    text = json.dumps(description, sort_keys=True).encode()
    return torch.tensor(list(text + b" " * (-len(text) % _PAGE)), dtype=torch.uint8)


def decode(stored: torch.Tensor) -> Any:
    """Decode what :func:`encode` made. Raises CheckpointError for other bytes."""
    return parse_json(stored.numpy().tobytes().rstrip(b"\0 "), DESCRIPTION, DESCRIBED)


@dataclass(frozen=True, eq=False)
class SaveHook:
    """A function to run on every rank when a model is asked for its sharded state dict."""

    run: Callable[[], None]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Give a copied model no hook: it would be the original's."""


class QuantState(nn.Module):
    """The child module. It adds its description and grids to sharded state dicts only.

    Plain state dicts stay as they are: Megatron-Bridge's export, for one, names parameters by them.

    virtual_stage: the model's, if a rank has several. hook: runs before the child describes itself.
    It may change amaxes in place, those that were collected earlier included.
    """

    hook: SaveHook | None = None

    def __init__(
        self, description: Mapping[str, Any], grids: Sequence[SavedGrid], virtual_stage: int = 0
    ) -> None:
        super().__init__()
        self.register_buffer("description", encode(description), persistent=False)
        self.virtual_stage = virtual_stage
        self.grids = {grid.key(None): grid for grid in grids}

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return this rank's tensors and where they lie in the whole. Megatron calls it."""
        assert not sharded_offsets, "the child of a whole model is on no axis"
        if self.hook is not None:
            self.hook.run()
        given = metadata or {}
        group = given.get("dp_cp_group") or mpu.get_data_parallel_group(with_context_parallel=True)
        singleton = bool(given.get("singleton_local_shards", False))
        rank, stages = group.rank(), mpu.get_pipeline_model_parallel_world_size()
        stage = mpu.get_pipeline_model_parallel_rank() + stages * self.virtual_stage
        replica = (stage, mpu.get_tensor_model_parallel_rank(), rank)
        state: dict[str, Any] = {
            f"{prefix}description": ShardedTensor.from_rank_offsets(
                f"{prefix}description",
                self.description,
                replica_id=replica,
                allow_shape_mismatch=True,
            )
        }
        for key, grid in self.grids.items():
            stat = block_amax(grid.layer.weight_quantizer)
            if stat is not None:  # None before calibration
                state[f"{prefix}{key}"] = grid.factory(stat, singleton, rank)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}description", None)  # the model keeps its own
        for key, grid in self.grids.items():
            stat = state_dict.pop(f"{prefix}{key}", None)
            if stat is not None:
                quantizer = grid.layer.weight_quantizer
                set_block_amax(quantizer, stat.to(self.description.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def add_state(
    model: GPTModel,
    description: Mapping[str, Any],
    layers: Sequence[QuantLayer],
    weights: Sequence[LocalWeight],
) -> None:
    """Give the model its child; ``layers`` are its quantized ones.

    A second call replaces the child of the first, and keeps its hook.
    """
    state = QuantState(description, grids_of(layers, weights), model.vp_stage or 0)
    state.hook = getattr(getattr(model, CHILD, None), "hook", None)
    model.add_module(CHILD, state.to(next(model.parameters()).device))


def describe_model(
    model: LiveModel, description: Mapping[str, Any], layers: Sequence[QuantLayer]
) -> None:
    """Give every chunk of the model its child; ``layers`` are the quantized ones of all chunks."""
    for number, chunk in enumerate(model.chunks):
        modules = set(chunk.modules())
        weights = [local.weight for local in model.local if local.chunk == number]
        add_state(chunk, description, [x for x in layers if x.module in modules], weights)


def before_save(model: LiveModel, run: Callable[[], None]) -> None:
    """Have ``run`` run before every save of the model that is described, in place of another.

    Collective like a save: Megatron asks for sharded state dicts on all ranks alike, to save and to
    load. run: may change amaxes in place.
    """
    child = getattr(model.chunks[0], CHILD)
    child.hook = SaveHook(run)
