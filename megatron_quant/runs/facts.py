"""The facts of a run, for its report."""

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from megatron_quant.report import (
    Evaluation,
    Facts,
    Part,
    Quality,
    Quantized,
    Rule,
    Search,
    Weight,
    search_of,
    sensitivity_of,
)

if TYPE_CHECKING:  # imports Megatron, which needs use_cpu() first on a host without a GPU
    from megatron_quant.ckpt.verify import Report
    from megatron_quant.evaluation import Part as TextPart
    from megatron_quant.evaluation import Result
    from megatron_quant.models import Param, Source
    from megatron_quant.runs.file_to_file import Streamed
    from megatron_quant.runs.found import Found
    from megatron_quant.runs.job import Job
    from megatron_quant.runs.megatron import Outcome
    from megatron_quant.runs.sensitivity_rows import Sensitivity

_LAYER = re.compile(r"(?:.*?\.)?\d+\.")
_NUMBER = re.compile(r"\.\d+(?=\.)")


def of_outcome(outcome: "Outcome", model: str) -> Facts:
    """Return the facts of a run through Megatron; ``model`` is its name or path."""
    calibration, sums, job = outcome.calibration, outcome.fake_quant, outcome.job
    quality = None if sums is None else Quality(sums.perplexity, sums.mean_kl, sums.tokens)
    found = Quantized(
        **_common(job, outcome.verified),
        seconds=dict(outcome.seconds),
        weight_amax=dict(calibration.weight_amax),
        input_amax=dict(calibration.input_amax),
        kv_amax=dict(outcome.kv_amax),
        expert_tokens=dict(calibration.tokens),
        cold_experts=tuple(calibration.cold),
        left_out=outcome.left_out,
        fake_quant=quality,
    )
    return _facts(model, found, outcome.found)


def of_streamed(streamed: "Streamed", model: str) -> Facts:
    """Return the facts of a streamed run; ``model`` is its name or path."""
    inputs = streamed.inputs
    found = Quantized(
        **_common(streamed.job, streamed.verified),
        seconds=dict(streamed.seconds),
        weight_amax=dict(streamed.weight_amax),
        input_amax=dict(inputs.found) if inputs else {},
        kv_amax=dict(streamed.kv_amax),
        expert_tokens=dict(streamed.tokens),
        cold_experts=tuple(inputs.cold) if inputs else (),
        left_out=streamed.left_out,
    )
    return _facts(model, found, streamed.found)


def of_found(found: "Found", directory: str) -> Facts:
    """Return the facts of a search that was solved again; ``directory`` has its scores."""
    return Facts(command="search", model=directory, version=_version(), search=_search(found))


def of_sensitivity(found: "Sensitivity", model: str) -> Facts:
    """Return the facts of a measurement of the families of ``model``."""
    sensitivity = sensitivity_of(found.document())
    return Facts(command="sensitivity", model=model, version=_version(), sensitivity=sensitivity)


def of_result(result: "Result", model: str, text: Path, against: Path | None) -> Facts:
    """Return the facts of an evaluation of a checkpoint, ``model``."""
    with_kl = result.kl is not None
    evaluation = Evaluation(
        quality=Quality(result.perplexity, result.kl, result.tokens),
        text=str(text),
        against=str(against or ""),
        seq_length=result.parts.seq_length,
        positions=tuple(_part(part, with_kl) for part in result.parts.positions),
        classes=tuple(_part(part, with_kl) for part in result.parts.classes),
    )
    return Facts(command="eval", model=model, version=_version(), evaluation=evaluation)


def _part(found: "TextPart", with_kl: bool) -> Part:
    sums = found.sums
    return Part(
        label=found.label,
        tokens=sums.tokens,
        perplexity=sums.perplexity,
        kl=sums.mean_kl if with_kl else None,
    )


def _facts(model: str, quantized: Quantized, found: "Found | None" = None) -> Facts:
    search = None if found is None else _search(found)
    return Facts(
        command="quantize", model=model, version=_version(), quantized=quantized, search=search
    )


def _search(found: "Found") -> Search:
    return search_of(found.document())


def _version() -> str:
    from megatron_quant import __version__

    return __version__


class _Common(TypedDict):
    """Facts that every run of ``quantize`` has."""

    recipe: str
    description: str
    dialect: str
    dtype: str
    ranks: int
    bytes_before: int | None
    bytes_after: int | None
    coverage: tuple[Rule, ...]
    weights: tuple[Weight, ...]
    verified: int | None


def _common(job: "Job", verified: "Report | None") -> _Common:
    plan = job.export
    rules = (
        Rule(rule=r.rule, action=r.action, weights=r.weights, patterns=dict(r.patterns))
        for r in job.coverage
    )
    return {
        "recipe": job.quant.recipe,
        "description": job.recipe.description,
        "dialect": job.dialect.name if job.dialect else "",
        "dtype": str(job.dtype).removeprefix("torch."),
        "ranks": job.layout.world,
        "bytes_before": plan.bytes_before if plan else None,
        "bytes_after": plan.bytes_after if plan else None,
        "coverage": tuple(rules),
        "weights": tuple(_weights(job, verified)),
        "verified": len(verified.tensors) if verified else None,
    }


def _weights(job: "Job", verified: "Report | None") -> Iterator[Weight]:
    """Yield every tensor that the recipe decided on, in the order of the model."""
    errors = {t.name: t.error for t in verified.tensors} if verified else {}
    stored = _stored_bytes(job)
    for param in job.params:
        decision = job.quant.by_name.get(param.name)
        if decision is None:
            continue
        for source in param.sources:
            yield Weight(
                name=source.name,
                slot=param.name,
                family=family(param, source),
                layer=param.layer,
                expert=param.expert,
                rule=decision.rule,
                format=decision.weights.name if decision.weights else "",
                inputs=decision.inputs.name if decision.inputs else "",
                elements=prod(source.shape),
                before=prod(source.shape) * job.dtype.itemsize,
                after=stored.get(source.name),
                error=errors.get(source.name),
            )


def _stored_bytes(job: "Job") -> Mapping[str, int]:
    targets = job.export.targets if job.export else ()
    return {t.source.name: sum(entry.nbytes for entry in t.entries) for t in targets}


def family(param: "Param", source: "Source") -> str:
    """Return the kind of a Hugging Face tensor, alike in all layers and experts."""
    name = source.name.removesuffix(".weight")
    if param.layer is not None:
        name = _LAYER.sub("", name, count=1)
    return _NUMBER.sub("", name)
