"""Start torch.distributed and Megatron's process groups, and find what every rank holds."""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel

from megatron_quant.ckpt.plan import Coord, Layout
from megatron_quant.dist import Groups, Replicas, Shards, gather
from megatron_quant.rendezvous import join


def start_distributed(minutes: float = Groups.minutes) -> Groups:
    """Join the ranks that ``torchrun`` started, or be the only one without it; idempotent.

    It takes NCCL with one GPU per local rank if CUDA is available, else gloo. minutes: how long a
    rank waits for the slowest one.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        join("nccl" if cuda else "gloo", minutes)
    return Groups(None, "cuda" if cuda else "cpu", minutes=minutes)


def start_megatron(layout: Layout, minutes: float = Groups.minutes) -> None:
    """Make Megatron's process groups at the sizes of ``layout``; replace groups of other sizes.

    Groups that have these sizes already stay. Megatron never closes groups that it replaces, and
    each of its twenty or so keeps a thread and a socket per rank. minutes: as for the default
    group.
    """
    if _runs_at(layout):
        return
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp_size,
        expert_model_parallel_size=layout.ep_size,
        expert_tensor_parallel_size=layout.etp_size,
        pipeline_model_parallel_size=layout.pp_size,
        context_parallel_size=layout.cp_size,
        virtual_pipeline_model_parallel_size=virtual_size(layout),
        distributed_timeout_minutes=minutes,
    )


def virtual_size(layout: Layout) -> int | None:
    """Return the chunks per pipeline rank as Megatron takes it: None for one."""
    chunks = len(layout.stages[0]) if layout.stages else 1
    return chunks if chunks > 1 else None


def _runs_at(layout: Layout) -> bool:
    return mpu.model_parallel_is_initialized() and (
        layout.tp_size,
        layout.ep_size,
        layout.etp_size,
        layout.pp_size,
        virtual_size(layout),
        layout.cp_size,
    ) == (
        mpu.get_tensor_model_parallel_world_size(),
        mpu.get_expert_model_parallel_world_size(),
        mpu.get_expert_tensor_parallel_world_size(),
        mpu.get_pipeline_model_parallel_world_size(),
        mpu.get_virtual_pipeline_model_parallel_world_size(),
        mpu.get_context_parallel_world_size(),
    )


def shards(device: str) -> Shards:
    """Return the ranks that share this rank's tensors in Megatron's present groups."""
    return Shards(
        Groups(mpu.get_tensor_model_parallel_group(), device),
        Groups(mpu.get_expert_tensor_parallel_group(), device),
        Replicas(
            Groups(mpu.get_data_parallel_group(with_context_parallel=True), device),
            Groups(mpu.get_expert_data_parallel_group(), device),
            Groups(mpu.get_expert_model_parallel_group(), device),
        ),
    )


def megatron_layout(groups: Groups, experts: int, chunks: Sequence[GPTModel]) -> Layout:
    """Return the layout of Megatron's groups: every rank says where it is. Collective.

    experts: experts per layer, 0 for a model without. chunks: this rank's part of the model; it
    tells which layers the rank holds.
    """
    layers = tuple(tuple(x.layer_number - 1 for x in chunk.decoder.layers) for chunk in chunks)
    here = Coord(
        tp=mpu.get_tensor_model_parallel_rank(),
        ep=mpu.get_expert_model_parallel_rank(),
        etp=mpu.get_expert_tensor_parallel_rank(),
        pp=mpu.get_pipeline_model_parallel_rank(),
    )
    said = gather((here, layers), groups)
    stages = {coord.pp: held for coord, held in said}
    return Layout(
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        ep_size=mpu.get_expert_model_parallel_world_size(),
        etp_size=mpu.get_expert_tensor_parallel_world_size(),
        coords=tuple(coord for coord, _ in said),
        experts=experts,
        stages=tuple(stages[pp] for pp in range(len(stages))) if len(stages) > 1 else (),
        cp_size=mpu.get_context_parallel_world_size(),
    )
