"""The convention of compressed-tensors, which vLLM and transformers read.

Names, shapes and JSON follow compressed-tensors 0.20 and what vLLM accepts of it. NVFP4's global
scales are DIVISORS here: the inverse of the codec's. fp8 weights without quantized inputs are
read by transformers and, outside experts, by vLLM, which refuses them for experts by name.
"""

import re
from collections.abc import Mapping, Set
from typing import Any

import torch

from megatron_quant.ckpt.dialects.base import INPUT_SCALE, SHAPE, ModuleFormat, Stored
from megatron_quant.ckpt.dialects.common import describe, excluded, linears, only_format
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats.spec import WHOLE, Format, get_format
from megatron_quant.recipes.plan import QuantPlan

LAYOUTS = {
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "int4": "pack-quantized",
}
"""Format of the weights -> ``format`` of the config."""
_INPUTS: dict[str, tuple[str | None, ...]] = {
    "fp8": ("fp8", None),
    "nvfp4": ("nvfp4", None),
    "int4": (None,),
}
# What identifies a format among quantization arguments; group size is read apart.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group"},
}
_SCALAR = (WHOLE, WHOLE)


def _one(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.reshape(1)


def _zero_dim(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.reshape(())


def _one_inverse(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.reshape(1).reciprocal()


def _zero_dim_inverse(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.reshape(()).reciprocal()


def _scale(suffix: str, field: str) -> Stored:
    return Stored(suffix, field, torch.float32, _SCALAR, (1,), _one, _zero_dim)


def _divisor(suffix: str, field: str) -> Stored:
    return Stored(suffix, field, torch.float32, _SCALAR, (1,), _one_inverse, _zero_dim_inverse)


def _weight_tensors(weights: Format) -> tuple[Stored, ...]:
    group = (1, weights.group_size)
    tables = {
        "fp8": (
            Stored("weight", "elements", torch.float8_e4m3fn, (1, 1)),
            _scale("weight_scale", "scale"),
        ),
        "nvfp4": (
            Stored("weight_packed", "elements", torch.uint8, (1, 2)),
            Stored("weight_scale", "block_scale", torch.float8_e4m3fn, group),
            _divisor("weight_global_scale", "tensor_scale"),
        ),
        "int4": (
            Stored("weight_packed", "elements", torch.int32, (1, 8)),
            Stored("weight_scale", "scale", torch.bfloat16, group),
            Stored("weight_shape", SHAPE, torch.int64, _SCALAR, (2,)),
        ),
    }
    return tables[weights.name]


def _input_tensors(inputs: Format | None) -> tuple[Stored, ...]:
    if inputs is None:
        return ()
    if inputs.name == "nvfp4":
        return (_divisor("input_global_scale", INPUT_SCALE),)
    return (_scale("input_scale", INPUT_SCALE),)


def _arguments(fmt: Format, dynamic: bool | str) -> dict[str, Any]:
    return {
        **_ARGUMENTS[fmt.name],
        "symmetric": True,
        "group_size": fmt.group_size or None,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _group(fmt: ModuleFormat) -> dict[str, Any]:
    inputs = None
    if fmt.inputs is not None:
        # "local": the tensor's scale is static, the blocks' are computed as they come.
        inputs = _arguments(fmt.inputs, "local" if fmt.inputs.name == "nvfp4" else False)
    return {
        "targets": ["Linear"],
        "format": LAYOUTS[fmt.weights.name],
        "weights": _arguments(fmt.weights, False),
        "input_activations": inputs,
        "output_activations": None,
    }


class CompressedTensors:
    """Dialect ``compressed-tensors``; see :class:`megatron_quant.ckpt.dialects.base.Dialect`."""

    name = "compressed-tensors"
    extra_names: tuple[str, ...] = ()

    def stored(self, weights: Format, inputs: Format | None) -> tuple[Stored, ...]:
        """Tensors of a quantized module. Raises FormatError where no engine reads the pair."""
        if (inputs.name if inputs else None) not in _INPUTS.get(weights.name, ()):
            raise FormatError(
                f"compressed-tensors export has no {describe(ModuleFormat(weights, inputs))}; "
                "it writes fp8 and nvfp4 with inputs of the same format or none, int4 with none"
            )
        return (*_weight_tensors(weights), *_input_tensors(inputs))

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """For config.json. Raises FormatError for a plan without one common format."""
        fmt = only_format(plan, self.name)
        self.stored(fmt.weights, fmt.inputs)
        return {
            "quant_method": self.name,
            "format": LAYOUTS[fmt.weights.name],
            "quantization_status": "compressed",
            "version": "0.20.0",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": excluded(plan),
            "config_groups": {"group_0": _group(fmt)},
        }

    def extra_files(self, plan: QuantPlan) -> dict[str, dict[str, Any]]:
        """None: config.json says it all."""
        return {}

    def check_extra_files(
        self, config: Mapping[str, Any], files: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Nothing to contradict."""
        return ()

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Inverse of :meth:`quantization_config`; also several groups, and ``re:`` names.

        Raises CheckpointError for arguments or targets that are not of this dialect's formats.
        """
        if config.get("kv_cache_scheme"):
            raise CheckpointError("quantization_config has a kv_cache_scheme, which is not read")
        groups = [_read_group(g, config) for g in (config.get("config_groups") or {}).values()]
        ignore = _Names(config.get("ignore") or ())
        found: dict[str, ModuleFormat] = {}
        for module in linears(modules):
            if ignore.match(module):
                continue
            # A name beats a class, whichever comes first.
            fmt = next((f for names, _, f in groups if names.match(module)), None)
            fmt = fmt or next((f for _, every, f in groups if every), None)
            if fmt is not None:
                found[module] = fmt
        return found


class _Names:
    """Exact names and ``re:`` patterns, as compressed-tensors matches them."""

    def __init__(self, names: Any) -> None:
        self.exact = {n for n in names if not n.startswith("re:")}
        self.patterns = [re.compile(n[3:]) for n in names if n.startswith("re:")]

    def match(self, module: str) -> bool:
        return module in self.exact or any(p.match(module) for p in self.patterns)


def _read_group(
    group: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[_Names, bool, ModuleFormat]:
    """Named targets, whether all linears are meant, and the format."""
    weights = _read_arguments(group.get("weights") or {}, (False, None))
    inputs = None
    if group.get("input_activations"):
        inputs = _read_arguments(group["input_activations"], (False, "local", None))
    layout = group.get("format") or config.get("format")
    pair = (inputs.name if inputs else None) in _INPUTS[weights.name]
    if layout != LAYOUTS[weights.name] or not pair:
        raise CheckpointError(
            f"compressed-tensors format {layout!r} with "
            f"{describe(ModuleFormat(weights, inputs))} is not read; "
            f"known: {', '.join(LAYOUTS.values())}"
        )
    targets = group.get("targets") or ()
    return _Names(targets), "Linear" in targets, ModuleFormat(weights, inputs)


def _read_arguments(arguments: Mapping[str, Any], dynamic: tuple[Any, ...]) -> Format:
    matching = [n for n, wanted in _ARGUMENTS.items() if wanted.items() <= _plain(arguments)]
    symmetric = arguments.get("symmetric", True)
    try:
        if matching and symmetric and arguments.get("dynamic") in dynamic:
            return get_format(matching[0], arguments.get("group_size"))
    except FormatError as error:
        raise CheckpointError(f"quantization_config: {error}") from None
    shown = {k: arguments.get(k) for k in ("num_bits", "type", "strategy", "symmetric", "dynamic")}
    raise CheckpointError(
        f"compressed-tensors arguments {shown} are not read; known: "
        + ", ".join(f"{n} {a}" for n, a in _ARGUMENTS.items())
    )


def _plain(arguments: Mapping[str, Any]) -> Set[tuple[str, Any]]:
    return {(k, arguments.get(k)) for k in ("num_bits", "type", "strategy")}
