"""Put our classes into ModelOpt's registry, and take them out again.

``mtq.quantize`` converts a module to the class that ``QuantModuleRegistry`` has for it, and
computes with the backend that the quantizer names. Importing this package changes neither.
"""

from dataclasses import dataclass

from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry
from torch import nn

from megatron_quant.layers.backend import register_backend, unregister_backend
from megatron_quant.layers.experts import EXPERTS, QuantExperts
from megatron_quant.layers.te import ATTENTION, COLUMN, DENSE_MLP, ROW, Column, Row, attention


@dataclass(frozen=True)
class _Entry:
    """The registry's class for a quantized ``base``, and the name that it is saved under."""

    base: type[nn.Module]
    quantized: type[QuantModule]
    key: str


_replaced: list[_Entry] = []
"""ModelOpt's entries that ours replace."""
_ours: list[_Entry] = []


def register() -> None:
    """Replace ModelOpt's entries by our classes; a second call does nothing.

    ``attach`` calls it. Call it yourself before your own ``mtq.quantize`` or ``mto.restore``.
    """
    register_backend()
    if _ours:
        return
    _replaced.extend(filter(None, map(_entry, (COLUMN, ROW, ATTENTION, EXPERTS, DENSE_MLP))))
    # ModelOpt's MLP goes, and nothing takes its place: it sets singleton_local_shards in the
    # caller's metadata, for all layers after it.
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

    Quantized models keep their classes, but not the backend that they compute with. So call it
    only when they are gone.
    """
    unregister_backend()
    _exchange(_ours, _replaced)
    _ours.clear()
    _replaced.clear()


def _entry(base: type[nn.Module]) -> _Entry | None:
    """Return the registry's entry for ``base``; None if it has none."""
    if base not in QuantModuleRegistry:
        return None
    made = QuantModuleRegistry[base]  # a subclass of the registered class and of the base
    return _Entry(base, made.__bases__[0], QuantModuleRegistry.get_key(base))


def _exchange(old: list[_Entry], new: tuple[_Entry, ...] | list[_Entry]) -> None:
    for entry in old:
        QuantModuleRegistry.unregister(entry.base)
    for entry in new:
        QuantModuleRegistry.register({entry.base: entry.key})(entry.quantized)
