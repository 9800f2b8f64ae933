"""Report a run of ``quantize``, as lines for people."""

from collections.abc import Iterator, Mapping, Sequence

import megatron_quant as mq
from megatron_quant.cli.console import escape
from megatron_quant.cli.tables import sizes_line

_COLD_SHOWN = 5


def summary(outcome: "mq.Outcome") -> Iterator[str]:
    """Yield lines on cold experts, quality, sizes and the time of every phase."""
    calibration = outcome.calibration
    yield from _tokens(calibration.tokens)
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
    yield _times(outcome.seconds)


def summary_of_stream(streamed: "mq.Streamed") -> Iterator[str]:
    """Yield lines on cold experts, verification, sizes and the time of every phase."""
    yield from _tokens(streamed.tokens)
    if streamed.inputs and streamed.inputs.cold:
        yield _cold(streamed.inputs.cold)
    yield _verified(streamed.verified)
    yield from left_out_lines(streamed.left_out)
    yield sizes_line(streamed.job.exported)
    yield _times(streamed.seconds)


def _tokens(of_slots: Mapping[str, int]) -> Iterator[str]:
    if of_slots:
        tokens = sorted(of_slots.values())
        low, median, high = tokens[0], tokens[len(tokens) // 2], tokens[-1]
        yield f"tokens an expert saw: {low} to {high}, median {median}"


def left_out_lines(left_out: Sequence[str]) -> Iterator[str]:
    """Return a line for everything that the source has and the export lacks."""
    return (escape(f"left out: {line}") for line in left_out)


def _verified(report: "mq.Report | None") -> str:
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
