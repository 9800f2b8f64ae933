"""The memory and disk that a calibration layer by layer takes, from names and shapes alone."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from megatron_quant.models import CARRIED, Param, Role, positive, text_config
from megatron_quant.recipes import QuantPlan
from megatron_quant.streaming.input_sums import sum_bytes, weighed_inputs

_ELSEWHERE = (*CARRIED, Role.OUTPUT, Role.CACHE)
"""Roles of parameters that no forward of the text decoder's base model reads."""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that a calibration layer by layer takes.

    Attributes:
        weights: Largest weights that a rank holds at a time: one layer's, or the embeddings.
        states_per_token: Disk for the hidden states of a token: those before and after a layer.
        sums: Largest squares and products of inputs that a rank holds at a time, one layer's.
        all_sums: Disk for those of all layers, for each rank.
    """

    weights: int
    states_per_token: int
    sums: int
    all_sums: int


def layer_memory(
    params: Sequence[Param], quant: QuantPlan, dtype: torch.dtype, config: Mapping[str, Any]
) -> LayerMemory:
    """Return what calibrating a model with ``params`` takes, whose weights are in ``dtype``."""
    by_layer: dict[int | None, int] = defaultdict(int)
    for param in params:
        if param.role not in _ELSEWHERE:
            by_layer[param.layer] += prod(param.shape) * dtype.itemsize
    sums: dict[int | None, int] = defaultdict(int)
    for param in weighed_inputs(quant, params):
        sums[param.layer] += sum_bytes(quant.by_name[param.name])
    hidden = positive(text_config(config), "hidden_size")
    return LayerMemory(
        weights=max(by_layer.values()),
        states_per_token=2 * hidden * dtype.itemsize,
        sums=max(sums.values(), default=0),
        all_sums=sum(sums.values()),
    )
