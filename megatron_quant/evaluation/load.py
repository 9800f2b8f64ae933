"""Load a checkpoint directory as a function from token ids to logits."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from megatron_quant.ckpt.read import QuantizedCheckpoint, Weights, cache_scales, stacked
from megatron_quant.errors import CheckpointError
from megatron_quant.evaluation.activations import Activations, QuantizedInputs, saved_stacks
from megatron_quant.evaluation.head import HEAD, with_head
from megatron_quant.evaluation.kv_cache import RoundedCache
from megatron_quant.models import decoder_of, idle_experts, run_as
from megatron_quant.transformers_config import transformers_config

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids, int64 [tokens] -> logits [tokens, vocabulary] of one causal forward."""

Load = Callable[[Path, torch.dtype], Logits]
"""How a directory is loaded: :func:`decoded` or :func:`native`."""

_NEWER = "correct config.json, or install another release of transformers"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def native(directory: Path, dtype: torch.dtype) -> Logits:
    """Load the checkpoint as transformers reads it by itself, quantized or not.

    Pickled weights and remote code are never loaded. transformers reads NVFP4 experts wrongly
    without an error, and cannot read the modelopt dialect: judge those with :func:`decoded`.

    Raises:
        CheckpointError: If transformers cannot read it.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        raise CheckpointError(f"{directory}: transformers cannot read it: {_first_line(e)}") from e

    @torch.inference_mode()
    def logits(ids_T: torch.Tensor) -> torch.Tensor:
        out_TV: torch.Tensor = model(ids_T[None], use_cache=False).logits[0]
        return out_TV

    return logits


def decoded(directory: Path, dtype: torch.dtype) -> Logits:
    """Load the checkpoint by this library's codecs; quantized inputs and KV cache are simulated.

    An unquantized one is loaded the same way, so that two checkpoints differ only by their values.

    Raises:
        CheckpointError: For a tensor that the model or the checkpoint lacks.
    """
    checkpoint = QuantizedCheckpoint(directory)
    model, inputs = _dense(checkpoint, directory, dtype), _inputs(checkpoint)
    scales = cache_scales(checkpoint)
    cache = partial(RoundedCache, model, scales) if scales else None
    quantized = QuantizedInputs(model, inputs) if inputs else None

    @torch.inference_mode()
    def logits(ids_T: torch.Tensor) -> torch.Tensor:
        cached = cache() if cache else None
        with quantized or nullcontext():
            out = model(ids_T[None], past_key_values=cached, use_cache=cached is not None)
        if quantized:
            quantized.check()
        out_TV: torch.Tensor = out.logits[0]
        return out_TV

    return logits


def empty_model(
    stored: Weights, dtype: torch.dtype, head: Path | None = None
) -> tuple[PreTrainedModel, torch.Tensor | None]:
    """Build transformers' model of a checkpoint, with its head, on the meta device.

    Experts are computed one after another.

    Args:
        stored: The checkpoint.
        dtype: Dtype of the model.
        head: A safetensors file with the output layer of a checkpoint that has none.

    Returns:
        The model in evaluation mode, and the weight of its output layer, [V, K], where that lies
        outside of the checkpoint.

    Raises:
        CheckpointError: If transformers cannot build it, or there is no output layer.
    """
    empty, weight = _empty(stored.path, _config(stored.path, stored.config), dtype), None
    if empty.get_output_embeddings() is None:
        empty, weight = with_head(stored.path, empty, set(stored), head)
    elif head is not None:
        raise CheckpointError(f"{head}: {stored.path} has an output layer of its own; leave it out")
    return empty.eval(), weight


def _dense(checkpoint: QuantizedCheckpoint, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    tensors = {n: checkpoint.weight(n, _wider(checkpoint, n, dtype)) for n in checkpoint}
    idle = idle_experts(checkpoint.config, tensors)
    tensors |= {name: torch.zeros_like(tensors[like]) for name, like in idle.items()}
    lent = run_as(checkpoint.config)
    config = _config(directory, checkpoint.config)
    return _model(directory, config, tensors, dtype, lent is not None and lent.tower is not None)


def _wider(checkpoint: QuantizedCheckpoint, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for what is stored in it: transformers keeps some so, such as routers' biases."""
    info = checkpoint.info(name)
    stored = info is not None and not info.decoded and info.dtype is torch.float32
    return torch.float32 if stored else dtype


def _config(directory: Path, config: Mapping[str, Any]) -> PretrainedConfig:
    """Return transformers' config of a checkpoint whose tensors are decoded."""
    own = transformers_config(directory, config, _NEWER)
    vars(own).pop("quantization_config", None)
    return own


def _model(
    directory: Path,
    config: PretrainedConfig,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    lent: bool,
) -> PreTrainedModel:
    """Fill transformers' model of the config with ``tensors``, which have Hugging Face names.

    ``lent`` says that its tower is not the checkpoint's, and may stay as it is.
    """
    empty = _empty(directory, config, dtype)
    tensors = _in_stacks(empty, tensors)
    if empty.get_output_embeddings() is None:
        empty, weight = with_head(directory, empty, tensors, None)
        prefix = f"{empty.base_model_prefix}."
        tensors = {name if name == HEAD else f"{prefix}{name}": t for name, t in tensors.items()}
        tensors |= {} if weight is None else {HEAD: weight}
    load: Any = type(empty).from_pretrained  # its types leave out the loading report
    model: PreTrainedModel
    model, report = load(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        experts_implementation="eager",
        output_loading_info=True,
    )
    own = decoder_of({name: tuple(p.shape) for name, p in model.named_parameters()})
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = sorted(map(str, report[what]))
        if lent:
            found = [name for name in found if name.startswith((own, HEAD))]
        if found:
            names = ", ".join(found[:3])
            raise CheckpointError(f"{directory}: {what.replace('_', ' ')}: {names}")
    filled: PreTrainedModel = model.eval()
    return filled


def _empty(directory: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build transformers' model of the config on the meta device, with its towers if it has some.

    It has the class that config.json names: a text decoder alone names its tensors differently.
    """
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if len(names) == 1 else None
    how: dict[str, Any] = {"dtype": dtype, "experts_implementation": "eager"}
    model: PreTrainedModel
    try:
        with torch.device("meta"):
            if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
                model = kind._from_config(config, **how)
            elif type(config) in AutoModelForCausalLM._model_mapping:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **how)
            else:
                model = AutoModelForImageTextToText.from_config(
                    config, trust_remote_code=False, **how
                )
    except Exception as e:  # with a contradictory config, a model's code raises anything
        raise CheckpointError(
            f"{directory}: transformers cannot build the model from its config: {_first_line(e)}"
        ) from e
    return model


def _in_stacks(empty: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put single experts back into the stacks that transformers saves as one tensor."""
    shapes, views = saved_stacks(empty)
    if not views.keys() <= tensors.keys():
        return tensors
    others = {name: t for name, t in tensors.items() if name not in views}
    return others | stacked(views, shapes, tensors.__getitem__)


def _inputs(checkpoint: QuantizedCheckpoint) -> dict[str, Activations]:
    """Return how the input of each module is stored whose config quantizes it."""
    inputs = {}
    for module, form in checkpoint.modules.items():
        if form.inputs is None:
            continue
        dscale = checkpoint.input_scale(module)
        if dscale is None and form.inputs.tensor_scale:
            raise CheckpointError(
                f"{module}: {form.inputs.name} activations without an input scale; export it again"
            )
        inputs[module] = Activations(form.inputs, dscale)
    return inputs
