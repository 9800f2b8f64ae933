"""A training loop that never calls the model provider that was wrapped for it.

Megatron-LM's ``pretrain`` ignores its ``model_provider`` from core_v0.19 on where the config
describes the model. Nothing of this library would run then, and training would be unquantized.
"""

import weakref
from collections.abc import Callable
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    FullyShardedDataParallel,
    TorchFullyShardedDataParallel,
)
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from megatron_quant.errors import QuantError
from megatron_quant.mcore.live import is_quantized_model

_WRAPPERS = (DistributedDataParallel, FullyShardedDataParallel, TorchFullyShardedDataParallel)


class FirstCall:
    """Waits for the first call of a wrapped provider.

    Until then, the wrapping of a model without quantizers for training raises QuantError, on every
    rank, before the optimizer is made.
    """

    def __init__(self, name: str) -> None:
        """Begin to wait; ``name`` is the provider's."""

        def check(parent: nn.Module, attribute: str, child: Any) -> None:
            if not isinstance(parent, _WRAPPERS) or not isinstance(child, nn.Module):
                return
            if not is_quantized_model(child):
                raise QuantError(
                    f"this loop did not call {name}, which wrap_provider gave quantizers, and "
                    "trains another model (Megatron-LM core_v0.19 and newer build the model of its "
                    "config): add functools.partial(prepare, recipe=..., hf_model=...) to "
                    "pre_wrap_hooks of the model's config instead"
                )

        self._hook = register_module_module_registration_hook(check)

    def came(self) -> None:
        """Stop waiting; a second call does nothing."""
        self._hook.remove()

    def of(self, provide: Callable[..., nn.Module]) -> None:
        """Stop waiting when nobody can call ``provide`` any more."""
        weakref.finalize(provide, self._hook.remove)
