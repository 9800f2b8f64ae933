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

from torch import nn

from megatron_quant.calib.calibrate import calibrate_weights
from megatron_quant.ckpt.saved import describe
from megatron_quant.ckpt.slots import slots
from megatron_quant.ckpt.source import read_config, resolve_source
from megatron_quant.dist import together
from megatron_quant.errors import QuantError
from megatron_quant.layers.install import ExpertScales, QuantLayer
from megatron_quant.mcore.attach import attach_model
from megatron_quant.mcore.load import Model, wrap_model
from megatron_quant.mcore.parallel import start_distributed
from megatron_quant.mcore.state import describe_model
from megatron_quant.models import lookup
from megatron_quant.recipes.load import load_recipe
from megatron_quant.recipes.plan import QuantPlan
from megatron_quant.recipes.resolve import resolve
from megatron_quant.recipes.schema import Recipe

_QUANTIZED = "_megatron_quant"
"""The attribute of a model that says what is quantized of it."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A model that :func:`prepare` gave quantizers.

    layers: this rank's quantized linears.
    """

    model: Model
    recipe: Recipe
    plan: QuantPlan
    layers: tuple[QuantLayer, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is no quantized one to this library: it has other tensors."""


def prepare(
    model: list[Any],
    recipe: str | Recipe,
    checkpoint: Path | None = None,
    *,
    hf_model: str | Mapping[str, Any],
    expert_scales: ExpertScales = ExpertScales.SHARED,
) -> list[Any]:
    """Give the linears of a live model quantizers, in place, and return it. Collective.

    model: this rank's part of it before DistributedDataParallel, with the weights to train from.
    recipe: as ``--export-quant-cfg`` takes it; it names weights as the Hugging Face model does,
        which ``hf_model`` says: its directory or hub id (only config.json is read), or the config.
    checkpoint: not read yet.

    Weights are calibrated and quantized at once. Inputs with a static scale are quantized as soon
    as they have one, which :class:`megatron_quant.mcore.callback.QuantCallback` finds.

    Raises QuantError, on every rank alike, for a model or config that cannot be trained so.
    """
    groups = start_distributed()
    chunk, config, chosen = together(groups, lambda: _checked(model, recipe, checkpoint, hf_model))
    live = wrap_model(chunk, lookup(config), config, groups)
    plan = together(groups, lambda: _plan(chosen, live))
    layers, _ = together(groups, lambda: attach_model(live, plan, expert_scales))
    calibrate_weights(layers, plan, live.groups)
    for layer in layers:
        if layer.static_inputs:
            layer.module.input_quantizer.disable()
    describe_model(live, describe(chosen, plan, expert_scales.value), layers)
    vars(chunk)[_QUANTIZED] = Quantized(live, chosen, plan, tuple(layers))
    return model


def _plan(recipe: Recipe, live: Model) -> QuantPlan:
    plan = resolve(recipe, slots(live.params))
    if plan.kv_cache:
        raise QuantError(
            f"recipe {recipe.name!r} quantizes the KV cache ({plan.kv_cache}), which training does "
            "not: leave it out (kv_cache), and say it when the trained model is exported"
        )
    return plan


def _checked(
    model: Sequence[nn.Module],
    recipe: str | Recipe,
    checkpoint: Path | None,
    hf_model: str | Mapping[str, Any],
) -> tuple[nn.Module, Mapping[str, Any], Recipe]:
    if checkpoint is not None:
        raise QuantError(f"checkpoint={str(checkpoint)!r}: quantizers are not read from it yet")
    if len(model) != 1:
        raise QuantError(
            f"the model comes in {len(model)} chunks: train without virtual pipeline stages"
        )
    chunk = model[0]
    if hasattr(chunk, "module"):
        raise QuantError(
            f"the model is wrapped in {type(chunk).__name__} already: call prepare before, as a "
            "pre-wrap hook, so that the optimizer sees the quantized layers"
        )
    _check_config(chunk.config)
    config = read_config(resolve_source(hf_model)) if isinstance(hf_model, str) else hf_model
    return chunk, config, load_recipe(recipe) if isinstance(recipe, str) else recipe


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
                "megatron_quant.mcore.hooks.prepare before it is wrapped"
            )
        chunk = chunk.module
    return found


def wrap_provider(
    provider: Callable[..., nn.Module],
    recipe: str | Recipe,
    *,
    hf_model: str | Mapping[str, Any],
    expert_scales: ExpertScales = ExpertScales.SHARED,
) -> Callable[..., nn.Module]:
    """A Megatron-LM ``model_provider`` whose model went through :func:`prepare`.

    Its parameters, which differ between releases, stay those of ``provider``, and so does the way
    Megatron-LM calls it. Raises QuantError for what gives no model.
    """
    if "pre_process" not in inspect.signature(provider).parameters:
        raise QuantError(
            f"{getattr(provider, '__name__', provider)} has no parameter pre_process, so it is no "
            "model provider: give what pretrain takes as model_provider"
        )

    @functools.wraps(provider)
    def provide(*args: Any, **kwargs: Any) -> nn.Module:
        made = [provider(*args, **kwargs)]
        (model,) = prepare(made, recipe, hf_model=hf_model, expert_scales=expert_scales)
        return model

    return provide
