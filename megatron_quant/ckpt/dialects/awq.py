"""The convention of AutoAWQ (``gemm``): INT4 with zero points, transposed and interleaved.

Symmetric weights are written with zero points of 8 and read as asymmetric. Scales keep the codec's
dtype, and so are exactly the calibrated ones.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch

from megatron_quant.ckpt.dialects.base import SHAPE, Dialect, Layer, ModuleFormat, Stored
from megatron_quant.ckpt.dialects.common import (
    LM_HEAD,
    describe_format,
    excluded,
    linears,
    only_format,
    refuse_cache,
    refuse_substrings,
    stated,
)
from megatron_quant.ckpt.dialects.expressions import Effort
from megatron_quant.ckpt.dialects.gptq import group_scales, integer_format
from megatron_quant.ckpt.dialects.packing import (
    awq_words,
    awq_zeros,
    constant_zeros,
    from_awq_words,
    from_awq_zeros,
)
from megatron_quant.documents import shown
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats import Format
from megatron_quant.native import WHOLE
from megatron_quant.recipes import QuantPlan

_INT32 = torch.int32


@lru_cache
def awq_tensors(weights: Format) -> tuple[Stored, ...]:
    """List the tensors of a module in INT4 groups."""
    return (
        Stored(
            suffix="qweight",
            field="elements",
            dtype=_INT32,
            block=(8, 1),
            to_disk=awq_words,
            from_disk=from_awq_words,
            dims=(1, 0),
        ),
        _zeros(weights),
        group_scales(weights),
    )


def _zeros(weights: Format) -> Stored:
    if weights.zero_point:
        block = (8, weights.field("zero").block[1])
        return Stored(
            suffix="qzeros",
            field="zero",
            dtype=_INT32,
            block=block,
            to_disk=awq_zeros,
            from_disk=from_awq_zeros,
            dims=(1, 0),
        )
    constant = partial(constant_zeros, bits=4, group_size=weights.group_size, code=8)
    return Stored(
        suffix="qzeros", field=SHAPE, dtype=_INT32, block=(WHOLE, WHOLE), to_disk=constant, rows=8
    )


class Awq(Dialect):
    """Dialect ``awq``; see :class:`megatron_quant.ckpt.dialects.base.Dialect`."""

    name = "awq"
    by_tensors = True

    def stored(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> tuple[Stored, ...]:
        """List the tensors of a quantized module; raise FormatError for formats that AWQ lacks."""
        if inputs is not None or weights.name not in ("int4", "int4_asym"):
            raise FormatError(
                f"awq export has no {describe_format(ModuleFormat(weights, inputs))}; it writes "
                "only int4 and int4_asym weights: take one of them, or export compressed-tensors"
            )
        return awq_tensors(weights)

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """Write the config.

        Raises:
            FormatError: For a plan without one common format, and for exclusions that vLLM would
                extend to a quantized module.
        """
        refuse_cache(plan, self.name)
        fmt = only_format(plan, self.name)
        self.stored(fmt.weights, fmt.inputs)
        names = excluded(plan)
        refuse_substrings(plan, names)
        return {
            "quant_method": self.name,
            "bits": fmt.weights.bits,
            "group_size": fmt.weights.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": names,
        }

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Invert :meth:`quantization_config`; exclusions are parts of names.

        Raises:
            CheckpointError: For another packing, or for bits or groups that are not known.
        """
        said, effort = stated(config), Effort()
        version = said.text("version", "gemm").lower()
        bits = said.whole("bits" if "bits" in config else "w_bit")
        if version != "gemm" or bits != 4:
            raise CheckpointError(
                f"awq version {shown(version)} with bits={shown(bits)} is not read; known: 'gemm' "
                "with 4"
            )
        size = said.whole("group_size" if "group_size" in config else "q_group_size")
        fmt = integer_format(bits, size, False)
        skipped = (*said.texts("modules_to_not_convert"), LM_HEAD)
        return {m: fmt for m in linears(modules) if effort.left() and not _has_any(m, skipped)}


def _has_any(module: str, parts: tuple[str, ...]) -> bool:
    return any(part in module for part in parts)
