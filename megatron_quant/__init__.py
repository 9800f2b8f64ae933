"""Quantization of Megatron-Core / Transformer Engine models, mixture-of-experts first."""

__version__ = "0.1.0"
