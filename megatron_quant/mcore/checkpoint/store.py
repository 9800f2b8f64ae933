"""Save quantized models as Megatron's distributed checkpoints, and load them at any layout.

A save holds the model's own ``sharded_state_dict`` without ``_extra_state``: those are pickles of
Transformer Engine's FP8 training and of ModelOpt. A load reads only tensors, through Megatron's
strategy for ``torch_dist``: no common state and no pickled objects.
"""

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_quant.dist import Groups, gather, raise_together, together
from megatron_quant.errors import CheckpointError, ExportError
from megatron_quant.formats import amax
from megatron_quant.mcore.checkpoint.read_alone import is_part_of_job, read_alone
from megatron_quant.mcore.checkpoint.state import DESCRIBED, decode
from megatron_quant.mcore.checkpoint.stored import CHILD, DESCRIPTION
from megatron_quant.mcore.checkpoint.torch_dist import TorchDist

_FAILURES = (CheckpointException, CheckpointingException, RuntimeError, ValueError, KeyError)
_OF_AN_EXPERT = re.compile(r"\.experts\.\d+\.linear_fc|\.linear_fc1\.weight_[wv]$")
OPTIMIZER = "optimizer"
# The state of whole parameters, under one key whichever ranks hold their experts or stages.
RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}

Chunks = Sequence[nn.Module]
"""A rank's parts of a model: one, or one for each virtual pipeline stage."""


def save(chunks: Chunks, directory: Path, groups: Groups, optimizer: Any = None) -> None:
    """Write the model, and an optimizer's state, to the empty ``directory``. Collective.

    ``metadata.json``, which makes it a checkpoint, is written last. Raises ExportError, on every
    rank alike, if the disk refuses, and where the job has ranks without the model.
    """
    if is_part_of_job(groups):
        raise ExportError(
            f"{directory}: the model is on {groups.size} of the job's {dist.get_world_size()} "
            "ranks, and Megatron saves checkpoints with all of them: export it, or save it in a "
            "job that has its ranks alone"
        )
    state = sharded_state(chunks, singleton=True)  # ModelOpt's layers always use it
    if optimizer is not None:
        state[OPTIMIZER] = optimizer.sharded_state_dict(state, metadata=RESHARDABLE)
    content = {"singleton_local_shards": True}
    error: BaseException | None = None
    try:
        dist_checkpointing.save(state, str(directory), content_metadata=content)
    except (OSError, *_FAILURES) as e:
        error = ExportError(f"{directory} cannot be written: {_reason(e)}; choose another disk")
        error.__cause__ = e
    except BaseException as e:
        error = e
    raise_together(error, groups)


def read_description(stored: TorchDist, groups: Groups) -> Any:
    """Read the document that was saved with the model; None without one. Collective.

    Raises CheckpointError if it is not JSON, or too large.
    """
    if DESCRIPTION not in stored.shapes:
        return None
    shape = stored.shapes[DESCRIPTION]
    if len(shape) != 1 or shape[0] > DESCRIBED.nbytes:
        raise CheckpointError(
            f"{stored.path}: {DESCRIPTION} has shape {list(shape)[:8]}, not one dim of at most "
            f"{DESCRIBED.nbytes} bytes: save it again"
        )
    empty = torch.empty(shape, dtype=torch.uint8)
    tensor = ShardedTensor.from_rank_offsets(DESCRIPTION, empty)
    loaded = read_tensors({DESCRIPTION: tensor}, stored, groups)
    try:
        return decode(loaded[DESCRIPTION])
    except CheckpointError as e:
        raise CheckpointError(f"{stored.path}: {e}: save it again") from None


@torch.no_grad()
def load(chunks: Chunks, stored: TorchDist, groups: Groups) -> None:
    """Fill the model's existing weights, amaxes and block statistics. Collective.

    Raises CheckpointError, on every rank alike, for a key that only the checkpoint or only the
    model has, for another shape, and for numbers that are not finite.
    """
    state = sharded_state(chunks, singleton=any(map(_OF_AN_EXPERT.search, stored.shapes)))
    for of_chunk in state.values():
        of_chunk.pop(DESCRIPTION)  # the model keeps its own
    sharded, _, factories = load_preprocess(state)
    check_keys(shapes_of(sharded), stored, groups)
    loaded = read_tensors(sharded, stored, groups)

    def assign() -> None:
        merged = apply_factory_merges(loaded, factories)
        for chunk, name in zip(chunks, state, strict=True):
            _assign(chunk, merged[name])
        _check_finite(chunks, stored.path)

    together(groups, assign)


