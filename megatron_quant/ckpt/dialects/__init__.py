"""On-disk conventions, by name."""

from megatron_quant.ckpt.dialects.auto_round import AutoRound
from megatron_quant.ckpt.dialects.awq import Awq
from megatron_quant.ckpt.dialects.base import Dialect
from megatron_quant.ckpt.dialects.compressed_tensors import CompressedTensors
from megatron_quant.ckpt.dialects.gptq import Gptq
from megatron_quant.ckpt.dialects.modelopt import ModelOpt
from megatron_quant.ckpt.dialects.native_fp8 import NativeFp8
from megatron_quant.errors import FormatError

DIALECTS: dict[str, Dialect] = {
    d.name: d for d in (ModelOpt(), CompressedTensors(), Gptq(), Awq(), AutoRound(), NativeFp8())
}


def get_dialect(name: str) -> Dialect:
    """The dialect called ``name``; FormatError lists the known ones."""
    if name not in DIALECTS:
        raise FormatError(f"unknown export format {name!r}; known: {', '.join(DIALECTS)}")
    return DIALECTS[name]
