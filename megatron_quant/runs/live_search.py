"""Search for a recipe on a live model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core import parallel_state as mpu
from torch import nn

from megatron_quant.ckpt.dialects import get_dialect
from megatron_quant.ckpt.plan import slots, source_digest
from megatron_quant.ckpt.read import kept_dtypes, open_source
from megatron_quant.dist import Groups, together
from megatron_quant.documents import check_output_file
from megatron_quant.errors import CalibrationError
from megatron_quant.layers import ExpertScales
from megatron_quant.mcore.live import HFModel, check_unquantized, read_hf_model
from megatron_quant.mcore.model import LiveModel, start_distributed, wrap_model
from megatron_quant.models import Role, lookup_live, positive, text_config
from megatron_quant.recipes import QuantPlan, load_recipe, resolve
from megatron_quant.runs.agree import check_options
from megatron_quant.runs.auto_quantize import choose
from megatron_quant.runs.auto_scores import Work, read_samples
from megatron_quant.runs.found import Found
from megatron_quant.runs.job_checks import check_length
from megatron_quant.runs.live_scores import LiveSource, live_scores
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.search_plan import SearchPlan, Target, plan_search
from megatron_quant.runs.settings import AutoQuantize, Calibration, Serve
from megatron_quant.search import Loss, next_token_loss


@dataclass(frozen=True, kw_only=True)
class LiveTarget:
    """Describe a live model, and how its recipe will be used: arguments of ``find_recipe``."""

    hf_model: str | Path | Mapping[str, Any]
    calibration: Calibration
    expert_scales: str
    format: str
    serve: Serve


def search_live(
    model: nn.Module | Sequence[nn.Module],
    auto: AutoQuantize,
    target: LiveTarget,
    loss: Loss | None,
    groups: Groups | None,
    phases: Phases,
) -> Found:
    """Do as :func:`find_recipe` with a live model. Collective."""
    groups = groups or start_distributed()
    check_options(auto, groups)
    together(groups, lambda: check_unquantized(model))
    together(groups, lambda: check_output_file("--auto-quantize-recipe", auto.recipe))
    hf = together(groups, lambda: read_hf_model(target.hf_model))
    architecture = together(groups, lambda: lookup_live(hf.config))
    live = wrap_model(model, architecture, hf.config, groups)
    with phases.time("plan search"):
        plan = together(groups, lambda: _planned(live, hf, auto, target))
        digest = together(groups, lambda: source_digest(hf.weights) if hf.weights else "")
    vocab_size = together(groups, lambda: positive(text_config(hf.config), "vocab_size"))
    data = replace(target.calibration, size=auto.score_size)
    tokenizer = together(groups, lambda: _tokenizer(data, hf))
    work = Work(
        plan=plan,
        auto=auto,
        calibration=data,
        batches=read_samples(data, tokenizer, vocab_size, groups, phases),
        source=digest,
        dtype=str(plan.target.dtype).removeprefix("torch."),
        loss=loss or next_token_loss,
    )
    source = LiveSource(load=lambda: live, vocab_size=vocab_size)
    return choose(plan, live_scores(work, source, groups, phases), auto, groups)


def _planned(live: LiveModel, hf: HFModel, auto: AutoQuantize, target: LiveTarget) -> SearchPlan:
    cp = mpu.get_context_parallel_world_size()
    check_length(target.calibration.seq_length, mpu.get_tensor_model_parallel_world_size(), cp)
    weights = open_source(hf.weights) if hf.weights else None
    linear = next(p for p in live.local if p.param.role is Role.LINEAR)
    described = Target(
        params=live.params,
        config=hf.config,
        dialect=get_dialect(target.format),
        dtype=live.tensor(linear).dtype,
        kept=kept_dtypes(weights) if weights else {},
        serve=target.serve,
        expert_scales=ExpertScales(target.expert_scales).value,
    )
    return plan_search(described, {name: _plan(name, live) for name in auto.candidates}, auto)


def _plan(candidate: str, live: LiveModel) -> QuantPlan:
    plan = resolve(load_recipe(candidate), slots(live.params))
    return plan


def _tokenizer(calibration: Calibration, hf: HFModel) -> Path:
    found = calibration.tokenizer or hf.directory
    if found is None:
        raise CalibrationError(
            "the search reads text: give a tokenizer, either in calibration or in the directory "
            "that hf_model names"
        )
    return Path(found)