def read_tensors(sharded: dict[str, Any], stored: TorchDist, groups: Groups) -> dict[str, Any]:
    """Read the tensors, and nothing but the files that hold tensors. Collective."""
    if is_part_of_job(groups):
        return together(groups, lambda: read_alone(sharded, stored))
    error: BaseException | None = None
    loaded: dict[str, Any] = {}
    try:
        loaded = TorchDistLoadShardedStrategy().load(sharded, stored.path)
    except (OSError, EOFError, pickle.UnpicklingError, *_FAILURES) as e:
        error = CheckpointError(
            f"{stored.path} cannot be read: {_reason(e)}; fetch or save it again"
        )
        error.__cause__ = e
    except BaseException as e:
        error = e
    raise_together(error, groups)
    return loaded


def _reason(error: BaseException) -> str:
    """Return one line: the error's, or the first of several that ranks raised together."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def sharded_state(chunks: Chunks, singleton: bool) -> dict[str, dict[str, Any]]:
    """Return each chunk's sharded state by the chunk's name, as in Megatron's own saves."""
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    found = {}
    for number, chunk in enumerate(chunks):
        metadata = {"dp_cp_group": group, "singleton_local_shards": singleton}
        megatrons: Any = chunk  # a MegatronModule, or what wraps one
        state = megatrons.sharded_state_dict(metadata=metadata)
        kept = {name: value for name, value in state.items() if "_extra_state" not in name}
        found[f"model{number}"] = kept
    return found


def shapes_of(sharded: Any) -> dict[str, tuple[int, ...] | None]:
    """Map each tensor's key to its global shape; None if it may differ (padded vocabulary)."""
    if isinstance(sharded, ShardedTensor):
        return {sharded.key: None if sharded.allow_shape_mismatch else sharded.global_shape}
    values: Iterable[Any] = sharded.values() if isinstance(sharded, dict) else sharded
    return {key: shape for value in values for key, shape in shapes_of(value).items()}


def check_keys(
    local: Mapping[str, tuple[int, ...] | None], stored: TorchDist, groups: Groups
) -> None:
    """Raise CheckpointError unless the checkpoint has exactly what all ranks together need.

    Keys that are not the model's, such as an optimizer's state, may be there too.
    """
    expected = {key: shape for part in gather(dict(local), groups) for key, shape in part.items()}
    where, tops = stored.path, {key.split(".")[0] for key in expected}
    if missing := sorted(expected.keys() - stored.shapes.keys()):
        raise CheckpointError(
            f"{where} has no {missing[0]} ({len(missing)} missing in all): it was saved of another "
            "model, with another recipe, or before it was calibrated; give that model and recipe, "
            "or save again after calibrating"
        )
    of_model = tops != {OPTIMIZER}
    beyond = sorted(
        key
        for key in stored.shapes.keys() - expected.keys() - {DESCRIPTION}
        if key.split(".")[0] in tops or (of_model and "_quantizer." in key)
    )
    if beyond:
        raise CheckpointError(
            f"{where} has {beyond[0]} ({len(beyond)} in all), which the model lacks: it was saved "
            "of another model or with another recipe; give that one"
        )
    for key, shape in sorted(expected.items()):
        if shape is not None and stored.shapes[key] != shape:
            raise CheckpointError(
                f"{where}: {key} is {stored.shapes[key]}, but {shape} in the model: it was saved "
                "of another model or with another recipe; give that one"
            )


def _assign(model: nn.Module, loaded: Mapping[str, torch.Tensor]) -> None:
    """Copy into the model's tensors; amaxes may be [1] in the checkpoint and [] in the model."""
    own = model.state_dict(keep_vars=True)
    rest = {}
    for name, tensor in loaded.items():
        if name in own:
            own[name].copy_(tensor.view_as(own[name]))
        else:
            rest[name.removeprefix(f"{CHILD}.")] = tensor
    state = model.get_submodule(CHILD)  # plain state dicts lack block statistics
    _, unexpected = state.load_state_dict(rest, strict=False)
    assert not unexpected, unexpected


def _check_finite(chunks: Chunks, path: Path) -> None:
    states = [chunk.state_dict(keep_vars=True) for chunk in chunks]
    for name, tensor in (item for state in states for item in state.items()):
        floating = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if floating and not torch.isfinite(amax(tensor)):
            raise CheckpointError(
                f"{path}: {name} has NaN or Inf; save the model again from a sound one"
            )
