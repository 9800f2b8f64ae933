"""Quantizers in a model that somebody else's script builds and trains.

:func:`prepare` with its keywords bound is a hook: Megatron-Bridge's ``register_pre_wrap_hook`` and
Megatron-LM's ``ModelConfig.pre_wrap_hooks`` take it as it is, and :func:`wrap_provider` puts it
behind the model provider of a Megatron-LM without hooks.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import parallel_state as mpu
from torch import nn

from megatron_quant.calib import Ranges, calibrate_weights, ranges_of
from megatron_quant.ckpt.plan import slots
from megatron_quant.ckpt.storage import read_config, resolve_source
from megatron_quant.dist import Groups, together
from megatron_quant.errors import QuantError, RecipeError
from megatron_quant.layers import ExpertScales, QuantLayer
from megatron_quant.mcore.checkpoint import Saved, describe_model, describe_run, open_saved, restore
from megatron_quant.mcore.model import LiveModel, attach_model, start_distributed, wrap_model
from megatron_quant.models import lookup
from megatron_quant.recipes import (
    EXPERT_SCALES,
    QuantPlan,
    Recipe,
    difference,
    load_recipe,
    resolve,
)

_QUANTIZED = "_megatron_quant"
"""The attribute of a model that says what is quantized of it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantized:
    """A model that :func:`prepare` gave quantizers.

    layers: this rank's quantized linears. stored: the ranges that a checkpoint gave them; empty
    where they are to be found.
    """

    model: LiveModel
    recipe: Recipe
    plan: QuantPlan
    layers: tuple[QuantLayer, ...]
    stored: Ranges

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is no quantized one to this library: it has other tensors."""


def prepare(
    model: list[Any],
    recipe: str | Recipe,
    checkpoint: Path | str | None = None,
    *,
    hf_model: str | Mapping[str, Any],
    expert_scales: ExpertScales | None = None,
) -> list[Any]:
    """Give the linears of a live model quantizers, in place, and return it. Collective.

    model: this rank's part of it before DistributedDataParallel, with the weights to train from;
        all its chunks where the pipeline has virtual stages.
    recipe: as ``--export-quant-cfg`` takes it; it names weights as the Hugging Face model does,
        which ``hf_model`` says: its directory or hub id (only config.json is read), or the config.
    checkpoint: a ``torch_dist`` checkpoint of a model quantized with ``recipe``, at any layout, or
        a training run's directory: weights and all ranges are then as it has them.
    expert_scales: None for those of the checkpoint; without one for shared ones.

    Without a checkpoint weights are calibrated and quantized at once. Inputs with a static scale
    are quantized as soon as they have one, which
    :class:`megatron_quant.mcore.training.callback.QuantCallback` finds.

    Raises QuantError, on every rank alike, for a model or config that cannot be trained so, and
    for a checkpoint that is of another model or recipe, or lacks a key.
    """
    groups = start_distributed()
    config, chosen = together(groups, lambda: _checked(model, recipe, hf_model))
    saved = None if checkpoint is None else open_saved(Path(checkpoint), groups)
    live = wrap_model(model, lookup(config), config, groups)
    plan = together(groups, lambda: _plan(chosen, live, saved))
    scales = expert_scales or ExpertScales(saved.expert_scales if saved else EXPERT_SCALES[0])
    first = ExpertScales(saved.expert_scales) if saved else scales
    layers, _ = together(groups, lambda: attach_model(live, plan, first))
    describe_model(
        live, describe_run(chosen, plan, scales.value, saved.source if saved else ""), layers
    )
    if saved is None:
        _start_ranges(layers, plan, live.groups)
    else:
        restore(live, layers, (), plan, saved, scales)
    stored = ranges_of(layers) if saved else ()
    for chunk in model:
        vars(chunk)[_QUANTIZED] = Quantized(
            model=live, recipe=chosen, plan=plan, layers=tuple(layers), stored=stored
        )
    return model


def _start_ranges(layers: Sequence[QuantLayer], plan: QuantPlan, groups: Groups) -> None:
    calibrate_weights(layers, plan, groups)
    for layer in layers:
        if layer.static_inputs:
            layer.module.input_quantizer.disable()


def _plan(recipe: Recipe, live: LiveModel, saved: Saved | None) -> QuantPlan:
    described = slots(live.params)
    plan = resolve(recipe, described)
    if plan.kv_cache:
        raise QuantError(
            f"recipe {recipe.name!r} quantizes the KV cache ({plan.kv_cache}), which training does "
            "not: leave it out (kv_cache), and say it when the trained model is exported"
        )
    if saved is not None and saved.recipe is not None:
        _check_same(recipe, plan, saved.stored.path, saved.recipe, resolve(saved.recipe, described))
    return plan


def _check_same(
    recipe: Recipe, plan: QuantPlan, path: Path, saved: Recipe, of_saved: QuantPlan
) -> None:
    if other := difference(plan, of_saved):
        raise RecipeError(
            f"{path} was saved with recipe {saved.name!r}, which treats {other} in another way "
            f"than {recipe.name!r}: give that one"
        )


def _checked(
    model: Sequence[nn.Module], recipe: str | Recipe, hf_model: str | Mapping[str, Any]
) -> tuple[Mapping[str, Any], Recipe]:
    stages = mpu.get_virtual_pipeline_model_parallel_world_size() or 1
    if len(model) != stages:
        raise QuantError(
            f"the model comes in {len(model)} chunks, and a pipeline rank has {stages} virtual "
            "stages: give the list of all its chunks"
        )
    for chunk in model:
        if hasattr(chunk, "module"):
            raise QuantError(
                f"the model is wrapped in {type(chunk).__name__} already: call prepare before, as "
                "a pre-wrap hook, so that the optimizer sees the quantized layers"
            )
        _check_config(chunk.config)
    config = read_config(resolve_source(hf_model)) if isinstance(hf_model, str) else hf_model
    return config, load_recipe(recipe) if isinstance(recipe, str) else recipe


def _check_config(config: Any) -> None:
    """What the model's TransformerConfig must not ask for."""
    for name in ("fp8", "fp4"):
        value = getattr(config, name, None)
        if value:
            raise QuantError(
                f"{name}={value!r} in the TransformerConfig has Transformer Engine round what "
                "quantizers gave again: train without it, or without quantizers"
            )


