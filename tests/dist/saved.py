"""Saving and loading Megatron checkpoints in the ranks of a test."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.dist.command import Ended, command

Case = Mapping[str, Any]
Held = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]
"""Key, global shape, offset, local shape, and whether the rank writes it."""


def quantize(**options: Any) -> Any:
    """One run with these options, in the process groups that the ranks have."""
    from megatron_quant.runs.options import QuantizeOptions
    from megatron_quant.runs.megatron import quantize_run as run
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.mcore.model.parallel import start_distributed

    return run(QuantizeOptions.from_flags(**options), start_distributed(), ConsolePhases(console()))


def quantize_all(source: Path, out: Path, sizes: Sequence[int], cases: Mapping[str, Case]) -> None:
    """Every case, into ``out / NAME`` and ``out / NAME.saved``."""
    tp, ep, etp = sizes
    for name, case in cases.items():
        places = {"export_dir": out / name, "megatron_save_path": out / f"{name}.saved"}
        quantize(hf_model_id=str(source), tp=tp, ep=ep, etp=etp, **places, **case)


def load_all(
    first: Path,
    out: Path,
    sizes: Sequence[int],
    dialects: Mapping[str, str],
    again: Sequence[str] = (),
) -> None:
    """Load ``first / NAME.saved`` (or NAME) of every case and export; save those of ``again``."""
    tp, ep, etp = sizes
    for name, dialect in dialects.items():
        stored = first / f"{name}.saved"
        quantize(
            hf_model_id=None,
            export_quant_cfg=None,
            megatron_load_path=stored if stored.is_dir() else first / name,
            export_dir=out / name,
            megatron_save_path=out / f"{name}.saved" if name in again else None,
            export_format=dialect,
            tp=tp,
            ep=ep,
            etp=etp,
        )


def restored(stored: Path, tp: int, ep: int, etp: int) -> Any:
    """The model as ``quantize`` has it when it has loaded it."""
    import torch.distributed as dist

    from megatron_quant.runs.job import prepare_job
    from megatron_quant.runs.options import QuantizeOptions
    from megatron_quant.mcore.checkpoint.saved import describe_run
    from megatron_quant.layers.install import ExpertScales
    from megatron_quant.mcore.model.attach import attach_model
    from megatron_quant.mcore.model.load import empty_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.mcore.checkpoint.restored import open_saved, restore
    from megatron_quant.mcore.checkpoint.state import describe_model

    groups = start_distributed()
    options = QuantizeOptions.from_flags(
        hf_model_id=None, export_quant_cfg=None, megatron_load_path=stored, megatron_save_path=stored, tp=tp, ep=ep, etp=etp
    )
    saved = open_saved(stored, groups)
    job = prepare_job(options, dist.get_world_size(), saved)
    model = empty_model(job.architecture, job.hf_config, job.layout, groups, job.dtype)
    scales = ExpertScales(saved.expert_scales)
    layers, cached = attach_model(model, job.quant, scales)
    describe_model(model, describe_run(job.recipe, job.quant, job.expert_scales, saved.source), layers)
    restore(model, layers, cached, job.quant, saved, scales)
    return model.module


def save_as_training_does(stored: Path, out: Path, singleton: bool) -> list[Held]:
    """Save the loaded model, cut over all ranks, to an iteration of ``out``; what each gave."""
    import shutil

    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    size = dist.get_world_size()
    model = restored(stored, size, 1, size)
    folder = out / "iter_0000007"
    if dist.get_rank() == 0:
        folder.mkdir()
        shutil.copytree(stored / "hf", folder / "hf")
    dist.barrier()
    metadata = {
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": singleton,
    }
    state = model.sharded_state_dict(metadata=metadata)
    assert not any("experts" in k and v.data.numel() for k, v in state.items() if "_extra_s" in k)
    dist_checkpointing.save(state, str(folder))
    state = model.sharded_state_dict(metadata=metadata)
    apply_factories(state)
    return [
        (t.key, t.global_shape, t.global_offset, t.local_shape, t.replica_id == (0, 0, 0))
        for t in nested_values(state)
        if isinstance(t, ShardedTensor) and "_quantizer." in t.key
    ]


def written(held: Iterable[Iterable[Held]]) -> dict[str, torch.Tensor]:
    """How many ranks write each element of each tensor."""
    counts: dict[str, torch.Tensor] = {}
    for key, whole, offset, shape, writes in (item for rank in held for item in rank):
        count = counts.setdefault(key, torch.zeros(whole, dtype=torch.int64))
        own = (1,) * (len(whole) - len(shape)) + tuple(shape)
        count[tuple(slice(o, o + n) for o, n in zip(offset, own, strict=True))] += int(writes)
    return counts


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, by torch alone."""
    from torch.distributed.checkpoint import FileSystemReader, load

    from megatron_quant.mcore.checkpoint.torch_dist import open_torch_dist

    assert open_torch_dist(directory).shapes
    described = FileSystemReader(directory).read_metadata().state_dict_metadata
    found = {
        key: torch.empty(t.size, dtype=t.properties.dtype)
        for key, t in described.items()
        if hasattr(t, "size")
    }
    load(found, storage_reader=FileSystemReader(directory), no_dist=True)
    return found


def commands(argvs: Sequence[Sequence[str]]) -> list[Ended]:
    """One command after another, in the same process."""
    return [command(*argv) for argv in argvs]


def change_keys(stored: Path, outs: Sequence[Path], changes: Sequence[tuple[str, str]]) -> None:
    """Copies of ``stored``, each without one tensor and with another; empty names are none."""
    import shutil

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    whole = tensors(stored)
    for out, (drop, add) in zip(outs, changes, strict=True):
        kept = {key: t for key, t in whole.items() if key != drop}
        kept |= {add: torch.ones(7)} if add else {}
        out.mkdir()
        state = {k: ShardedTensor.from_rank_offsets(k, t) for k, t in kept.items()}
        dist_checkpointing.save(state, str(out))
        if (stored / "hf").is_dir():
            shutil.copytree(stored / "hf", out / "hf")
