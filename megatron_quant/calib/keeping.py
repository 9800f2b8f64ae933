"""List the tensors that a finished calibration puts into a calibration file."""

from collections.abc import Iterator, Mapping

import torch

from megatron_quant.calib.calibration import CalibrationReport
from megatron_quant.calib.calibration_file import AMAX, TOKENS, cache_key, statistic_key
from megatron_quant.recipes import QuantPlan


def measured_tensors(
    plan: QuantPlan, report: CalibrationReport, kv_amax: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """Return the amaxes and counts of a calibration, by their names in a calibration file.

    Args:
        plan: Decisions on every slot of the model.
        report: Result of ``calibrate``.
        kv_amax: Result of ``calibrate_kv_cache``.
    """
    tensors = dict(_of_inputs(plan, report))
    return tensors | {cache_key(name): torch.tensor(value) for name, value in kv_amax.items()}


def _of_inputs(plan: QuantPlan, report: CalibrationReport) -> Iterator[tuple[str, torch.Tensor]]:
    for decision in plan.quantized:
        slot = decision.slot
        for module in slot.sources:
            if slot.name in report.scaled_amax:
                amax = torch.tensor(report.scaled_amax[slot.name])
                yield statistic_key(module, AMAX), amax
            if slot.name in report.tokens:
                yield statistic_key(module, TOKENS), torch.tensor(report.tokens[slot.name])
