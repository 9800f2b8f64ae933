"""Our classes in ModelOpt's registry: put there by a call, and taken out by one.

``mtq.quantize`` converts a module to the class that ``QuantModuleRegistry`` has for it, and
computes by the backend that a quantizer names. Importing this package changes neither.
"""

from dataclasses import dataclass

from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry
from torch import nn

from megatron_quant.layers.backend import register_backend, unregister_backend
from megatron_quant.layers.experts import EXPERTS, QuantExperts
from megatron_quant.layers.te import ATTENTION, COLUMN, DENSE_MLP, ROW, Column, Row, attention


@dataclass(frozen=True)
class _Entry:
    """The class that the registry gives a quantized ``base``, and the name it is saved by."""

    base: type[nn.Module]
    quantized: type[QuantModule]
    key: str


_replaced: list[_Entry] = []
"""ModelOpt's entries while ours stand in their place."""
_ours: list[_Entry] = []


def register() -> None:
    """Put our classes in the place of ModelOpt's entries; a second call does nothing.

    ``attach`` calls it. Call it before ``mtq.quantize`` or ``mto.restore`` of your own.
    """
    register_backend()
    if _ours:
        return
    _replaced.extend(filter(None, map(_entry, (COLUMN, ROW, ATTENTION, EXPERTS, DENSE_MLP))))
    # ModelOpt's MLP sets singleton_local_shards in the caller's metadata, for all layers after it:
    # none of ours replaces it.
    ours = (
        _Entry(COLUMN, Column, "megatron_quant_TEColumnParallelGroupedLinear"),
        _Entry(ROW, Row, "megatron_quant_TERowParallelGroupedLinear"),
        _Entry(ATTENTION, attention(), "megatron_quant_TEDotProductAttention"),
        _Entry(EXPERTS, QuantExperts, "megatron_quant_TEGroupedMLP"),
    )
    _exchange(_replaced, ours)
    _ours.extend(ours)


def unregister() -> None:
    """Put ModelOpt's entries back; a second call does nothing.

    Models that are quantized keep their classes, but not the backend that they compute by: call it
    when they are gone.
    """
    unregister_backend()
    _exchange(_ours, _replaced)
    _ours.clear()
    _replaced.clear()


def _entry(base: type[nn.Module]) -> _Entry | None:
    """Return the registry's entry for ``base``; None where it has none."""
    if base not in QuantModuleRegistry:
        return None
    made = QuantModuleRegistry[base]  # a subclass of the registered class and of the base
    return _Entry(base, made.__bases__[0], QuantModuleRegistry.get_key(base))


def _exchange(old: list[_Entry], new: tuple[_Entry, ...] | list[_Entry]) -> None:
    for entry in old:
        QuantModuleRegistry.unregister(entry.base)
    for entry in new:
        QuantModuleRegistry.register({entry.base: entry.key})(entry.quantized)
