"""Read the scales of an FP8 KV cache."""

import re
from collections.abc import Mapping

import torch

from megatron_quant.ckpt.dialects import K_SCALE, V_SCALE
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.errors import CheckpointError

CacheScales = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> scales of its keys and values, fp32 [] (multiply to dequantize)."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def cache_scales(checkpoint: QuantizedCheckpoint) -> CacheScales:
    """Return the scales of every layer's keys and values; empty without an FP8 KV cache.

    Raises CheckpointError for a layer that has one of its two scales alone.
    """
    found: dict[int, dict[str, torch.Tensor]] = {}
    for stored in checkpoint.cache_scales:
        for name in checkpoint.tensors:
            match = _LAYER.search(name)
            if match is not None and name.endswith(f".{stored.suffix}"):
                scale = checkpoint.raw(name).float().reshape(())
                found.setdefault(int(match[1]), {})[stored.field] = scale
    for layer, own in found.items():
        if own.keys() != {K_SCALE, V_SCALE}:
            raise CheckpointError(
                f"{checkpoint.path}: layer {layer} has one scale for its keys and values, not two; "
                "export it again"
            )
    return {layer: (own[K_SCALE], own[V_SCALE]) for layer, own in found.items()}
