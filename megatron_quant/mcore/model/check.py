"""Check, before anything is attached, that a live model is what its architecture's table says."""

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state as mpu
from torch import nn

from megatron_quant.ckpt.plan import Layout
from megatron_quant.errors import ArchitectureError
from megatron_quant.mcore.model.locate import LocalParam
from megatron_quant.models import local_shape

_NORMED_QUERIES = ".self_attention.linear_q_proj.layer_norm_weight"
"""The weight that releases from 0.19 on give latent attention without query compression."""


def check_model(chunks: Sequence[nn.Module], local: Sequence[LocalParam]) -> None:
    """Raise ArchitectureError unless this rank's chunks hold exactly ``local``, in its shapes."""
    for number, chunk in enumerate(chunks):
        own = [p for p in local if p.chunk == number]
        _check_names(chunk, own)
        for param in own:
            _check_shape(param, chunk)


def _check_names(chunk: nn.Module, local: Sequence[LocalParam]) -> None:
    named = {name for name, _ in chunk.named_parameters()}
    expected = {p.name for p in local if not p.param.fp32}
    extra = sorted(named - expected)
    if any(name.endswith(_NORMED_QUERIES) for name in extra):
        raise ArchitectureError(
            "q_lora_rank=None in config.json: this megatron-core release normalizes the inputs of "
            "such queries twice, but the model once; use megatron-core 0.16, or --stream"
        )
    if extra:
        raise ArchitectureError(
            f"the Megatron model has a parameter {extra[0]} that its table does not describe "
            f"({len(extra)} in all): give the config.json of this very model, or use --stream"
        )
    named |= {name for name, _ in chunk.named_buffers()}
    if missing := sorted({p.name for p in local} - named):
        raise ArchitectureError(
            f"the Megatron model has no parameter {missing[0]} ({len(missing)} missing in all): "
            "build it with the Transformer Engine layer spec and grouped experts"
        )


def _check_shape(local: LocalParam, chunk: nn.Module) -> None:
    inside = local.param.inside
    if inside is not None:
        held = len(chunk.get_parameter(local.name))
        if held * local.shard_size != inside.rows:
            raise ArchitectureError(
                f"the Megatron model's {local.name} has {held} rows on this rank, but config.json "
                f"makes it {inside.rows} in all: give the config.json of this very model"
            )
    tensor = local.tensor(chunk)
    expected = local_shape(local.param, local.shard_rank, local.shard_size)
    if tuple(tensor.shape) != expected:
        shard = f"shard {local.shard_rank} of {local.shard_size} of " * (local.shard_size > 1)
        raise ArchitectureError(
            f"the Megatron model's {local.name} is {tuple(tensor.shape)}, but config.json makes "
            f"{shard}{local.param.name} {expected}: give the config.json of this very model"
        )


def check_place(chunks: Sequence[Any], layout: Layout, layers: int) -> None:
    """Raise ArchitectureError unless the model is cut as Megatron's present groups say.

    chunks: this rank's GPTModels. layers: how many the whole model has. Every rank must hold the
    layers and experts that its place in the groups calls for.
    """
    held = [x.layer_number - 1 for chunk in chunks for x in chunk.decoder.layers]
    if layout.stages:
        held = [n for stage in layout.stages for chunk in stage for n in chunk]
    if sorted(held) != list(range(layers)):
        raise ArchitectureError(
            f"the Megatron model has {len(held)} layers ({_shown(held)}), but config.json says "
            f"{layers}: give the config.json of this very model, and all its pipeline stages"
        )
    for chunk in chunks:
        _check_groups(chunk)
        for layer in chunk.decoder.layers:
            _check_experts(layer, layout)


def _shown(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:4]))
    return f"{shown}, ..." if len(numbers) > 4 else shown


def _check_groups(chunk: Any) -> None:
    """Refuse a model with process groups of its own, which this library does not know."""
    groups = getattr(chunk, "pg_collection", None)
    for name, known in (
        ("tp", mpu.get_tensor_model_parallel_group()),
        ("pp", mpu.get_pipeline_model_parallel_group()),
        ("ep", mpu.get_expert_model_parallel_group()),
        ("expt_tp", mpu.get_expert_tensor_parallel_group()),
    ):
        group = getattr(groups, name, None)
        if group is None:
            continue
        rank, size = known.rank(), known.size()
        if (group.rank(), group.size()) != (rank, size):
            raise ArchitectureError(
                f"the Megatron model was built with a {name} group of its own (rank {group.rank()} "
                f"of {group.size()}), but megatron.core.parallel_state has rank {rank} of {size}: "
                "build it with the groups of parallel_state"
            )


def _check_experts(layer: Any, layout: Layout) -> None:
    here = getattr(layer.mlp, "local_expert_indices", None)
    if here is None:
        return
    each = layout.experts // layout.ep_size
    first = mpu.get_expert_model_parallel_rank() * each
    if list(here) != list(range(first, first + each)):
        raise ArchitectureError(
            f"layer {layer.layer_number - 1} of the Megatron model holds the experts "
            f"{_shown(list(here))} on this rank, but config.json makes it {each} from {first} on: "
            "give the config.json of this very model"
        )
