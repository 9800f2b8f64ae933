"""gpt-oss's convention: routed experts in MXFP4, all of a layer in one stack.

transformers, vLLM and SGLang read it. Here its tensors have names of single experts
(``...experts.3.gate_proj.weight_blocks``); ``stack_names`` tells where the files have them.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_quant.ckpt.dialects.base import Dialect, Layer, ModuleFormat, Stored, layer_of
from megatron_quant.ckpt.dialects.common import (
    describe_format,
    excluded,
    is_skipped,
    only_format,
    refuse_cache,
    stated,
)
from megatron_quant.ckpt.dialects.stack_names import BLOCKS, GROUP, SCALES
from megatron_quant.errors import FormatError
from megatron_quant.formats import Format, get_format
from megatron_quant.recipes import QuantPlan

_TENSORS = (
    Stored(suffix=BLOCKS, field="elements", dtype=torch.uint8, block=(1, 2)),
    Stored(suffix=SCALES, field="scale", dtype=torch.uint8, block=(1, GROUP)),
)


class Mxfp4Stacks(Dialect):
    """Dialect ``mxfp4``; see :class:`megatron_quant.ckpt.dialects.base.Dialect`."""

    name = "mxfp4"
    stacks = True

    def stored(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> tuple[Stored, ...]:
        """List the tensors of an expert; raise FormatError for all but MXFP4 in experts."""
        if (weights.name, inputs) != ("mxfp4", None) or layer is not Layer.EXPERT:
            where = "in experts" if layer is Layer.EXPERT else "outside experts"
            raise FormatError(
                f"mxfp4 export has no {describe_format(ModuleFormat(weights, inputs))} {where}; it "
                "writes mxfp4 without quantized inputs in experts alone: take the recipe gpt_oss, "
                "or export compressed-tensors"
            )
        return _TENSORS

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """Write the config; raise FormatError unless all experts, and they alone, are in MXFP4."""
        refuse_cache(plan, self.name)
        fmt = only_format(plan, self.name)
        for decision in plan.decisions:
            module = decision.slot.sources[0]
            expert = layer_of(module) is Layer.EXPERT and len(decision.slot.shape) == 2
            if decision.quantized:
                self.stored(fmt.weights, fmt.inputs, layer_of(module))
            elif expert:
                raise FormatError(
                    f"{module} is left alone, but engines read the experts of every layer of an "
                    "mxfp4 export in MXFP4: quantize all experts, or export another format"
                )
        return {"quant_method": self.name, "modules_to_not_convert": excluded(plan)}

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Invert :meth:`quantization_config`; match exclusions like transformers."""
        names = stated(config).texts("modules_to_not_convert")
        fmt = ModuleFormat(get_format("mxfp4"), None)
        experts = [m for m in modules if layer_of(m) is Layer.EXPERT]
        skipped = is_skipped(names)
        return {m: fmt for m in experts if not skipped(m)}
