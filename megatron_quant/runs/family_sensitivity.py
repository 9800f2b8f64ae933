"""The front door of the measurement of families."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases, Quiet
from megatron_quant.runs.sensitivity_rows import Sensitivity
from megatron_quant.runs.settings import AutoQuantize, Calibration

if TYPE_CHECKING:
    from megatron_quant.dist import Groups


def sensitivity(
    source: str | Path,
    formats: str = "nvfp4,fp8",
    *,
    calibration: Calibration = Calibration(size=32),
    dtype: str = "bf16",
    report: str | Path | None = None,
    log_to: str | None = None,
    groups: "Groups | None" = None,
    phases: Phases | None = None,
) -> Sensitivity:
    """Measure the KL divergence of quantizing each family of weights alone, in each format.

    Runs transformers' model, a layer at a time. The ranks share the samples. Collective.

    Args:
        source: the checkpoint's directory or hub id.
        formats: recipes with commas between.
        calibration: the text that is run, and how static scales of inputs follow from it.
        dtype: the dtype in which the model is run.
        report: file for the figures: a page (.html), with the same as .json beside it; with
            another ending JSON alone.
        log_to: tracker that gets them: ``mlflow``, ``mlflow:URI``, ``tensorboard:DIR``.
        groups: the ranks that share the samples; None for all that torchrun started.
        phases: where progress is shown; None shows nothing.

    Raises:
        QuantError: on every rank alike, for a checkpoint, recipe or text that cannot be used, and
            for a divergence that is not finite.
    """
    names = AutoQuantize(formats=formats).candidates
    options = QuantizeOptions(
        hf_model_id=str(source),
        export_quant_cfg=names[0],
        dtype=dtype,
        calibration=calibration,
        stream=True,
    )
    from megatron_quant.rendezvous import start_ranks
    from megatron_quant.runs.facts import of_sensitivity
    from megatron_quant.runs.family_losses import measured
    from megatron_quant.runs.report import check_report, reporting, write_report

    groups, where = groups or start_ranks(), reporting(report, log_to)
    check_report(where, groups, source)
    found = measured(options, names, groups, phases or Quiet())
    write_report(where, groups, lambda: of_sensitivity(found, str(source)))
    return found
