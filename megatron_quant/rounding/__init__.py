"""Rounding by what a layer's outputs lose: second moments of inputs, GPTQ, weights of searches."""

from megatron_quant.rounding.algorithm import Rounded, default_damp, gptq
from megatron_quant.rounding.moment import Moments, merged
from megatron_quant.rounding.weights import importance

__all__ = ["Moments", "Rounded", "default_damp", "gptq", "importance", "merged"]
