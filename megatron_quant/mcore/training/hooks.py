"""Put quantizers into a model that somebody else's script builds and trains.

:func:`prepare` with its keywords bound is a hook. Megatron-Bridge's ``register_pre_wrap_hook`` and
Megatron-LM's ``pre_wrap_hooks`` (core_v0.19) take it as it is. For an older Megatron-LM,
:func:`wrap_provider` puts it behind the model provider.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core import parallel_state as mpu
from torch import nn

from megatron_quant.calib import calibrate_weights, refresh_weights
from megatron_quant.dist import Groups, gather, together
from megatron_quant.errors import QuantError
from megatron_quant.layers import ExpertScales, QuantLayer
from megatron_quant.mcore.checkpoint import (
    TorchDist,
    before_save,
    is_checkpoint,
    is_quantized,
    latest,
    open_plain,
    open_stored,
    read_saved,
)
from megatron_quant.mcore.live import AttachSettings, Quantized, attach_recipe
from megatron_quant.mcore.model import fill_model, start_distributed
from megatron_quant.mcore.training.never_called import FirstCall
from megatron_quant.mcore.training.plain_start import accept_plain, keys_apart
from megatron_quant.recipes import QuantPlan, Recipe, refuse_output


def prepare(
    model: list[Any],
    recipe: str | Recipe,
    checkpoint: Path | str | None = None,
    *,
    hf_model: str | Mapping[str, Any],
    checkpoint_if_present: Path | str | None = None,
    expert_scales: ExpertScales | None = None,
    groups: Groups | None = None,
) -> list[Any]:
    """Give the linears of a live model quantizers, in place, and return it. Collective.

    model: this rank's part before DistributedDataParallel, with the weights to train from; with
        virtual pipeline stages, all its chunks.
    recipe: as ``--export-quant-cfg`` takes it; it uses the Hugging Face model's names of weights.
    checkpoint: a ``torch_dist`` checkpoint of a model quantized with ``recipe``, at any layout, or
        a training run's directory. Weights and all ranges then come from it. If it holds no
        quantizers, weights come from it, and the loop may load it again before the first step.
    checkpoint_if_present: such a directory that may be absent or hold no save yet, like the one
        that the run itself saves to. If it has a save, that goes before ``checkpoint``. A save from
        before the inputs had ranges is taken too: they are found as in a new run.
    hf_model: that model's directory or hub id (only config.json is read), or its config.
    expert_scales: None for those of the checkpoint; without a checkpoint, for shared ones.
    groups: the ranks that hold the model; None for all of torch.distributed's.

    The weights of algorithm gptq come from a checkpoint; their scales stay as it has them.
    Without a checkpoint, weights are calibrated and quantized at once. Inputs with a static scale
    are quantized as soon as :class:`megatron_quant.mcore.training.callback.QuantCallback` finds it.

    Raises QuantError, on every rank alike, for a model or config that cannot be trained with
    quantizers, and for a checkpoint that is of another model or recipe, or lacks a key.
    """
    groups = groups or start_distributed()
    together(groups, lambda: _check(model))
    start = _present(checkpoint_if_present, groups) or checkpoint
    stored = None if start is None else open_stored(Path(start), groups)
    saved = None
    if stored is not None and is_quantized(stored):
        saved = replace(read_saved(stored, groups), in_training=True)
    apart = keys_apart(model)
    check = _trainable if saved is not None else _startable
    handle = attach_recipe(
        model, recipe, hf_model, groups, AttachSettings(saved, expert_scales, check)
    )
    if stored is not None and saved is None:
        _fill_plain(handle, stored, apart)
    if saved is None:
        calibrate_weights(handle.layers, handle.plan, handle.model.groups)
    _await_ranges(handle.layers)
    before_save(handle.model, functools.partial(_follow_weights, handle))
    return model


def _present(directory: Path | str | None, groups: Groups) -> Path | None:
    """Return where the last save of ``directory`` is, as the first rank sees it; None without."""
    if directory is None:
        return None
    at = Path(directory)

    def found() -> Path | None:
        path = latest(at)
        return path if path != at or is_checkpoint(path) else None

    return gather(together(groups, found), groups)[0]


def _fill_plain(handle: Quantized, stored: TorchDist, apart: bool) -> None:
    """Give the model the weights of a checkpoint without quantizers, which may be loaded again."""
    live, config = handle.model, handle.hf.config
    fill_model(live, together(live.groups, lambda: open_plain(stored, config)))
    accept_plain(live.chunks, apart)


def _follow_weights(handle: Quantized) -> None:
    """Give the weights the ranges that they have now, which a checkpoint has beside them."""
    refresh_weights(handle.layers, handle.plan, handle.model.groups)


def _await_ranges(layers: Sequence[QuantLayer]) -> None:
    """Turn inputs off that need a range and have none."""
    for layer in layers:
        if layer.static_inputs and layer.input_quantizer.amax is None:
            layer.input_quantizer.disable()


def _startable(plan: QuantPlan) -> None:
    _trainable(plan)
    needs_data = [d.algorithm for d in plan.quantized if d.rounds or d.folds]
    if needs_data:
        raise QuantError(
            f"recipe {plan.recipe!r} changes weights by {needs_data[0]}, which needs calibration "
            "data: quantize first (--megatron-save-path, or mq.save), and give that checkpoint to "
            "prepare"
        )


def _trainable(plan: QuantPlan) -> None:
    refuse_output(plan)
    if plan.kv_cache:
        raise QuantError(
            f"recipe {plan.recipe!r} quantizes the KV cache ({plan.kv_cache}), which training does "
            "not: leave kv_cache out of it, and ask for it when the trained model is exported"
        )


def _check(model: Sequence[nn.Module]) -> None:
    stages = mpu.get_virtual_pipeline_model_parallel_world_size() or 1
    if len(model) != stages:
        raise QuantError(
            f"the model comes in {len(model)} chunks, but a pipeline rank has {stages} virtual "
            "stages: give the list of all its chunks"
        )
    for chunk in model:
        if hasattr(chunk, "module"):
            raise QuantError(
                f"the model is already wrapped in {type(chunk).__name__}: call prepare earlier, as "
                "a pre-wrap hook, so that the optimizer sees the quantized layers"
            )
        _check_config(chunk.config)


def _check_config(config: Any) -> None:
    """Refuse settings that the model's TransformerConfig must not have."""
    for name in ("fp8", "fp4"):
        value = getattr(config, name, None)
        if value:
            raise QuantError(
                f"{name}={value!r} in the TransformerConfig makes Transformer Engine round the "
                "quantizers' results again: train without it, or without quantizers"
            )


