"""The JSON of compressed-tensors 0.20: quantization arguments and their meaning."""

from collections.abc import Mapping
from typing import Any

from megatron_quant.ckpt.dialects.base import ModuleFormat
from megatron_quant.ckpt.dialects.common import describe_format, stated
from megatron_quant.documents import shown
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.fields import Fields
from megatron_quant.formats import CHANNEL, GROUP_SIZES, Format, get_format, stored_format

MIXED = "mixed-precision"
"""``format`` of a config whose groups have several formats."""
_LAYOUTS: dict[tuple[str, bool], str] = {
    ("fp8", True): "float-quantized",
    ("fp8", False): "float-quantized",
    ("fp8_channel", True): "float-quantized",
    ("fp8_channel", False): "float-quantized",
    ("fp8_block", True): "float-quantized",
    ("fp8_block", False): "float-quantized",
    ("int8", True): "int-quantized",
    ("int4", True): "pack-quantized",
    ("int4", False): "pack-quantized",
    ("int4_asym", False): "pack-quantized",
    ("int8_group", False): "pack-quantized",
    ("int8_asym", False): "pack-quantized",
    ("nvfp4", True): "nvfp4-pack-quantized",
    ("nvfp4", False): "nvfp4-pack-quantized",
    ("mxfp8", True): "mxfp8-quantized",
    ("mxfp8", False): "mxfp8-quantized",
    ("mxfp4", True): "mxfp4-pack-quantized",
    ("mxfp4", False): "mxfp4-pack-quantized",
}
"""(format of the weights, whether inputs are quantized) -> ``format`` of the config."""
_INPUTS: dict[str, tuple[str, ...]] = {
    "fp8": ("fp8", "fp8_channel"),
    "fp8_channel": ("fp8_channel",),
    "fp8_block": ("fp8_group",),
    "int8": ("int8", "int8_tensor"),
    "int4": ("fp8", "fp8_channel"),
    "nvfp4": ("nvfp4",),
    "mxfp8": ("mxfp8",),
    "mxfp4": ("mxfp4",),
}
"""Format of the weights -> quantized inputs that go with them."""
_INSTEAD: dict[tuple[str, str | None], str] = {
    ("int8", None): "take int8_group weights, or add inputs: int8",
    ("int4_asym", "fp8"): "engines run quantized inputs with symmetric weights: take int4",
}
_UINT8 = "torch.uint8"
_SHARED_EXPONENT = {"scale_dtype": _UINT8, "zp_dtype": _UINT8}
# (num_bits, type, strategy, symmetric) -> format, of weights and of inputs.
_Key = tuple[int, str, str, bool]
_WEIGHTS: dict[_Key, str] = {
    (8, "float", "tensor", True): "fp8",
    (8, "float", "channel", True): "fp8_channel",
    (8, "float", "block", True): "fp8_block",
    (8, "float", "group", True): "mxfp8",
    (8, "int", "channel", True): "int8",
    (8, "int", "group", True): "int8_group",
    (4, "int", "group", True): "int4",
    (4, "int", "channel", True): "int4",
    (4, "int", "group", False): "int4_asym",
    (4, "int", "channel", False): "int4_asym",
    (8, "int", "group", False): "int8_asym",
    (8, "int", "channel", False): "int8_asym",
    (4, "float", "tensor_group", True): "nvfp4",
    (4, "float", "group", True): "mxfp4",
}
_ACTIVATIONS: dict[_Key, tuple[str, bool | str]] = {
    (8, "float", "tensor", True): ("fp8", False),
    (8, "float", "token", True): ("fp8_channel", True),
    (8, "float", "group", True): ("fp8_group", True),
    (8, "int", "token", True): ("int8", True),
    (8, "int", "tensor", True): ("int8_tensor", False),
    # The tensor's scale is static; each forward computes the blocks' scales.
    (4, "float", "tensor_group", True): ("nvfp4", "local"),
    (4, "float", "group", True): ("mxfp4", True),
}
_BLOCK = [128, 128]
_KV_SCHEME = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}


def layout(fmt: ModuleFormat) -> str:
    """Return the ``format`` of a group; FormatError for a pair that no engine reads."""
    weights, inputs = fmt.weights.name, fmt.inputs.name if fmt.inputs else None
    found = _LAYOUTS.get((weights, inputs is not None))
    if found is None or (inputs is not None and inputs not in _INPUTS[weights]):
        instead = _INSTEAD.get((weights, inputs)) or "take inputs of " + (
            " or ".join(_INPUTS.get(weights, ())) or "no format"
        )
        raise FormatError(f"compressed-tensors export has no {describe_format(fmt)}; {instead}")
    return found


