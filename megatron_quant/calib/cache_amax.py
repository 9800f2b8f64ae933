"""Merge the largest keys and values of every attention over all ranks, or read them from a file."""

from collections.abc import Mapping, Sequence
from math import isfinite

import torch

from megatron_quant.calib.calibration_file import CalibrationFile, cache_key
from megatron_quant.calib.sync import merge_max
from megatron_quant.dist import Groups, together
from megatron_quant.errors import CalibrationError
from megatron_quant.recipes import QuantPlan, cache_slots


def merge_cache(
    plan: QuantPlan,
    groups: Groups,
    found: Mapping[str, torch.Tensor],
    loaded: CalibrationFile | None = None,
) -> dict[str, float]:
    """Merge the amaxes of cache slots that ranks have found. Collective.

    Args:
        plan: Decisions on every slot of the model.
        groups: This rank's groups.
        found: Amaxes of this rank by cache slot, fp32 []; other names do not matter.
        loaded: What an earlier calibration measured, which counts in place of ``found``.

    Returns:
        The amaxes by cache slot, equal on every rank; empty where ``plan`` calibrates none.

    Raises:
        CalibrationError: On every rank alike, for keys or values that are not finite, all zero, or
            never seen.
    """
    if plan.kv_cache != "fp8":
        return {}
    slots = [slot.name for slot in cache_slots(plan)]
    if loaded is not None:
        merged = _read(slots, groups, loaded)
    else:
        own = {name: found[name] for name in slots if name in found}
        merged = merge_max(slots, own, groups)
    for name in slots:
        _check(name, merged.get(name))
    return merged


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
