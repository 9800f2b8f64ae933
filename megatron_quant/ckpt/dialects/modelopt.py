"""The convention of NVIDIA ModelOpt's unified Hugging Face export.

Read by vLLM, SGLang and TensorRT-LLM; transformers has no reader for it. Names, shapes and JSON
follow ModelOpt 0.47 (``modelopt/torch/export``). Every scale multiplies to dequantize.
``W4A16_AWQ`` (int4) is for TensorRT-LLM only: vLLM rejects the algorithm by name.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from megatron_quant.ckpt.dialects.base import INPUT_SCALE, ModuleFormat, Stored
from megatron_quant.ckpt.dialects.common import describe, excluded, linears, only_format
from megatron_quant.ckpt.dialects.row_pairs import bytes_to_int4, int4_to_bytes
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats.spec import WHOLE, Format, get_format
from megatron_quant.recipes.plan import QuantPlan

HF_QUANT_CONFIG = "hf_quant_config.json"
ALGORITHMS: dict[str, tuple[str, str | None]] = {
    "FP8": ("fp8", "fp8"),
    "NVFP4": ("nvfp4", "nvfp4"),
    "W4A16_NVFP4": ("nvfp4", None),
    "W4A16_AWQ": ("int4", None),
}
"""``quant_algo`` -> formats of weights and inputs."""
# Readers look for this producer to know the convention, whoever wrote the files.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_SCALAR = (WHOLE, WHOLE)
# Engines fuse these on load, and match exclusions against the fused name too.
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}


def _weight_tensors(weights: Format) -> tuple[Stored, ...]:
    group = (1, weights.group_size)
    tables = {
        "fp8": (
            Stored("weight", "elements", torch.float8_e4m3fn, (1, 1)),
            Stored("weight_scale", "scale", torch.float32, _SCALAR),
        ),
        "nvfp4": (
            Stored("weight", "elements", torch.uint8, (1, 2)),
            Stored("weight_scale", "block_scale", torch.float8_e4m3fn, group),
            Stored("weight_scale_2", "tensor_scale", torch.float32, _SCALAR),
        ),
        "int4": (
            Stored(
                "weight",
                "elements",
                torch.uint8,
                (2, 1),
                to_disk=int4_to_bytes,
                from_disk=bytes_to_int4,
            ),
            Stored(
                "weight_scale",
                "scale",
                torch.float32,
                group,
                to_disk=torch.Tensor.float,
                from_disk=torch.Tensor.bfloat16,
            ),
        ),
    }
    return tables[weights.name]


def _algorithm(weights: Format, inputs: Format | None) -> str:
    pair = (weights.name, inputs.name if inputs else None)
    for algorithm, formats in ALGORITHMS.items():
        if formats == pair:
            return algorithm
    if pair == ("fp8", None):
        raise FormatError(
            "fp8 weights without quantized inputs: modelopt's FP8 requires an input scale for "
            "every layer; calibrate the inputs too, or export compressed-tensors"
        )
    raise FormatError(
        f"modelopt export has no {describe(ModuleFormat(weights, inputs))}; "
        f"it writes {', '.join(ALGORITHMS)}"
    )


def _group(fmt: ModuleFormat) -> dict[str, Any]:
    kind = "int" if fmt.weights.name == "int4" else "float"
    arguments: dict[str, Any] = {"dynamic": False, "num_bits": fmt.weights.bits, "type": kind}
    if fmt.weights.group_size:
        arguments["group_size"] = fmt.weights.group_size
    group: dict[str, Any] = {"targets": ["Linear"], "weights": arguments}
    if fmt.inputs:
        group["input_activations"] = dict(arguments)
    return group


def _refuse_substrings(plan: QuantPlan, names: list[str]) -> None:
    """vLLM takes every listed name for a plain substring of the modules that it leaves alone."""
    quantized = "\n".join(p for d in plan.quantized for n in d.slot.sources for p in _prefixes(n))
    for name in names:
        at = quantized.find(name)
        if at >= 0:
            end = quantized.find("\n", at)
            hit = quantized[quantized.rfind("\n", 0, at) + 1 : end if end >= 0 else None]
            raise FormatError(
                f"vLLM would leave quantized {hit} unquantized, since excluded {name} is a "
                "substring of its name; exclude both, quantize both, or export compressed-tensors"
            )


def _prefixes(module: str) -> tuple[str, ...]:
    parent, _, leaf = module.rpartition(".")
    return (module, f"{parent}.{_FUSED[leaf]}") if leaf in _FUSED else (module,)


class ModelOpt:
    """Dialect ``modelopt``; see :class:`megatron_quant.ckpt.dialects.base.Dialect`."""

    name = "modelopt"
    extra_names: tuple[str, ...] = (HF_QUANT_CONFIG,)

    def stored(self, weights: Format, inputs: Format | None) -> tuple[Stored, ...]:
        """Tensors of a quantized module. Raises FormatError where ModelOpt has no algorithm."""
        _algorithm(weights, inputs)
        tensors = _weight_tensors(weights)
        if inputs is None:
            return tensors
        return (*tensors, Stored("input_scale", INPUT_SCALE, torch.float32, _SCALAR))

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """The flat form, for config.json.

        Raises FormatError for a plan without one common format, and for exclusions that vLLM
        would extend to a quantized module.
        """
        fmt = only_format(plan, self.name)
        names = excluded(plan)
        _refuse_substrings(plan, names)
        return {
            "quant_method": self.name,
            "quant_algo": _algorithm(fmt.weights, fmt.inputs),
            "producer": dict(_PRODUCER),
            "ignore": names,
            "config_groups": {"group_0": _group(fmt)},
        }

    def extra_files(self, plan: QuantPlan) -> dict[str, dict[str, Any]]:
        """``hf_quant_config.json``: the nested form of the same statements."""
        fmt = only_format(plan, self.name)
        algorithm = _algorithm(fmt.weights, fmt.inputs)
        quantization: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
        if fmt.weights.group_size:
            quantization["group_size"] = fmt.weights.group_size
        if algorithm == "W4A16_AWQ":
            quantization |= {"has_zero_point": False, "pre_quant_scale": False}
        quantization["exclude_modules"] = excluded(plan)
        return {HF_QUANT_CONFIG: {"producer": dict(_PRODUCER), "quantization": quantization}}

    def check_extra_files(
        self, config: Mapping[str, Any], files: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """What hf_quant_config.json says otherwise than ``config``."""
        quantization = files[HF_QUANT_CONFIG].get("quantization")
        if not isinstance(quantization, dict):
            return (f"{HF_QUANT_CONFIG} has no quantization section",)
        here = {
            "quant_algo": config.get("quant_algo"),
            "group_size": _group_size(config),
            "exclude_modules": sorted(config.get("ignore") or ()),
        }
        there = {
            "quant_algo": quantization.get("quant_algo"),
            "group_size": quantization.get("group_size"),
            "exclude_modules": sorted(quantization.get("exclude_modules") or ()),
        }
        return tuple(
            f"{HF_QUANT_CONFIG}: {key} is not what config.json's quantization_config says"
            for key in here
            if here[key] != there[key]
        )

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Inverse of :meth:`quantization_config`; names in ``ignore`` may hold wildcards.

        Raises CheckpointError for an algorithm that is not one of :data:`ALGORITHMS`.
        """
        algorithm = str(config.get("quant_algo")).upper()
        if algorithm not in ALGORITHMS:
            raise CheckpointError(
                f"modelopt quant_algo {config.get('quant_algo')!r} is not read; "
                f"known: {', '.join(ALGORITHMS)}"
            )
        if config.get("kv_cache_scheme"):
            raise CheckpointError("quantization_config has a kv_cache_scheme, which is not read")
        weights, inputs = ALGORITHMS[algorithm]
        try:
            fmt = ModuleFormat(
                get_format(weights, _group_size(config)), get_format(inputs) if inputs else None
            )
        except FormatError as error:
            raise CheckpointError(f"quantization_config: {error}") from None
        ignore = list(config.get("ignore") or ())
        exact, patterns = set(ignore), [n for n in ignore if "*" in n]
        return {
            m: fmt
            for m in linears(modules)
            if m not in exact and not any(fnmatchcase(m, p) for p in patterns)
        }


def _group_size(config: Mapping[str, Any]) -> int | None:
    """Group size of the weights as the config states it; None where it does not."""
    for group in (config.get("config_groups") or {}).values():
        return (group.get("weights") or {}).get("group_size")
    return None