def group(fmt: ModuleFormat) -> dict[str, Any]:
    """Return a group of config_groups, without its targets."""
    return {
        "format": layout(fmt),
        "weights": _arguments(_weight_key(fmt.weights), fmt.weights, False),
        "input_activations": None if fmt.inputs is None else _input_arguments(fmt.inputs),
        "output_activations": None,
    }


def _weight_key(fmt: Format) -> _Key:
    bits, kind, strategy, symmetric = next(k for k, name in _WEIGHTS.items() if name == fmt.name)
    if strategy == "group" and fmt.group_size == CHANNEL:
        strategy = "channel"
    return bits, kind, strategy, symmetric


def _input_arguments(fmt: Format) -> dict[str, Any]:
    name = {"mxfp8": "fp8_group"}.get(fmt.name, fmt.name)
    key, dynamic = next((k, d) for k, (n, d) in _ACTIVATIONS.items() if n == name)
    return _arguments(key, fmt, dynamic)


def _arguments(key: _Key, fmt: Format, dynamic: bool | str) -> dict[str, Any]:
    bits, kind, strategy, symmetric = key
    grouped = strategy in ("group", "tensor_group")
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": symmetric,
        "group_size": fmt.group_size if grouped else None,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": list(_BLOCK) if strategy == "block" else None,
        "observer": "minmax",
        "observer_kwargs": {},
        **(_SHARED_EXPONENT if fmt.name in ("mxfp8", "mxfp4") else {}),
    }


def read_group(group: Fields, format_: str) -> ModuleFormat:
    """Return the formats of a group; CheckpointError for unknown ones.

    Args:
        group: One of ``config_groups``.
        format_: ``format`` of the whole config, for a group that has none of its own.
    """
    arguments = group.part("input_activations")
    weights = _read_weights(group.part("weights"), quantized_inputs=bool(arguments.values))
    inputs = _read_inputs(arguments) if arguments.values else None
    fmt = ModuleFormat(weights, inputs)
    stated = group.text("format") or format_
    try:
        known = layout(fmt)
    except FormatError:
        known = None
    if stated != known:
        raise CheckpointError(
            f"compressed-tensors format {shown(stated)} with {describe_format(fmt)} is not read; "
            f"known: {', '.join(dict.fromkeys(_LAYOUTS.values()))}"
        )
    return fmt


def _read_weights(arguments: Fields, quantized_inputs: bool) -> Format:
    name = _WEIGHTS.get(_key(arguments))
    if name == "int8" and not quantized_inputs:
        name = "int8_group"
    if name is None or arguments.get("dynamic"):
        raise _unread(arguments)
    if name == "fp8_block" and arguments.get("block_structure") != _BLOCK:
        raise _unread(arguments)
    size = arguments.whole("group_size")
    if name in GROUP_SIZES and arguments.get("strategy") == "channel":
        size = CHANNEL
    try:
        sized = name not in ("fp8_channel", "int8", "fp8_block")
        return stored_format(name, size if sized else None)
    except FormatError as error:
        raise CheckpointError(f"quantization_config: {error}") from None


def _read_inputs(arguments: Fields) -> Format:
    found = _ACTIVATIONS.get(_key(arguments))
    if found is None or (arguments.get("dynamic") or False) != found[1]:
        raise _unread(arguments)
    name = found[0]
    size = arguments.whole("group_size") or None
    if name == "fp8_group" and size == get_format("mxfp8").group_size:
        name = "mxfp8"
    try:
        return get_format(name, size)
    except FormatError as error:
        raise CheckpointError(f"quantization_config: {error}") from None


def _key(arguments: Fields) -> _Key:
    return (
        arguments.whole("num_bits") or 0,
        arguments.text("type"),
        arguments.text("strategy"),
        arguments.flag("symmetric", True),
    )


def _unread(arguments: Fields) -> CheckpointError:
    keys = ("num_bits", "type", "strategy", "symmetric", "group_size", "dynamic")
    said = ", ".join(f"{k}={shown(arguments.get(k))}" for k in keys)
    return CheckpointError(
        f"quantization_config: {said} is not read; known weights: "
        f"{', '.join(dict.fromkeys(_WEIGHTS.values()))}"
    )


def kv_cache_scheme(kv_cache: str) -> dict[str, Any] | None:
    """Return the scheme for the config; None where keys and values stay as they are."""
    return dict(_KV_SCHEME) if kv_cache else None


def read_kv_cache(config: Mapping[str, Any]) -> str:
    """Return ``fp8`` for FP8 keys and values with a scale a tensor; CheckpointError for others."""
    scheme = stated(config).part("kv_cache_scheme")
    if not scheme.values:
        return ""
    if _key(scheme) == (8, "float", "tensor", True) and not scheme.get("dynamic"):
        return "fp8"
    raise CheckpointError(
        f"quantization_config: kv_cache_scheme {shown(scheme.values)} is not read"
    )
