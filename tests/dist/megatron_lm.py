"""A pretraining program like Megatron-LM's, written on megatron-core's public pieces.

It builds, wraps, loads, trains and saves in the order of Megatron-LM (read in core_v0.16.1,
``megatron/training``), under its names of flags, with its common state, its sharding of the
optimizer and ModelOpt's two calls. Import it in functions that run under the ``ranks`` fixture.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from modelopt.torch.opt.plugins import restore_sharded_modelopt_state, save_sharded_modelopt_state
from torch.distributed.checkpoint import CheckpointException

from tests.dist import (
    cpu_adam,  # noqa: F401
    training,
)

TRACKER = "latest_checkpointed_iteration.txt"
MODES = "modelopt_state"


def parse(words: Sequence[object]) -> Namespace:
    """The flags that this program has of Megatron-LM's."""
    parser = ArgumentParser()
    for kind in ("tensor", "expert", "pipeline"):
        parser.add_argument(f"--{kind}-model-parallel-size", type=int, default=1)
    parser.add_argument("--num-virtual-stages-per-pipeline-rank", type=int, default=1)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--train-iters", type=int, required=True)
    parser.add_argument("--save-interval", type=int, default=1000)
    return parser.parse_args([str(word) for word in words])


@dataclass
class Run:
    """What ``setup_model_and_optimizer`` returns. chunks: the model as it is below its wrappers."""

    args: Namespace
    chunks: list[Any]
    script: training.Script
    scheduler: OptimizerParamScheduler
    iteration: int = 0


Event = Callable[[int], None]
_NOTHING: Event = lambda step: None  # noqa: E731


@dataclass(frozen=True)
class Events:
    """What the program calls with the number of finished steps; a user adds such lines to it."""

    begin: Event = _NOTHING
    end: Event = _NOTHING


def setup(args: Namespace, model_provider: Callable[..., Any]) -> Run:
    """Build, wrap and load."""
    chunks = [_built(args, model_provider, stage) for stage in range(_stages(args))]
    script = training.wrap([Float16Module(chunk.config, chunk) for chunk in chunks])
    scheduler = OptimizerParamScheduler(
        script.optimizer,
        **{"init_lr": 0.0, "max_lr": 1e-3, "min_lr": 1e-3, "lr_warmup_steps": 0},
        **{"lr_decay_steps": 100, "lr_decay_style": "constant"},
        **{"start_wd": 0.0, "end_wd": 0.0, "wd_incr_steps": 100, "wd_incr_style": "constant"},
    )
    run = Run(args, chunks, script, scheduler)
    if _last(args.load) is not None:
        _load(run)
    return run


def train(run: Run, batches: Sequence[torch.Tensor], events: Events = Events()) -> None:
    """Train and save; every step takes all batches."""
    while run.iteration < run.args.train_iters:
        events.begin(run.iteration)
        run.script.step(batches)
        run.scheduler.step(increment=1)
        events.end(run.iteration)
        run.iteration += 1
        if run.args.save and run.iteration % run.args.save_interval == 0:
            _save(run)


def _stages(args: Namespace) -> int:
    return args.num_virtual_stages_per_pipeline_rank


def _last(directory: Path | None) -> Path | None:
    """The folder of the last save; None without one."""
    tracker = directory / TRACKER if directory else None
    if tracker is None or not tracker.is_file():
        return None
    return directory / f"iter_{int(tracker.read_text()):07d}"


def _built(args: Namespace, model_provider: Callable[..., Any], stage: int) -> Any:
    """The provider's model, and what ModelOpt's switch makes of it before it is wrapped."""
    first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
    chunk = model_provider(pre_process=first, post_process=last, vp_stage=stage)
    at = _last(args.load)
    if at is not None and (at / MODES).is_dir():
        restore_sharded_modelopt_state([chunk], at)
    return chunk


def _save(run: Run) -> None:
    folder = run.args.save / f"iter_{run.iteration:07d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    state = _state(run, metadata | {"dp_cp_group": _replicas()}, whole=True)
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    save_sharded_modelopt_state(run.chunks, folder, ("torch_dist", 1))
    dist.barrier()
    if dist.get_rank() == 0:
        (run.args.save / TRACKER).write_text(str(run.iteration))


def _load(run: Run) -> None:
    folder, optimizer = _last(run.args.load), run.script.optimizer
    assert folder is not None
    common = dist_checkpointing.load_common_state_dict(str(folder))
    layouts = [{k: v for k, v in vars(of).items() if "_size" in k} for of in (common["args"], run.args)]
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    metadata |= {"dp_cp_group": _replicas()}
    whole = not run.args.finetune
    wanted = _state(run, metadata, whole, is_loading=True)
    if layouts[0] != layouts[1]:
        wanted.pop("rng_state", None)
    try:
        state = dist_checkpointing.load(wanted, str(folder))
    except CheckpointException as e:  # of a kind that would end the rank without a word
        raise RuntimeError(str(e)) from None
    for name, chunk in zip(_names(run.chunks), run.script.model, strict=True):
        chunk.load_state_dict(state[name], strict=True)
    if not whole:
        optimizer.reload_model_params()
        return
    optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["opt_param_scheduler"])
    run.iteration = state["iteration"]


def _state(
    run: Run, metadata: dict[str, Any], whole: bool, is_loading: bool = False
) -> dict[str, Any]:
    """What a checkpoint holds; whole: with the optimizer, its schedule and the generators."""
    state: dict[str, Any] = {
        "args": run.args,
        "checkpoint_version": 3.0,
        "iteration": run.iteration,
    }
    for name, chunk in zip(_names(run.chunks), run.chunks, strict=True):
        state[name] = chunk.sharded_state_dict(metadata=metadata)
    if whole:
        optimizer = run.script.optimizer
        found = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        state |= {"optimizer": found, "opt_param_scheduler": run.scheduler.state_dict()}
        state["rng_state"] = _generators()
    return state


def _names(chunks: Sequence[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _replicas() -> Any:
    return mpu.get_data_parallel_group(with_context_parallel=True)


def _generators() -> ShardedObject:
    tp, pp, dp = (
        (mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()),
        (mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()),
        (_replicas().rank(), _replicas().size()),
    )
    ranks, sizes = zip(pp, tp, dp, strict=True)
    held = [{"torch_rng_state": torch.get_rng_state()}]
    return ShardedObject("rng_state", held, sizes, ranks, replica_id=0)
