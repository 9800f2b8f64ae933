"""Find where a checkpoint's JSON states its quantization, whatever tool wrote it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_quant.ckpt.dialects.base import Dialect
from megatron_quant.ckpt.dialects.modelopt import HF_QUANT_CONFIG
from megatron_quant.ckpt.dialects.modelopt_config import from_nested
from megatron_quant.ckpt.dialects.registry import DIALECTS
from megatron_quant.ckpt.storage import read_object
from megatron_quant.documents import shown
from megatron_quant.errors import CheckpointError
from megatron_quant.fields import Fields

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json that state it. The second is compressed-tensors' older one."""
RELEASED = {"deepseek_v4": "deepseek-v4"}
"""``model_type`` whose ``quant_method`` fp8 has a form of its own -> its dialect."""
_DEPTH = 4
"""Depth of objects that are searched. Qwen3-Omni has ``thinker_config.text_config``."""


def quantization_of(config: Mapping[str, Any], directory: Path) -> dict[str, Any] | None:
    """Return ``quantization_config``, or the file that older exports have beside config.json.

    It is looked for in config.json and in the configs within, as Kimi-K2.5 has it in its
    ``text_config``. None where nothing is quantized.

    Raises:
        CheckpointError: Where it is no object.
    """
    found = _stated(config)
    if found is None:
        return _beside(directory)
    if not found:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{directory}: quantization_config in config.json is no object; fetch it again"
        )
    return found


def without_quantization(config: Mapping[str, Any], depth: int = _DEPTH) -> dict[str, Any]:
    """Return ``config`` without any statement of quantization, in configs within it too."""
    return {
        key: without_quantization(value, depth - 1) if isinstance(value, dict) and depth else value
        for key, value in config.items()
        if key not in KEYS
    }


def _stated(config: Mapping[str, Any], depth: int = _DEPTH) -> Any:
    """Return the outermost statement; None where there is none."""
    for key in KEYS:
        if config.get(key) is not None:
            return config[key]
    nested = (v for v in config.values() if isinstance(v, dict)) if depth else ()
    return next((f for part in nested if (f := _stated(part, depth - 1)) is not None), None)


def _awq(document: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Read AutoAWQ's file, whose keys had other names; None for another tool's."""
    if not document.keys() & {"w_bit", "bits"}:
        return None
    names = {"w_bit": "bits", "q_group_size": "group_size"}
    found = {names.get(key, key): value for key, value in document.items()}
    version = Fields(found, str(path)).text("version", "gemm")
    return {"quant_method": "awq", **found, "version": version.lower()}


def _gptq(document: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Read AutoGPTQ's file, whose keys are those of config.json; None for another tool's."""
    return {"quant_method": "gptq", **document} if "bits" in document else None


_FILES: dict[str, Callable[[Mapping[str, Any], Path], dict[str, Any] | None]] = {
    HF_QUANT_CONFIG: from_nested,
    "quant_config.json": _awq,
    "quantize_config.json": _gptq,
}
"""File that tools wrote before config.json stated it -> its reader. Engines look there too."""
FILES = tuple(_FILES)


def _beside(directory: Path) -> dict[str, Any] | None:
    for name, read in _FILES.items():
        if (directory / name).is_file():
            return read(read_object(directory / name), directory / name)
    return None


def dialect_of(
    quantization: Mapping[str, Any], directory: Path, config: Mapping[str, Any] | None = None
) -> Dialect:
    """Return the dialect that ``quantization`` states; CheckpointError lists the known ones.

    Args:
        quantization: Statement of the quantization.
        directory: The checkpoint, for messages.
        config: Content of config.json, which tells the model's family; None for none.
    """
    method = Fields(quantization, f"{directory}: quantization_config").text("quant_method")
    if method == "fp8" and config is not None and config.get("model_type") in RELEASED:
        method = RELEASED[config["model_type"]]
    if method not in DIALECTS:
        raise CheckpointError(
            f"{directory}: quant_method {shown(method)} in config.json is not read; "
            f"known: {', '.join(DIALECTS)}; or give the bf16 checkpoint that it was "
            "made from"
        )
    return DIALECTS[method].of_model(config or {}).variant(quantization)