def quantized(model: Any) -> Quantized:
    """What :func:`prepare` made of a model; the wrappers that it has since do not matter.

    model: the model, or the list of its chunks. Raises QuantError where there are no quantizers.
    """
    chunk = model[0] if isinstance(model, Sequence) else model
    while not isinstance(found := vars(chunk).get(_QUANTIZED), Quantized):
        if not hasattr(chunk, "module"):
            raise QuantError(
                f"{type(chunk).__name__} has no quantizers: give it to "
                "megatron_quant.mcore.training.hooks.prepare before it is wrapped"
            )
        chunk = chunk.module
    return found


def wrap_provider(
    provider: Callable[..., nn.Module],
    recipe: str | Recipe,
    checkpoint: Path | str | None = None,
    *,
    hf_model: str | Mapping[str, Any],
    expert_scales: ExpertScales | None = None,
) -> Callable[..., nn.Module]:
    """A Megatron-LM ``model_provider`` whose model went through :func:`prepare`.

    Its parameters, which differ between releases, stay those of ``provider``, and so does the way
    Megatron-LM calls it: once, or for every virtual pipeline stage in turn, the last of which has
    all chunks prepared. Raises QuantError for what gives no model.
    """
    if "pre_process" not in inspect.signature(provider).parameters:
        raise QuantError(
            f"{getattr(provider, '__name__', provider)} has no parameter pre_process, so it is no "
            "model provider: give what pretrain takes as model_provider"
        )
    made: list[nn.Module] = []

    @functools.wraps(provider)
    def provide(*args: Any, **kwargs: Any) -> nn.Module:
        chunk = provider(*args, **kwargs)
        made.append(chunk)
        if len(made) == (mpu.get_virtual_pipeline_model_parallel_world_size() or 1):
            chunks = made.copy()
            made.clear()
            prepare(chunks, recipe, checkpoint, hf_model=hf_model, expert_scales=expert_scales)
        return chunk

    return provide
