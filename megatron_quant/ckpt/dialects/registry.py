"""On-disk conventions by name. The names need no torch; the dialects do."""

from functools import cache
from typing import TYPE_CHECKING, Any

from megatron_quant.errors import FormatError

if TYPE_CHECKING:
    from megatron_quant.ckpt.dialects.base import Dialect

    DIALECTS: dict[str, Dialect]

DIALECT_NAMES = (
    *("modelopt", "compressed-tensors", "gptq", "awq", "auto-round"),
    *("fp8", "mxfp4", "deepseek-v4"),
)
"""Choices of ``--export-format``."""


def get_dialect(name: str) -> "Dialect":
    """Return the dialect called ``name``; FormatError lists the known ones."""
    if name not in DIALECT_NAMES:
        raise FormatError(f"unknown export format {name!r}; known: {', '.join(DIALECT_NAMES)}")
    return _dialects()[name]


@cache
def _dialects() -> "dict[str, Dialect]":
    from megatron_quant.ckpt.dialects.auto_round import AutoRound
    from megatron_quant.ckpt.dialects.awq import Awq
    from megatron_quant.ckpt.dialects.compressed_tensors import CompressedTensors
    from megatron_quant.ckpt.dialects.deepseek_v4 import DeepseekV4
    from megatron_quant.ckpt.dialects.gptq import Gptq
    from megatron_quant.ckpt.dialects.modelopt import ModelOpt
    from megatron_quant.ckpt.dialects.mxfp4_stacks import Mxfp4Stacks
    from megatron_quant.ckpt.dialects.native_fp8 import NativeFp8

    made = (
        *(ModelOpt(), CompressedTensors(), Gptq(), Awq(), AutoRound()),
        *(NativeFp8(), Mxfp4Stacks(), DeepseekV4()),
    )
    found: dict[str, Dialect] = {dialect.name: dialect for dialect in made}
    assert tuple(found) == DIALECT_NAMES
    return found


def __getattr__(name: str) -> Any:
    if name != "DIALECTS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _dialects()
