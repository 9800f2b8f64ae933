"""Load the transformers model of a checkpoint, and find which parameters hold which weights."""

import re
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from megatron_quant.ckpt.storage import read_config
from megatron_quant.engines.families import checkpoint_name
from megatron_quant.errors import CalibrationError, CheckpointError
from megatron_quant.models import Parallel, Param, Role, decoder_of, family
from megatron_quant.transformers_config import transformers_config
from megatron_quant.weight_inputs import Watched

_STACK = re.compile(r"(.*\.)?experts\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?")
_EXPERT = re.compile(r"(.*\.)?experts\.(\d+)\.(\w+)\.weight")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_DOWN = ("down_proj", "w2")
WITHOUT = "pass --weight-only"
"""What to do where no forward gives input scales."""


def load_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base model (no head) in evaluation mode, experts computed one after another.

    It reads only local files and runs no remote code.

    Raises:
        CheckpointError: If transformers cannot load it, or would leave a parameter random.
    """
    config = transformers_config(directory, read_config(directory), WITHOUT)
    try:
        with quiet():
            model, info = AutoModel.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                experts_implementation="eager",
                output_loading_info=True,
            )
    except Exception as e:  # transformers raises whatever a model's code raises
        raise CheckpointError(
            f"{directory}: transformers cannot load the model ({one_line(e)}); pass --weight-only"
        ) from e
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{directory} has no tensor for {missing[0]} of transformers' model ({len(missing)} "
            "missing in all); fetch the checkpoint again, or pass --weight-only"
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bar, which every rank would draw."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def run_model(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    """Run token ids [B, S] through the model; return its output.

    Raises CalibrationError if the forward fails.
    """
    try:
        return model(input_ids=ids, use_cache=False)
    except CalibrationError:
        raise
    except Exception as e:  # a model's code may need things that a checkpoint lacks
        raise CalibrationError(
            f"transformers' forward of the model failed ({one_line(e)}); pass --weight-only"
        ) from e


def one_line(error: Exception) -> str:
    """Return what ``error`` says, on one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def keys_of(param: Param) -> tuple[str, ...]:
    """Return the keys that :func:`watched` gives to the weights that ``param`` fuses."""
    if param.expert is not None:
        return (_expert_key(param.layer, param.expert, param.parallel is Parallel.ROW),)
    return tuple(
        f"{param.layer}.{m[2]}" for s in param.sources if (m := _LAYER.search(s.module)) is not None
    )


def input_keys(param: Param) -> tuple[str, ...]:
    """Return the keys under which inputs of ``param`` are kept: its own name if it is the head."""
    return (param.name,) if param.role is Role.OUTPUT else keys_of(param)


def _expert_key(layer: int | str | None, expert: int | str, down: bool) -> str:
    return f"{layer}.experts.{expert}.{'down' if down else 'gate_up'}"


def watched(model: PreTrainedModel, params: Sequence[Param]) -> list[Watched]:
    """Return the parameters of ``model`` that hold weights of ``params``.

    Raises:
        CheckpointError: For a weight that none of them holds.
    """
    named = dict(model.named_parameters())
    prefix = decoder_of({name: tuple(p.shape) for name, p in named.items()})
    known, found = family(model.config.to_dict()), []
    wanted = {key: p for p in params for key in keys_of(p)}
    for name, parameter in named.items():
        match = _LAYER.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match is not None:
            stored = checkpoint_name(known, match[2])
            own = (_member(key, wanted) for key in _keys(match[1], stored, parameter))
            found.append(Watched(parameter.data, tuple(own)))
    held = {key for w in found for key in w.keys}
    lacking = [p for p in params if (keys := keys_of(p)) and held.isdisjoint(keys)]
    if lacking:
        raise CheckpointError(
            f"transformers' model has no parameter for {lacking[0].sources[0].name}, whose "
            "inputs are to be measured; exclude it in the recipe, or pass --weight-only"
        )
    return [w for w in found if wanted.keys() & set(w.keys)]


def _member(key: str, wanted: Container[str]) -> str:
    """Return the key of the first of two linears that transformers has fused, or ``key``.

    Both have one input.
    """
    first = f"{key.removesuffix('gate_up_proj')}gate_proj"
    fused = key.endswith(".gate_up_proj") and key not in wanted
    return first if fused and first in wanted else key


def _keys(layer: str, name: str, parameter: torch.Tensor) -> tuple[str, ...]:
    if (match := _STACK.fullmatch(name)) and parameter.dim() == 3:
        down = match[2] in _DOWN
        return tuple(_expert_key(layer, e, down) for e in range(parameter.shape[0]))
    if match := _EXPERT.fullmatch(name):
        return (_expert_key(layer, match[2], match[3] in _DOWN),)
    return (f"{layer}.{name.removesuffix('.weight')}",)
