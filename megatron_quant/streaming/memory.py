"""The memory and disk that a calibration layer by layer takes, from names and shapes alone."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from megatron_quant.models import Param, Role, positive, text_config

_ELSEWHERE = (Role.OUTSIDE, Role.OUTPUT, Role.DRAFT, Role.CACHE)
"""Roles of parameters that no forward of the text decoder's base model reads."""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that a calibration layer by layer takes.

    Attributes:
        weights: Largest weights that a rank holds at a time: one layer's, or the embeddings.
        states_per_token: Disk for the hidden states of a token: those before and after a layer.
    """

    weights: int
    states_per_token: int


def layer_memory(
    params: Iterable[Param], dtype: torch.dtype, config: Mapping[str, Any]
) -> LayerMemory:
    """Return what calibrating a model with ``params`` takes, whose weights are in ``dtype``."""
    by_layer: dict[int | None, int] = defaultdict(int)
    for param in params:
        if param.role not in _ELSEWHERE:
            by_layer[param.layer] += prod(param.shape) * dtype.itemsize
    hidden = positive(text_config(config), "hidden_size")
    return LayerMemory(max(by_layer.values()), 2 * hidden * dtype.itemsize)
