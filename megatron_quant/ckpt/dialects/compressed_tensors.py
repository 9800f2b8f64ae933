"""The convention of compressed-tensors, which vLLM and transformers read.

Names, shapes and JSON follow compressed-tensors 0.20, as far as vLLM accepts it. NVFP4's global
scales are DIVISORS here: the inverse of the codec's. transformers reads fp8 weights without
quantized inputs; vLLM reads them outside experts, and refuses them for experts by name.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from megatron_quant.ckpt.dialects import compressed_config
from megatron_quant.ckpt.dialects.base import (
    FLOATS,
    INPUT_SCALE,
    K_SCALE,
    SHAPE,
    V_SCALE,
    Dialect,
    Layer,
    ModuleFormat,
    Stored,
    scalar_of_one,
)
from megatron_quant.ckpt.dialects.common import (
    describe_format,
    excluded,
    formats_of,
    linears,
    named_formats,
    patterns,
    stated,
)
from megatron_quant.ckpt.dialects.expressions import Effort, Expression
from megatron_quant.ckpt.dialects.packing import (
    along_rows,
    along_rows_8,
    from_along_rows,
    from_along_rows_8,
)
from megatron_quant.errors import FormatError
from megatron_quant.fields import Fields
from megatron_quant.formats import SIGNED, Format
from megatron_quant.native import WHOLE
from megatron_quant.recipes import QuantPlan

_E4M3, _U8, _F32 = torch.float8_e4m3fn, torch.uint8, torch.float32
_SCALAR = (WHOLE, WHOLE)
_Along = Callable[[torch.Tensor], torch.Tensor]
_ZEROS: dict[int, tuple[_Along, _Along]] = {
    4: (along_rows, from_along_rows),
    8: (along_rows_8, from_along_rows_8),
}


def _one_inverse(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.reshape(1).reciprocal()


def _zero_dim_inverse(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.reshape(()).reciprocal()


def _divisor(suffix: str, field: str) -> Stored:
    return Stored(
        suffix=suffix,
        field=field,
        dtype=_F32,
        block=_SCALAR,
        scalar_shape=(1,),
        to_disk=_one_inverse,
        from_disk=_zero_dim_inverse,
    )


def _scales(weights: Format, signed: bool = False) -> Stored:
    """Describe scales of rows, groups or blocks, in the dtype to which the codec rounds them."""
    field = weights.field("scale")
    return Stored(
        suffix="weight_scale",
        field="scale",
        dtype=field.dtype,
        block=field.block,
        also=FLOATS,
        signed=signed,
    )


def _packed(weights: Format, signed: bool) -> tuple[Stored, ...]:
    words = Stored(
        suffix="weight_packed", field="elements", dtype=torch.int32, block=weights.fields[0].block
    )
    tensors = (
        words,
        _scales(weights, signed),
        Stored(suffix="weight_shape", field=SHAPE, dtype=torch.int64, block=_SCALAR),
    )
    if not weights.zero_point:
        return tensors
    block = (32 // weights.bits, weights.field("zero").block[1])
    to_disk, from_disk = _ZEROS[weights.bits]
    zeros = Stored(
        suffix="weight_zero_point",
        field="zero",
        dtype=torch.int32,
        block=block,
        to_disk=to_disk,
        from_disk=from_disk,
    )
    return (*tensors, zeros)


def _weight_tensors(weights: Format, signed: bool) -> tuple[Stored, ...]:
    group = (1, weights.group_size)
    fp8 = Stored(suffix="weight", field="elements", dtype=_E4M3, block=(1, 1))
    nibbles = Stored(suffix="weight_packed", field="elements", dtype=_U8, block=(1, 2))
    match weights.name:
        case "fp8":
            return fp8, scalar_of_one("weight_scale", "scale")
        case "fp8_channel" | "fp8_block":
            return fp8, _scales(weights)
        case "int8":
            return Stored(
                suffix="weight", field="elements", dtype=torch.int8, block=(1, 1)
            ), _scales(weights)
        case "nvfp4":
            blocks = Stored(suffix="weight_scale", field="block_scale", dtype=_E4M3, block=group)
            return nibbles, blocks, _divisor("weight_global_scale", "tensor_scale")
        case "mxfp8":
            return fp8, Stored(suffix="weight_scale", field="scale", dtype=_U8, block=group)
        case "mxfp4":
            return nibbles, Stored(suffix="weight_scale", field="scale", dtype=_U8, block=group)
        case _:
            return _packed(weights, signed)


def _input_tensors(inputs: Format | None) -> tuple[Stored, ...]:
    if inputs is None or not inputs.tensor_scale:
        return ()
    if inputs.name == "nvfp4":
        return (_divisor("input_global_scale", INPUT_SCALE),)
    return (scalar_of_one("input_scale", INPUT_SCALE),)


def _group_of(fmt: ModuleFormat, targets: list[str]) -> dict[str, Any]:
    return {"targets": targets, **compressed_config.group(fmt)}


def _groups(plan: QuantPlan) -> dict[str, Any]:
    """Return one group for all linears, or one for each format, with its modules by name."""
    formats = formats_of(plan)
    if len(formats) == 1:
        return {"group_0": _group_of(formats[0], ["Linear"])}
    by_module = named_formats(plan)
    return {
        f"group_{i}": _group_of(fmt, [f"re:{p}" for p in patterns(_modules_in(by_module, fmt))])
        for i, fmt in enumerate(formats)
    }


def _modules_in(formats: Mapping[str, ModuleFormat], wanted: ModuleFormat) -> list[str]:
    return [module for module, fmt in formats.items() if fmt == wanted]


class CompressedTensors(Dialect):
    """Dialect ``compressed-tensors``; see :class:`megatron_quant.ckpt.dialects.base.Dialect`."""

    name = "compressed-tensors"
    cache_scales: tuple[Stored, ...] = (
        scalar_of_one("k_scale", K_SCALE),
        scalar_of_one("v_scale", V_SCALE),
    )

    def stored(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> tuple[Stored, ...]:
        """List the tensors of a quantized module; FormatError where no engine reads the pair."""
        fmt = ModuleFormat(weights, inputs)
        compressed_config.layout(fmt)
        if layer is Layer.EXPERT and fmt.inputs and fmt.inputs.name == "int8_tensor":
            raise FormatError(
                f"no engine runs experts with {describe_format(fmt)}; give experts inputs: int8 "
                "(a scale per token, no calibration)"
            )
        signed = inputs is None and weights.name in SIGNED  # kernels of W4A8 take no sign
        return (*_weight_tensors(weights, signed), *_input_tensors(inputs))

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """Write the config; more than one format makes it ``mixed-precision``."""
        layouts = list(dict.fromkeys(compressed_config.layout(f) for f in formats_of(plan)))
        return {
            "quant_method": self.name,
            "format": layouts[0] if len(layouts) == 1 else compressed_config.MIXED,
            "quantization_status": "compressed",
            "version": "0.20.0",
            "global_compression_ratio": None,
            "kv_cache_scheme": compressed_config.kv_cache_scheme(plan.kv_cache),
            "ignore": excluded(plan),
            "config_groups": _groups(plan),
        }

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Invert :meth:`quantization_config`; names may be exact, ``re:`` patterns or classes.

        Raises:
            CheckpointError: For arguments that none of this dialect's formats has.
        """
        said, effort = stated(config), Effort()
        groups = [_read_group(g, said, effort) for g in said.parts("config_groups").values()]
        ignore = _Names(said.texts("ignore"), effort)
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

    def is_ordered(self, config: Mapping[str, Any]) -> bool:
        """Return whether no group of modules has an ``actorder`` that permutes its columns."""
        groups = stated(config).parts("config_groups").values()
        orders = [group.part("weights").get("actorder") for group in groups]
        return not any(order in (True, "group") for order in orders)

    def read_kv_cache(self, config: Mapping[str, Any]) -> str:
        """Return ``fp8`` where the config has a kv_cache_scheme.

        CheckpointError for another cache.
        """
        return compressed_config.read_kv_cache(config)


class _Names:
    """Exact names and ``re:`` patterns, matched like compressed-tensors does."""

    def __init__(self, names: Iterable[str], effort: Effort) -> None:
        self.exact = {n for n in names if not n.startswith("re:")}
        self.patterns = [Expression(n[3:], effort) for n in names if n.startswith("re:")]

    def match(self, module: str) -> bool:
        return module in self.exact or any(p.match(module) for p in self.patterns)


def _read_group(group: Fields, config: Fields, effort: Effort) -> tuple[_Names, bool, ModuleFormat]:
    """Return named targets, whether all linears are meant, and the format."""
    targets = group.texts("targets")
    fmt = compressed_config.read_group(group, config.text("format"))
    return _Names(targets, effort), "Linear" in targets, fmt
