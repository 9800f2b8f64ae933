"""The convention of NVIDIA ModelOpt's unified Hugging Face export.

vLLM, SGLang and TensorRT-LLM read it; transformers has no reader for it. Names, shapes and JSON
follow ModelOpt 0.47 (``modelopt/torch/export``). Every scale multiplies to dequantize.
``W4A16_AWQ`` and ``W4A8_AWQ`` are for TensorRT-LLM only: vLLM rejects the algorithms by name.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_quant.ckpt.dialects import modelopt_config
from megatron_quant.ckpt.dialects.base import (
    INPUT_SCALE,
    K_SCALE,
    V_SCALE,
    WEIGHT_SCALE,
    Dialect,
    Layer,
    ModuleFormat,
    Stored,
    layer_of,
    scalar,
)
from megatron_quant.ckpt.dialects.common import (
    excluded,
    expert_blocks,
    format_of_modules,
    formats_of,
    named_formats,
    refuse_substrings,
)
from megatron_quant.ckpt.dialects.modelopt_config import algorithm_of
from megatron_quant.ckpt.dialects.packing import from_row_pairs, row_pairs
from megatron_quant.errors import FormatError
from megatron_quant.formats import Format
from megatron_quant.native import WHOLE
from megatron_quant.recipes import QuantPlan

HF_QUANT_CONFIG = "hf_quant_config.json"
_E4M3, _U8, _F32 = torch.float8_e4m3fn, torch.uint8, torch.float32


def _column(value: torch.Tensor) -> torch.Tensor:
    return value[:, None]


def _four_dims(value: torch.Tensor) -> torch.Tensor:
    return value[:, None, :, None]


def _two_dims(value: torch.Tensor) -> torch.Tensor:
    return value[:, 0, :, 0]


_CHANNEL_SCALE = Stored(
    suffix="weight_scale",
    field="scale",
    dtype=_F32,
    block=(1, WHOLE),
    to_disk=torch.Tensor.flatten,
    from_disk=_column,
    dims=(0,),
)
# Engines load block FP8 experts like DeepSeek's, but load other linears another way.
_BLOCK = (128, 128)
_BLOCK_SCALE = {
    Layer.DENSE: Stored(
        suffix="weight_scale",
        field="scale",
        dtype=_F32,
        block=_BLOCK,
        to_disk=_four_dims,
        from_disk=_two_dims,
        dims=(0, -1, 1, -1),
    ),
    Layer.EXPERT: Stored(suffix="weight_scale_inv", field="scale", dtype=_F32, block=_BLOCK),
}


def _weight_tensors(weights: Format, layer: Layer) -> tuple[Stored, ...]:
    group = (1, weights.group_size if weights.group_size > 0 else WHOLE)
    fp8 = Stored(suffix="weight", field="elements", dtype=_E4M3, block=(1, 1))
    tables: dict[str, tuple[Stored, ...]] = {
        "fp8": (fp8, scalar("weight_scale", "scale")),
        "fp8_channel": (fp8, _CHANNEL_SCALE),
        "fp8_block": (fp8, _BLOCK_SCALE[layer]),
        "mxfp8": (fp8, Stored(suffix="weight_scale", field="scale", dtype=_U8, block=group)),
        "nvfp4": (
            Stored(suffix="weight", field="elements", dtype=_U8, block=(1, 2)),
            Stored(suffix="weight_scale", field="block_scale", dtype=_E4M3, block=group),
            scalar("weight_scale_2", "tensor_scale"),
        ),
        "int4": (
            Stored(
                suffix="weight",
                field="elements",
                dtype=_U8,
                block=(2, 1),
                to_disk=row_pairs,
                from_disk=from_row_pairs,
            ),
            Stored(
                suffix="weight_scale",
                field="scale",
                dtype=_F32,
                block=group,
                to_disk=torch.Tensor.float,
            ),
        ),
    }
    return tables[weights.name]


def _input_tensors(algorithm: str, inputs: Format | None) -> tuple[Stored, ...]:
    if inputs is None or not inputs.tensor_scale:
        return ()
    static = scalar("input_scale", INPUT_SCALE)
    return (
        (scalar("weight_scale_2", WEIGHT_SCALE), static) if algorithm == "W4A8_AWQ" else (static,)
    )


def _refuse_experts(plan: QuantPlan) -> None:
    """Refuse block FP8 experts unless layers state formats by name: else no loader takes them."""
    formats = format_of_modules(plan)
    experts = [m for m in formats if layer_of(m) is Layer.EXPERT]
    if experts and len(formats_of(plan)) == 1 and formats[experts[0]].weights.name == "fp8_block":
        raise FormatError(
            f"{experts[0]}: engines load no FP8_PB_WO experts if the whole model has that format; "
            "export fp8 or compressed-tensors, or give attention another format, such as fp8 with "
            "fp8 inputs"
        )


class ModelOpt(Dialect):
    """Dialect ``modelopt``; see :class:`megatron_quant.ckpt.dialects.base.Dialect`."""

    name = "modelopt"
    extra_names: tuple[str, ...] = (HF_QUANT_CONFIG,)
    cache_scales: tuple[Stored, ...] = (
        scalar("k_proj.k_scale", K_SCALE),
        scalar("v_proj.v_scale", V_SCALE),
    )

    def stored(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> tuple[Stored, ...]:
        """List the tensors of a quantized module; FormatError where ModelOpt has no algorithm."""
        algorithm = algorithm_of(ModuleFormat(weights, inputs))
        if layer is Layer.EXPERT and algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            raise FormatError(
                f"{algorithm} is for dense layers: engines read one scale per matrix of FP8 "
                "experts; give experts fp8 with fp8 inputs, or export compressed-tensors"
            )
        return (*_weight_tensors(weights, layer), *_input_tensors(algorithm, inputs))

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """Write the flat form for config.json.

        Raises:
            FormatError: For block FP8 experts in a model of that format alone, and for exclusions
                that vLLM would extend to a quantized module.
        """
        return modelopt_config.flat(self._nested(plan), named_formats(plan))

    def extra_files(self, plan: QuantPlan) -> dict[str, dict[str, Any]]:
        """Return ``hf_quant_config.json``: the nested form of the flat one's statements."""
        return {HF_QUANT_CONFIG: self._nested(plan)}

    def _nested(self, plan: QuantPlan) -> dict[str, Any]:
        _refuse_experts(plan)
        names = excluded(plan)
        if len(formats_of(plan)) > 1:
            formats, blocks = named_formats(plan), expert_blocks(plan)
            return modelopt_config.nested_mixed(formats, blocks, plan.kv_cache)
        refuse_substrings(plan, names)
        return modelopt_config.nested(formats_of(plan)[0], names, plan.kv_cache)

    def check_extra_files(
        self, config: Mapping[str, Any], files: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """List where hf_quant_config.json contradicts ``config``."""
        if HF_QUANT_CONFIG not in files:
            return ()
        quantization = files[HF_QUANT_CONFIG].get("quantization")
        if not isinstance(quantization, dict):
            return (f"{HF_QUANT_CONFIG} has no quantization section",)
        here = modelopt_config.statements(config)
        there = modelopt_config.nested_statements(quantization)
        return tuple(
            f"{HF_QUANT_CONFIG}: {key} is not what config.json's quantization_config says"
            for key in here
            if here[key] != there[key]
        )

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Invert :meth:`quantization_config`; names in ``ignore`` may hold wildcards.

        Raises:
            CheckpointError: For an algorithm that is not known.
        """
        return modelopt_config.read(config, modules)

    def read_kv_cache(self, config: Mapping[str, Any]) -> str:
        """Return ``fp8`` where the config has a kv_cache_scheme.

        CheckpointError for another cache.
        """
        return modelopt_config.read_kv_cache(config)
