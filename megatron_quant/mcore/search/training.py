"""Run backwards of a live model for its activations alone, whatever its training run has set."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

_TRAINING = ("grad_scale_func", "finalize_model_grads_func", "no_sync_func", "grad_sync_func")
"""Settings by which a schedule scales and reduces the gradients of parameters."""


@contextmanager
def activations_alone(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Have backwards give gradients of activations, and of no parameter, while it lasts.

    The model evaluates: no dropout, no loss of routers.
    """
    parameters = [(p, p.requires_grad) for chunk in chunks for p in chunk.parameters()]
    modes = [(m, m.training) for chunk in chunks for m in chunk.modules()]
    configs: list[tuple[Any, dict[str, Any]]] = [
        (chunk.config, {n: getattr(chunk.config, n) for n in _TRAINING if hasattr(chunk.config, n)})
        for chunk in chunks
    ]
    hooks = [
        chunk.embedding.register_forward_hook(_with_gradient)
        for chunk in chunks
        if chunk.pre_process
    ]
    try:
        for p, _ in parameters:
            p.requires_grad_(False)
        for module, _ in modes:
            module.training = False
        for config, settings in configs:
            vars(config).update(dict.fromkeys(settings))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p, wanted in parameters:
            p.requires_grad_(wanted)
        for module, training in modes:
            module.training = training
        for config, settings in reversed(configs):
            vars(config).update(settings)


def _with_gradient(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.detach().requires_grad_()
