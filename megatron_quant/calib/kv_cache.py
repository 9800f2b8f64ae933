"""Calibrate the KV cache: find the largest keys and values of every attention, over all ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from megatron_quant.calib.cache_amax import merge_cache
from megatron_quant.calib.calibration_file import CalibrationFile
from megatron_quant.calib.observe import InputAmax, unquantized
from megatron_quant.dist import Groups
from megatron_quant.layers import CachedTensor, QuantLayer
from megatron_quant.recipes import QuantPlan

Seen = Mapping[str, InputAmax]
"""Cache slot -> running amax of this rank's heads."""


@contextmanager
def watch(cached: Sequence[CachedTensor]) -> Iterator[Seen]:
    """Watch the keys and values of forwards, unquantized while the context lasts."""
    seen = {tensor.slot.name: InputAmax() for tensor in cached}
    hooks = [t.quantizer.register_forward_pre_hook(seen[t.slot.name]) for t in cached]
    try:
        with unquantized(cached):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def run_rest(layers: Sequence[QuantLayer], forwards: Iterable[Callable[[], object]]) -> None:
    """Run, with the model unquantized, the forwards that calibrating ``layers`` did not need."""
    with torch.no_grad(), unquantized(layers):
        for forward in forwards:
            forward()


def calibrate_kv_cache(
    cached: Sequence[CachedTensor],
    plan: QuantPlan,
    groups: Groups,
    seen: Seen,
    loaded: CalibrationFile | None = None,
) -> dict[str, float]:
    """Give every cache its amax, merged over all ranks; every rank of ``groups`` calls it.

    Args:
        cached: This rank's keys and values.
        plan: Decisions on every slot of the model.
        groups: This rank's groups.
        seen: Running amaxes of this rank.
        loaded: What an earlier calibration measured, which counts in place of ``seen``.

    Returns and raises as :func:`merge_cache`.
    """
    found = {name: stat.value for name, stat in seen.items() if stat.value is not None}
    merged = merge_cache(plan, groups, found, loaded)
    for tensor in cached if merged else ():
        tensor.set_amax(merged[tensor.slot.name])
    return merged
