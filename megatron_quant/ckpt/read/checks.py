"""Check the tensors of a checkpoint against the model that its config describes."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_quant.ckpt.read.source import TensorInfo, Weights
from megatron_quant.errors import CheckpointError
from megatron_quant.models import Param, Role, is_carried

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that an unquantized tensor may have."""
_TABLES = re.compile(r".*\.tid2eid")
"""Tables of whole numbers: DeepSeek-V4's experts of each token."""
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.attention\.masked_bias")
_PACKED = ("qweight", "weight_packed")
"""Last name parts of tensors that are a weight's codes, whatever a config says."""


def check_weights(checkpoint: Weights, params: Iterable[Param]) -> tuple[str, ...]:
    """Check that a checkpoint has every source of ``params`` in its shape, and nothing unexpected.

    Returns the names of tensors that may stay unused: buffers that old versions of transformers
    stored, ``lm_head.weight`` if the embedding takes its place, and, by config.json, layers that
    only speculation needs and models beside the text decoder. Raises CheckpointError for the first
    tensor that is missing, misshapen, not in bf16, fp16 or fp32, or unexpected.
    """
    path, config, tensors = checkpoint.path, checkpoint.config, checkpoint.dense()
    params = tuple(params)
    sources = {s.name: s.shape for p in params for s in p.sources}
    for name, shape in sources.items():
        _check_tensor(path, tensors, name, shape)
    rest = [name for name in tensors if name not in sources]
    tied = all(p.role is not Role.OUTPUT for p in params)
    ignored = {n for n in rest if is_buffer(n) or (tied and _is_head(n))}
    ignored |= {n for n in rest if is_carried(config, n)}
    unexpected = [name for name in rest if name not in ignored]
    if unexpected:
        raise CheckpointError(
            f"{path}: {unexpected[0]} ({len(unexpected)} such) is no tensor of the "
            "architecture in config.json; correct config.json or remove the tensor"
        )
    return tuple(n for n in rest if n in ignored)


def plain_dtypes(name: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes in which the tensor of this name may be stored unquantized."""
    return (torch.int64, torch.int32) if _TABLES.fullmatch(name) else PLAIN_DTYPES


def _is_head(name: str) -> bool:
    return f".{name}".endswith(".lm_head.weight")


def is_buffer(name: str) -> bool:
    """Return whether a tensor is a buffer that old transformers stored and no model needs."""
    return _BUFFERS.fullmatch(name) is not None


def _check_tensor(
    path: Path, tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]
) -> None:
    info = tensors.get(name)
    if info is None:
        module = name.rpartition(".")[0]
        packed = [n for n in beside(tensors, module) if n.rpartition(".")[2] in _PACKED]
        if packed:
            raise _packed_unsaid(path, packed[0])
        if _is_head(name):
            raise CheckpointError(
                f"{path}: tensor {name} is missing, and tie_word_embeddings in config.json does "
                "not say that the embedding takes its place: save the model with its head (of "
                "transformers a ...ForCausalLM, not a bare ...Model), fetch the checkpoint again, "
                "or correct config.json"
            )
        raise CheckpointError(
            f"{path}: tensor {name} is missing; fetch the checkpoint again, or correct config.json"
        )
    if info.shape != shape:
        raise CheckpointError(
            f"{path / info.file}: {name} has shape {list(info.shape)}, but config.json "
            f"asks for {list(shape)}; correct config.json"
        )
    if info.dtype not in plain_dtypes(name):
        if name.rpartition(".")[2] in _PACKED:
            raise _packed_unsaid(path, name)
        raise CheckpointError(
            f"{path / info.file}: {name} is stored as {info.dtype}; "
            "give a checkpoint in bf16, fp16 or fp32"
        )


def _packed_unsaid(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name.rpartition('.')[0]} is packed ({name}), but quantization_config in "
        "config.json does not say that it is quantized; correct quantization_config"
    )


def beside(tensors: Iterable[str], module: str) -> list[str]:
    """Return the names of all tensors of the module of this name."""
    return [name for name in tensors if name.rpartition(".")[0] == module]


def check_plain(path: Path, name: str, dtype: torch.dtype) -> None:
    """Raise CheckpointError if an unquantized tensor has a quantized one's dtype."""
    if dtype not in plain_dtypes(name):
        raise CheckpointError(
            f"{path}: {name} is {dtype}, but quantization_config in config.json does not say that "
            "it is quantized; correct quantization_config"
        )
