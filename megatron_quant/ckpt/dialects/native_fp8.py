"""The convention of DeepSeek's block FP8: ``weight`` and ``weight_scale_inv``.

transformers, vLLM, SGLang and TensorRT-LLM read it, experts included. The scale multiplies to
dequantize, whatever its name says. Activations are quantized dynamically, 1 x 128.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_quant.ckpt.dialects.base import FLOATS, Dialect, Layer, ModuleFormat, Stored
from megatron_quant.ckpt.dialects.common import (
    describe_format,
    excluded,
    is_skipped,
    linears,
    only_format,
    refuse_cache,
    stated,
)
from megatron_quant.documents import shown
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.fields import Fields
from megatron_quant.formats import Format, get_format
from megatron_quant.recipes import QuantPlan

_BLOCK = [128, 128]
_TENSORS = (
    Stored(suffix="weight", field="elements", dtype=torch.float8_e4m3fn, block=(1, 1)),
    Stored(
        suffix="weight_scale_inv", field="scale", dtype=torch.float32, block=(128, 128), also=FLOATS
    ),
)


class NativeFp8(Dialect):
    """Dialect ``fp8``; see :class:`megatron_quant.ckpt.dialects.base.Dialect`."""

    name = "fp8"

    def stored(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> tuple[Stored, ...]:
        """List the tensors of a quantized module; raise FormatError for all but block FP8."""
        if (weights.name, inputs and inputs.name) != ("fp8_block", "fp8_group"):
            instead = "add inputs: fp8_group" if weights.name == "fp8_block" else "take that"
            raise FormatError(
                f"fp8 export has no {describe_format(ModuleFormat(weights, inputs))}; it writes "
                f"fp8_block with fp8_group inputs: {instead}, or export compressed-tensors"
            )
        return _TENSORS

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """Write the config; raise FormatError for a plan without one common format."""
        refuse_cache(plan, self.name)
        fmt = only_format(plan, self.name)
        self.stored(fmt.weights, fmt.inputs)
        return {
            "quant_method": self.name,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(_BLOCK),
            "modules_to_not_convert": excluded(plan),
        }

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Invert :meth:`quantization_config`; match exclusions like transformers.

        Raises:
            CheckpointError: For other blocks, static activations or another element type.
        """
        said = stated(config)
        kind = [
            said.text("fmt", "e4m3"),
            said.text("activation_scheme", "dynamic"),
            said.get("weight_block_size"),
        ]
        if kind != ["e4m3", "dynamic", _BLOCK]:
            raise CheckpointError(
                f"fp8 with fmt, activation_scheme, weight_block_size = {shown(kind)} is not read; "
                f"known: e4m3, dynamic, {_BLOCK}"
            )
        fmt = ModuleFormat(get_format("fp8_block"), get_format("fp8_group"))
        skipped = is_skipped(_exclusions(said))
        return {m: fmt for m in linears(modules) if not skipped(m)}

    def lists_exclusions(self, config: Mapping[str, Any]) -> bool:
        """Return whether it names any; DeepSeek's and MiniMax's releases name none."""
        return bool(_exclusions(stated(config)))


def _exclusions(said: Fields) -> tuple[str, ...]:
    return said.texts("modules_to_not_convert") or said.texts("ignored_layers")