def wrap_provider(
    provider: Callable[..., nn.Module],
    recipe: str | Recipe,
    checkpoint: Path | str | None = None,
    *,
    hf_model: str | Mapping[str, Any],
    checkpoint_if_present: Path | str | None = None,
    expert_scales: ExpertScales | None = None,
    groups: Groups | None = None,
) -> Callable[..., nn.Module]:
    """Wrap a Megatron-LM ``model_provider`` so that its model goes through :func:`prepare`.

    The wrapper keeps the parameters of ``provider``, which differ between releases. Megatron-LM
    calls it once, or once for every virtual pipeline stage; the call for the last stage prepares
    all chunks. Raises QuantError if ``provider`` is no model provider. A loop that never calls it,
    and wraps another model for training, gets a QuantError there.
    """
    inner = provider.func if isinstance(provider, functools.partial) else provider
    name = str(getattr(inner, "__name__", inner))
    if "pre_process" not in inspect.signature(provider).parameters:
        raise QuantError(
            f"{name} has no parameter pre_process, so it is no model provider: give the function "
            "that pretrain takes as model_provider"
        )
    first_call = FirstCall(name)
    made: list[nn.Module] = []
    hook = functools.partial(
        prepare,
        recipe=recipe,
        checkpoint=checkpoint,
        hf_model=hf_model,
        checkpoint_if_present=checkpoint_if_present,
        expert_scales=expert_scales,
        groups=groups,
    )

    @functools.wraps(provider)
    def provide(*args: Any, **kwargs: Any) -> nn.Module:
        first_call.came()
        chunk = provider(*args, **kwargs)
        made.append(chunk)
        if len(made) == (mpu.get_virtual_pipeline_model_parallel_world_size() or 1):
            chunks = made.copy()
            made.clear()
            hook(chunks)
        return chunk

    first_call.of(provide)
    return provide
