"""Write a run's findings as JSON for programs (``--report``)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_quant.dist import Groups, together
from megatron_quant.documents import check_output_file, write_json

if TYPE_CHECKING:  # imports Megatron, which needs use_cpu() first on a host without a GPU
    from megatron_quant.runs.file_to_file import Streamed
    from megatron_quant.runs.megatron import Outcome


def check_report(path: Path | None, groups: Groups) -> None:
    """Refuse now a file that could not be written after the work. Collective."""
    together(groups, lambda: check_output_file("--report", path) if groups.rank == 0 else None)


def write_report(
    path: Path | None, groups: Groups, content: Callable[[], Mapping[str, Any]]
) -> None:
    """Write ``content`` into the file ``path``, on the first rank. Collective."""
    if path is not None:
        together(groups, lambda: write_json(path, content()) if groups.rank == 0 else None)


def of_outcome(outcome: "Outcome") -> dict[str, Any]:
    """Return a run's findings as JSON, with every amax and token count by slot name."""
    calibration, plan = outcome.calibration, outcome.job.export
    report: dict[str, Any] = {
        "recipe": outcome.job.quant.recipe,
        "seconds": dict(outcome.seconds),
        "weight_amax": dict(calibration.weight_amax),
        "input_amax": dict(calibration.input_amax),
        "kv_amax": dict(outcome.kv_amax),
        "expert_tokens": dict(calibration.tokens),
        "cold_experts": list(calibration.cold),
        "left_out": list(outcome.left_out),
    }
    if plan:
        report |= {"bytes_before": plan.bytes_before, "bytes_after": plan.bytes_after}
    if outcome.fake_quant:
        sums = outcome.fake_quant
        report["fake_quant"] = {
            "perplexity": sums.perplexity,
            "kl": sums.mean_kl,
            "tokens": sums.tokens,
        }
    return report


def of_streamed(streamed: "Streamed") -> dict[str, Any]:
    """Return a streamed run's findings as JSON, with every amax that it needed by slot name."""
    plan, found = streamed.job.exported, streamed.found
    report = {
        "recipe": streamed.job.quant.recipe,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "seconds": dict(streamed.seconds),
        "weight_amax": dict(streamed.weight_amax),
        "input_amax": dict(streamed.inputs.found) if streamed.inputs else {},
        "expert_tokens": dict(streamed.tokens),
        "cold_experts": list(streamed.inputs.cold) if streamed.inputs else [],
        "left_out": list(streamed.left_out),
    }
    return report if found is None else report | {"search": found.document()}
