"""Whole models that scores of layers are compared with, and searches of batches that are given."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import megatron_quant as mq
from megatron_quant.dist import Groups
from megatron_quant.evaluation import RoundedCache, nll_and_kl
from megatron_quant.runs import stream_scores
from megatron_quant.runs.auto_quantize import plan_candidates
from megatron_quant.runs.auto_scores import Work
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Quiet
from megatron_quant.runs.start import Unquantized
from megatron_quant.search import by_place, next_token_loss
from megatron_quant.search.ablation import ablated
from megatron_quant.search.cache import WatchedCache
from megatron_quant.search.problem import Place
from megatron_quant.search.scoring import quantized, scored
from megatron_quant.search.weights import Fit, PlaceWeights


def whole_model(source: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """All of transformers' model with its head, experts computed one after another."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, experts_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def work_of(
    source: Path, batches: Sequence[torch.Tensor], formats: str, method: str, **auto: Any
) -> Work:
    """A search by --stream, up to its scoring."""
    asked = mq.AutoQuantize(
        **{"bits": 15.9, "formats": formats, "method": method, "score_size": 1} | auto
    )
    options = QuantizeOptions(
        hf_model_id=str(source),
        export_quant_cfg=None,
        export_format="compressed-tensors",
        stream=True,
        auto=asked,
        calibration=mq.Calibration(cold_experts="layer-max"),
    )
    return Work(
        plan=plan_candidates(options, 1, Unquantized())[1],
        auto=asked,
        calibration=options.calibration,
        batches=batches,
        source="it",
        dtype="bf16",
    )


def scores(work: Work, source: Path) -> dict[str, list[float]]:
    """What the layers of a model score, by place."""
    flat = stream_scores.stream_scores(work, source, Groups(), Quiet())
    return by_place(work.plan.problem, flat)


def fit(work: Work, source: Path) -> Fit:
    """The places of a search in a model that is whole, with the inputs that were measured."""
    with stream_scores.work_folder(work, Groups()) as place:
        layers = stream_scores.measured_layers(work, source, work.batches, place, Groups(), Quiet())
    assert layers is not None
    own = layers.fit
    return Fit(
        model=whole_model(source),
        problem=own.problem,
        params=own.params,
        slots=own.slots,
        sharing=own.sharing,
        input_amax=own.input_amax,
    )


def places_of(fit: Fit) -> list[PlaceWeights]:
    layers = {fit.layer_of(p): None for p in fit.problem.places if not p.cached}
    return [w for layer in layers for w in fit.at(layer)]


def whole_gradient(fit: Fit, batches: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    """Scores by one backward through the whole model, a batch."""
    found = {p.name: torch.zeros(len(p.options)).double() for p in fit.problem.places}
    own = [(w, found[w.place.name]) for w in places_of(fit)]
    changed = torch.zeros(1).double()

    def begin(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    handle = fit.model.get_input_embeddings().register_forward_hook(begin)
    for ids in batches:
        with scored(fit.model, own):
            cache = WatchedCache(fit.model, [None], changed) if fit.problem.cache else None
            out = fit.model(ids, past_key_values=cache, use_cache=cache is not None)
            next_token_loss(out.logits.float(), ids).backward()
    handle.remove()
    if (place := fit.problem.cache) is not None:
        found[place.name] += torch.tensor([changed.item() * o.changes for o in place.options])
    return {name: row.tolist() for name, row in found.items()}


def whole_divergence(fit: Fit, batches: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    """Scores by a forward of the whole model for every option, a batch."""
    found = {p.name: [0.0] * len(p.options) for p in fit.problem.places}

    @torch.no_grad()
    def logits(ids: torch.Tensor, cache: Callable[[], Any] | None = None) -> torch.Tensor:
        own = None if cache is None else cache()
        return fit.model(ids, past_key_values=own, use_cache=own is not None).logits.flatten(0, 1)

    for ids in batches:
        before = logits(ids)
        for weights in places_of(fit):
            for i, rule in quantized(weights):
                with torch.no_grad(), ablated([(weights, rule)]):
                    kl = nll_and_kl(logits(ids), before, ids.flatten()).kl
                found[weights.place.name][i] += max(kl, 0.0)
        if (place := fit.problem.cache) is not None:
            after = logits(ids, partial(RoundedCache, fit.model, None))
            kl = max(nll_and_kl(after, before, ids.flatten()).kl, 0.0)
            _add(found, place, kl)
    return found


def _add(found: dict[str, list[float]], place: Place, kl: float) -> None:
    own = found[place.name]
    found[place.name] = [own[i] + kl * o.changes for i, o in enumerate(place.options)]


WHOLE = {"gradient": whole_gradient, "kl_div": whole_divergence}
