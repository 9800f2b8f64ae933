"""Report a run of ``quantize``, as lines for people and as JSON for programs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_quant.cli.console import escape
from megatron_quant.cli.tables import sizes_line

if TYPE_CHECKING:  # imports Megatron, which needs ready_host() first
    from megatron_quant.ckpt.verify import Report
    from megatron_quant.runs import Outcome, Streamed

_COLD_SHOWN = 5


def summary(outcome: "Outcome", seconds: Mapping[str, float]) -> Iterator[str]:
    """Yield lines on cold experts, quality, sizes and the time of every phase."""
    calibration = outcome.calibration
    if calibration.tokens:
        tokens = sorted(calibration.tokens.values())
        low, median, high = tokens[0], tokens[len(tokens) // 2], tokens[-1]
        yield f"tokens an expert saw: {low} to {high}, median {median}"
    if calibration.cold:
        yield _cold(calibration.cold)
    if outcome.fake_quant:
        sums = outcome.fake_quant
        yield f"fake-quantized model: perplexity {sums.perplexity:.4f}, KL {sums.mean_kl:.5f}"
    if outcome.job.export:
        yield _verified(outcome.verified)
    yield from left_out_lines(outcome.left_out)
    if outcome.job.export:
        yield sizes_line(outcome.job.export)
    yield _times(seconds)


def as_json(outcome: "Outcome", seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the report as JSON, with every amax and token count by slot name."""
    calibration, plan = outcome.calibration, outcome.job.export
    report: dict[str, Any] = {
        "recipe": outcome.job.quant.recipe,
        "seconds": dict(seconds),
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


def summary_of_stream(streamed: "Streamed", seconds: Mapping[str, float]) -> Iterator[str]:
    """Yield lines on cold experts, verification, sizes and the time of every phase."""
    if streamed.inputs and streamed.inputs.cold:
        yield _cold(streamed.inputs.cold)
    yield _verified(streamed.verified)
    yield from left_out_lines(streamed.left_out)
    yield sizes_line(streamed.job.exported)
    yield _times(seconds)


def stream_as_json(streamed: "Streamed", seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return a streamed run's report as JSON, with every amax that it needed by slot name."""
    plan = streamed.job.exported
    return {
        "recipe": streamed.job.quant.recipe,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "seconds": dict(seconds),
        "weight_amax": dict(streamed.weight_amax),
        "input_amax": dict(streamed.inputs.found) if streamed.inputs else {},
        "cold_experts": list(streamed.inputs.cold) if streamed.inputs else [],
        "left_out": list(streamed.left_out),
    }


def left_out_lines(left_out: Sequence[str]) -> Iterator[str]:
    """Return a line for everything that the source has and the export lacks."""
    return (escape(f"left out: {line}") for line in left_out)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write ``report`` to the file ``path``."""
    path.write_text(json.dumps(report, indent=2) + "\n")


def _verified(report: "Report | None") -> str:
    if report is None:
        return "not verified (--no-verify): run megatron-quant verify on it"
    return f"verified: {len(report.tensors)} tensors"


def _cold(slots: Sequence[str]) -> str:
    shown = ", ".join(slots[:_COLD_SHOWN])
    return (
        f"{len(slots)} expert weights saw no token and took their layer's largest "
        f"input amax: {shown}{', ...' if len(slots) > _COLD_SHOWN else ''}"
    )


def _times(seconds: Mapping[str, float]) -> str:
    return "time: " + ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items())
