"""Number formats: pure functions between a tensor and what a checkpoint stores of it."""

from megatron_quant.formats.amax import amax, stack_amax, tensor_scale
from megatron_quant.formats.codec import decode, encode
from megatron_quant.formats.fake_quant import fake_quant
from megatron_quant.formats.spec import FORMATS, Field, Format, get_format
from megatron_quant.formats.stat import block_stat

__all__ = [
    "FORMATS",
    "Field",
    "Format",
    "amax",
    "block_stat",
    "decode",
    "encode",
    "fake_quant",
    "get_format",
    "stack_amax",
    "tensor_scale",
]
