"""Find what keeps an engine from serving an export because of the model's family."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron_quant.ckpt.dialects import Layer, layer_of
from megatron_quant.engines.facts import MXFP4, STACKS, V4
from megatron_quant.engines.families import Family
from megatron_quant.models import family, text_config
from megatron_quant.recipes import DRAFT, OUTPUT, QuantPlan


@dataclass(frozen=True)
class Obstacle:
    """A reason why an engine cannot serve an export, and the nearest that works.

    Attributes:
        what: The reason.
        instead: The nearest that works.
        has_other_use: Whether only an engine that is named makes it a fault: without one, the
            export may be meant for this library's own readers.
    """

    what: str
    instead: str
    has_other_use: bool = False


def family_obstacles(
    config: Mapping[str, Any], plan: QuantPlan, dialect: str, engine: str
) -> Iterator[Obstacle]:
    """Yield what keeps ``engine`` from serving ``plan`` in ``dialect``.

    Args:
        config: Content of config.json, which tells the family.
        plan: Plan of the parameters or of their sources.
        dialect: Dialect of the export.
        engine: One of ``ENGINES``.
    """
    known = family(config)
    yield from _of_head(known, plan, dialect, engine)
    yield from _of_stacks(known, plan, dialect, engine)
    if dialect == V4 and (known is None or V4.replace("-", "_") not in known.kinds):
        yield Obstacle(f"{dialect} is the form of DeepSeek-V4 alone", "--export-format modelopt")
    if known is None:
        return
    if known.vllm_reason and engine == "vllm" and dialect != V4:
        yield Obstacle(
            known.vllm_reason,
            "--export-format deepseek-v4 of a release, or leave out --serve-engine",
        )
    if engine == "vllm":
        yield from _of_drafts(known, plan, dialect)
        yield from _of_whole_scales(known, plan)
    if engine in ("vllm", "sglang"):
        yield from _of_merged(known, text_config(config), plan)


def _of_drafts(known: Family, plan: QuantPlan, dialect: str) -> Iterator[Obstacle]:
    taken = next((d.slot.sources[0] for d in plan.quantized if d.slot.fixed == DRAFT), None)
    if taken is not None and dialect in known.plain_drafts:
        yield Obstacle(
            f"{taken} is quantized, and vLLM builds layers for speculation plain where {dialect} "
            "excludes any of them, as it does the first linear",
            "--export-format compressed-tensors, or a run without --quantize-mtp",
        )


def _of_head(
    known: Family | None, plan: QuantPlan, dialect: str, engine: str
) -> Iterator[Obstacle]:
    head = next((d.slot.sources[0] for d in plan.quantized if d.slot.fixed == OUTPUT), None)
    if head is not None and dialect != "modelopt":
        yield Obstacle(
            f"{head} is quantized, which {engine} reads in ModelOpt's dialect alone",
            "--export-format modelopt, or a recipe without allow_output",
        )
    if known is None or engine != "vllm":
        return
    if head is not None and known.head_reason:
        yield Obstacle(f"{head} is quantized: {known.head_reason}", "a recipe without allow_output")
    if head is None and known.nameless_head and dialect == "modelopt":
        yield Obstacle(known.nameless_head, "--export-format compressed-tensors")


def _of_stacks(
    known: Family | None, plan: QuantPlan, dialect: str, engine: str
) -> Iterator[Obstacle]:
    alone = known is not None and known.stacked
    if dialect == MXFP4 and not alone:
        yield Obstacle(
            "experts in stacks of MXFP4 are gpt-oss's alone", "--export-format compressed-tensors"
        )
    if dialect == MXFP4 or not alone or engine not in STACKS:
        return
    for decision in plan.quantized:
        module = decision.slot.sources[0]
        if layer_of(module) is Layer.EXPERT:
            yield Obstacle(
                f"{module} is quantized, and {engine} loads this model's experts as stacks alone, "
                "plain or in MXFP4",
                "the recipe gpt_oss with --export-format mxfp4, or exclude the experts",
                has_other_use=True,
            )
            return


def _of_whole_scales(known: Family, plan: QuantPlan) -> Iterator[Obstacle]:
    """Yield fused linears that have a scale of the whole tensor, or of all their inputs."""
    reasons = {mark: fused.whole_reason for fused in known.fused for mark in fused.marks}
    for decision in plan.quantized:
        formats = (decision.weights, decision.inputs)
        whole = any(fmt is not None and fmt.tensor_scale for fmt in formats)
        for module in decision.slot.sources if whole else ():
            if reason := reasons.get(module.rpartition(".")[2]):
                yield Obstacle(
                    f"{module} has a scale of the whole linear: {reason}",
                    "fp8_channel or mxfp8 in attention, or exclude it",
                )


def _of_merged(known: Family, text: Mapping[str, Any], plan: QuantPlan) -> Iterator[Obstacle]:
    """Yield linears of several parts that a block of scales would join."""
    for decision in plan.quantized:
        block = decision.weights.stat_block if decision.weights is not None else None
        rows = (block and block[0]) or 1
        for merged in known.merged if rows > 1 else ():
            for module in decision.slot.sources:
                part = next((n for n in _parts(merged.parts, text) if n % rows), None)
                if part is not None and re.fullmatch(merged.modules, module):
                    yield Obstacle(
                        f"{module} has parts of {part} rows, which blocks of {rows} would join",
                        "a format with a scale per channel, such as fp8_channel, or exclude it",
                    )


def _parts(parts: tuple[tuple[str, ...], ...], text: Mapping[str, Any]) -> Iterator[int]:
    for keys in parts:
        sizes = [text.get(key) for key in keys]
        if all(type(size) is int for size in sizes):
            yield prod(size for size in sizes if isinstance(size, int))
