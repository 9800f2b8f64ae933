"""Find Megatron's distributed checkpoints (``torch_dist``) on disk, and list their tensors.

torch describes such a checkpoint in ``.metadata``, a pickle that torch and Megatron load whatever
it names. This module reads it first, and refuses it if it names more than a description of tensors
needs.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.storage import read_object
from megatron_quant.documents import MB, Limits, clipped, read_bytes, shown
from megatron_quant.errors import CheckpointError
from megatron_quant.mcore.checkpoint.pickles import check_pickle

BACKEND = "torch_dist"
_DESCRIPTION, _TENSORS = "metadata.json", ".metadata"  # Megatron's file, and torch's
TRACKER = "latest_checkpointed_iteration.txt"
_TRACKED, _METADATA = Limits(64, 0), Limits(2048 * MB, 0)
# The names that torch.distributed.checkpoint and Megatron write into .metadata.
_TORCH_DCP = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device"),
    "collections": ("OrderedDict",),
    "builtins": ("set", "frozenset"),
    "pathlib": ("Path", "PosixPath"),
    "pathlib._local": ("Path", "PosixPath"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
}


@dataclass(frozen=True)
class TorchDist:
    """A distributed checkpoint's directory, and its tensors' shapes by key."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]


def open_torch_dist(directory: Path) -> TorchDist:
    """Open the checkpoint in ``directory``, or the last one of a training run's directory.

    Raises CheckpointError if there is none, if its format is not ``torch_dist``, and if its
    ``.metadata`` cannot be read or names more than a description of tensors needs.
    """
    path = latest(directory)
    if not is_checkpoint(path):
        raise CheckpointError(
            f"{path} holds no distributed checkpoint ({_DESCRIPTION} and {_TENSORS}): give a "
            "directory that --megatron-save-path or a training run wrote to the end"
        )
    backend = read_object(path / _DESCRIPTION).get("sharded_backend")
    if backend != BACKEND:
        raise CheckpointError(
            f"{path} is a checkpoint of format {shown(backend)}: save it as {BACKEND} "
            "(--ckpt-format)"
        )
    return TorchDist(path, _shapes(path / _TENSORS))


def is_checkpoint(path: Path) -> bool:
    """Return whether a distributed checkpoint was written there to the end."""
    return (path / _DESCRIPTION).is_file() and (path / _TENSORS).is_file()


def latest(directory: Path) -> Path:
    """Return the last checkpoint of a training run's directory; any other directory unchanged.

    Raises CheckpointError if the file in which the run names it cannot be read.
    """
    tracker = directory / TRACKER
    if not tracker.is_file():
        return directory
    iteration = read_bytes(tracker, _TRACKED).decode(errors="replace").strip()
    if iteration != "release" and not iteration.isdecimal():
        raise CheckpointError(
            f"{tracker} says {shown(iteration)}, which names no checkpoint: give the checkpoint's "
            "own directory"
        )
    return directory / ("release" if iteration == "release" else f"iter_{int(iteration):07d}")


class _Reader(pickle.Unpickler):
    """Unpickles a description of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _TORCH_DCP.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    content = read_bytes(file, _METADATA)
    try:
        check_pickle(content)
        tensors = _Reader(BytesIO(content)).load().state_dict_metadata
        return {_text(key): _shape(t.size) for key, t in tensors.items() if hasattr(t, "size")}
    except Exception as e:  # a pickle can raise anything
        raise CheckpointError(
            f"{file} holds more than a description of tensors ({clipped(str(e))}): fetch the "
            "checkpoint again, from a source that can be trusted"
        ) from None


def _text(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError(f"a tensor is called {shown(key)}")
    return key


def _shape(size: object) -> tuple[int, ...]:
    if not isinstance(size, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in size):
        raise ValueError("a shape is no list of whole numbers")
    return tuple(size)
