"""What a checkpoint's JSON says of its quantization, wherever the tool that wrote it put that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_quant.ckpt.dialects import DIALECTS
from megatron_quant.ckpt.dialects.base import Dialect
from megatron_quant.ckpt.dialects.modelopt import HF_QUANT_CONFIG
from megatron_quant.ckpt.dialects.modelopt_config import from_nested
from megatron_quant.ckpt.source import read_json
from megatron_quant.errors import CheckpointError

GPT_OSS = "mxfp4"
"""``quant_method`` of stacks of experts in MXFP4; read alone, see ``ckpt.expert_stacks``."""


def has_expert_stacks(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's experts are stacks in MXFP4."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == GPT_OSS


def quantization_of(config: Mapping[str, Any], directory: Path) -> dict[str, Any] | None:
    """``quantization_config``, or what ModelOpt's older exports have beside config.json alone.

    None where nothing is quantized. Raises CheckpointError where it is no object.
    """
    found = config.get("quantization_config")
    if found is None and (directory / HF_QUANT_CONFIG).is_file():
        return from_nested(read_json(directory / HF_QUANT_CONFIG), directory / HF_QUANT_CONFIG)
    if not found:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{directory}: quantization_config in config.json is no object; fetch it again"
        )
    return found


def dialect_of(quantization: Mapping[str, Any], directory: Path) -> Dialect:
    """The dialect as ``quantization`` spells it; CheckpointError lists the known ones."""
    method = quantization.get("quant_method")
    if method not in DIALECTS:
        raise CheckpointError(
            f"{directory}: quant_method {method!r} in config.json is not read; "
            f"known: {', '.join([*DIALECTS, GPT_OSS])}; or give the bf16 checkpoint that it was "
            "made from"
        )
    return DIALECTS[method].variant(quantization)
