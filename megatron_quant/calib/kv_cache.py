"""Calibrate the KV cache: find the largest keys and values of every attention, over all ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite

import torch

from megatron_quant.calib.calibration_file import CalibrationFile, cache_key
from megatron_quant.calib.observe import InputAmax, unquantized
from megatron_quant.calib.sync import merge_max
from megatron_quant.dist import Groups, together
from megatron_quant.errors import CalibrationError
from megatron_quant.layers import CachedTensor, QuantLayer
from megatron_quant.recipes import QuantPlan, cache_slots

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

    Returns:
        The amaxes by cache slot, equal on every rank; empty where ``plan`` calibrates none.

    Raises:
        CalibrationError: On every rank alike, for keys or values that are not finite, all zero, or
            never seen.
    """
    if plan.kv_cache != "fp8":
        return {}
    slots = [slot.name for slot in cache_slots(plan)]
    merged = _merged(slots, groups, seen) if loaded is None else _read(slots, groups, loaded)
    for name in slots:
        _check(name, merged.get(name))
    for tensor in cached:
        tensor.set_amax(merged[tensor.slot.name])
    return merged


def _merged(slots: Sequence[str], groups: Groups, seen: Seen) -> dict[str, float]:
    found = {name: stat.value for name, stat in seen.items() if stat.value is not None}
    return merge_max(slots, found, groups)


def _read(slots: Sequence[str], groups: Groups, file: CalibrationFile) -> dict[str, float]:
    found = together(groups, lambda: {name: file.cache_amax(name) for name in slots})
    lacking = next((name for name, value in found.items() if value is None), None)
    if lacking is not None:
        raise CalibrationError(
            f"--load-calibration {file.path} has no {cache_key(lacking)}: save one of a run with "
            "--export-kv-cache-quant fp8"
        )
    return {name: value for name, value in found.items() if value is not None}


def _check(name: str, amax: float | None) -> None:
    if amax is None:
        raise CalibrationError(
            f"no calibration token reached {name} of the KV cache: give more data with --calib-size"
        )
    if not isfinite(amax):
        raise CalibrationError(
            f"{name} of the KV cache contains NaN or Inf: repair the checkpoint, or export with "
            "--export-kv-cache-quant none"
        )
    if amax == 0:
        raise CalibrationError(
            f"{name} of the KV cache is zero for all calibration tokens: take "
            "--export-kv-cache-quant fp8_cast, which needs no calibration"
        )
