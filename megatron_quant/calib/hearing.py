"""Watch the inputs of layers. Those that are deaf run without being measured."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from megatron_quant.layers import QuantLayer

_DEAF = "_megatron_quant_deaf"
"""The attribute of a deaf module; set in ``vars``, so that no state dict has it."""


def hear(module: nn.Module, hook: Callable[[nn.Module, Any], None]) -> Any:
    """Call ``hook`` before each forward of ``module``, unless it is deaf; return the handle."""

    def unless_deaf(module: nn.Module, args: Any) -> None:
        if _DEAF not in vars(module):
            hook(module, args)

    return module.register_forward_pre_hook(unless_deaf)


@contextmanager
def deaf(layers: Sequence[QuantLayer]) -> Iterator[None]:
    """Let ``layers`` run without being measured while the context lasts."""
    modules = [module for layer in layers for module in (layer.module, layer.input_quantizer)]
    for module in modules:
        vars(module)[_DEAF] = True
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop(_DEAF, None)
