"""Read the account of a distributed checkpoint's tensors that lies beside them.

torch describes such a checkpoint in ``.metadata``, a pickle that torch and Megatron load whatever
it names. This module reads it first, and refuses it if it names more than a description of tensors
needs.
"""

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.storage import read_object
from megatron_quant.documents import MB, Limits, clipped, read_bytes, shown
from megatron_quant.errors import CheckpointError
from megatron_quant.mcore.checkpoint.pickles import check_pickle
from megatron_quant.mcore.checkpoint.pieces import PiecedTensor, pieces_of, shape_of
from megatron_quant.mcore.checkpoint.place import DESCRIPTION, TENSORS, checkpoint_in, is_described

BACKEND = "torch_dist"
_BACKENDS = (BACKEND, "fsdp_dtensor")
"""Formats whose tensors lie in files of torch.distributed.checkpoint."""
_METADATA = Limits(2048 * MB, 0)
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
    """A distributed checkpoint's directory, and its tensors' shapes by key.

    described: torch's description, as it was read. is_own: whether Megatron's dist_checkpointing
    wrote it, in format torch_dist; otherwise torch did, as for Megatron-FSDP.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    described: Any = None
    is_own: bool = True

    def tensors(self, keys: Iterable[str]) -> dict[str, PiecedTensor]:
        """Find where the tensors ``keys`` lie; CheckpointError where that cannot be said."""
        try:
            return pieces_of(self.described, keys)
        except Exception as e:  # whatever was in a pickle
            raise _unsound(self.path / TENSORS, e) from None

    def without(self, patterns: Sequence[str]) -> "TorchDist":
        """Leave out the keys that match one of ``patterns`` (``*`` stands for anything).

        Raises CheckpointError for a pattern that no key matches.
        """
        kept = dict(self.shapes)
        for pattern in patterns:
            matched = [key for key in self.shapes if fnmatchcase(key, pattern)]
            if not matched:
                raise CheckpointError(
                    f"--skip-keys {pattern} matches no key of {self.path}: leave it out"
                )
            for key in matched:
                kept.pop(key, None)
        return replace(self, shapes=kept)


def open_torch_dist(directory: Path) -> TorchDist:
    """Open the checkpoint in ``directory``, or the last one of a training run's directory.

    Raises CheckpointError if there is none, if torch.distributed.checkpoint did not write its
    tensors, and if its ``.metadata`` cannot be read or names more than a description of tensors
    needs.
    """
    path = checkpoint_in(directory)
    if not is_described(path):
        raise CheckpointError(
            f"{path} holds no distributed checkpoint ({TENSORS}): give a directory that "
            "--megatron-save-path or a training run wrote to the end"
        )
    own = (path / DESCRIPTION).is_file()
    backend = read_object(path / DESCRIPTION).get("sharded_backend") if own else _BACKENDS[1]
    if backend not in _BACKENDS:
        raise CheckpointError(
            f"{path} is a checkpoint of format {shown(backend)}: save it as {BACKEND} "
            "(--ckpt-format)"
        )
    file = path / TENSORS
    described = _described(file)
    return TorchDist(path, _shapes(described, file), described, backend == BACKEND)


class _Reader(pickle.Unpickler):
    """Unpickles a description of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _TORCH_DCP.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _described(file: Path) -> Any:
    content = read_bytes(file, _METADATA)
    try:
        check_pickle(content)
        return _Reader(BytesIO(content)).load()
    except Exception as e:  # a pickle can raise anything
        raise _unsound(file, e) from None


def _shapes(described: Any, file: Path) -> dict[str, tuple[int, ...]]:
    try:
        tensors = described.state_dict_metadata
        return {_text(key): shape_of(t.size) for key, t in tensors.items() if hasattr(t, "size")}
    except Exception as e:
        raise _unsound(file, e) from None


def _unsound(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file} holds more than a description of tensors ({clipped(str(error))}): fetch the "
        "checkpoint again, from a source that can be trusted"
    )


def _text(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError(f"a tensor is called {shown(key)}")
    return key
