"""Layers for speculation of a live model, which Megatron calls ``mtp``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_quant.errors import ArchitectureError
from megatron_quant.models import Architecture, stated_drafts


def live_drafts(config: Any, architecture: Architecture, hf_config: Mapping[str, Any]) -> int:
    """Return how many layers for speculation a live model has, by its TransformerConfig.

    Raises ArchitectureError for a number that config.json does not state, for a model whose names
    of them are not known, and for a tied embedding that another stage has too.
    """
    count = config.mtp_num_layers or 0
    if count == 0:
        return 0
    said, names = f"mtp_num_layers={count} in the TransformerConfig", architecture.draft_names
    if names is None:
        raise ArchitectureError(
            f"{said} adds layers that predict further tokens, and their names in a checkpoint of "
            f"{architecture.name} are not known: build the model with mtp_num_layers=None"
        )
    stated = stated_drafts(hf_config)
    wanted = names.most if stated is None else stated
    if wanted is not None and count != wanted:
        raise ArchitectureError(
            f"{said}, but config.json makes it {wanted}: give the config.json of this very model"
        )
    if config.pipeline_model_parallel_size > 1 and architecture.decoder(hf_config).tied:
        raise ArchitectureError(
            f"{said}, and the output layer is the embedding: such a model is exported without a "
            "pipeline alone; leave --pp at 1"
        )
    return count


@contextmanager
def logits_alone(chunk: GPTModel) -> Iterator[None]:
    """Let a forward without labels return the model's logits; layers for speculation run too.

    Megatron makes a loss of what they return, for which it needs labels.
    """
    config, count = chunk.config, chunk.config.mtp_num_layers
    block = getattr(chunk, "mtp", None)
    if not count or block is None:
        yield
        return

    def own(module: Any, inputs: Any, output: Tensor) -> Tensor:
        config.mtp_num_layers = None  # what follows then sees a model without
        return output.chunk(1 + count)[0]

    hook = block.register_forward_hook(own)
    try:
        yield
    finally:
        hook.remove()
        config.mtp_num_layers = count
