"""Give a checkpoint without an output layer the one that is given or found beside it."""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_quant.errors import CheckpointError

HEAD = "lm_head.weight"
BESIDE = "lm_head.safetensors"
"""File beside the checkpoint's own that may hold the output layer."""


def with_head(
    directory: Path, empty: PreTrainedModel, stored: Collection[str], given: Path | None
) -> tuple[PreTrainedModel, torch.Tensor | None]:
    """Return the model with its output layer, on the meta device, and the layer's weight.

    The output layer is that of ``given``, that of ``lm_head.safetensors`` in the directory, or the
    embedding if config.json ties them.

    Args:
        directory: The checkpoint.
        empty: Its base model, on the meta device.
        stored: Names of the checkpoint's tensors.
        given: A safetensors file whose only tensor is the output layer, [V, K]; None to look.

    Returns:
        The model, and the weight, [V, K]; None where the checkpoint has it or ties it.

    Raises:
        CheckpointError: If there is no output layer, or none of the model's shape.
    """
    config = empty.config
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(
            f"{directory}: transformers has no {type(empty).__name__} that predicts tokens; take "
            "the checkpoint that has its output layer"
        )
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, dtype=empty.dtype
        )
    if given is None and (directory / BESIDE).is_file():
        given = directory / BESIDE
    if given is not None:
        return model, _read(given, model)
    if HEAD not in stored and not config.tie_word_embeddings:
        raise CheckpointError(
            f"{directory} has no output layer, and config.json does not tie one to the embedding: "
            f"put it beside, as {BESIDE}, or give it with --auto-quantize-head"
        )
    return model, None


def _read(path: Path, model: PreTrainedModel) -> torch.Tensor:
    try:
        found = list(load_file(path).values())
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} cannot be read as safetensors ({e})") from e
    wanted = tuple(model.get_output_embeddings().weight.shape)
    shapes = [tuple(tensor.shape) for tensor in found]
    if shapes != [wanted]:
        raise CheckpointError(
            f"{path} holds tensors of shapes {shapes[:3]}: give one of shape {wanted}, the output "
            "layer"
        )
    return found[0]
