"""The convention of AutoGPTQ and GPTQModel, version 1: integer groups, transposed.

Only symmetric weights are written. Version 1 stores zero points less one. Readers of asymmetric
ones add one to whole words, so that a zero point of 0 spoils its neighbour, and vLLM refuses them
by name. Scales keep the codec's dtype, and so are exactly the calibrated ones. Versions 1 and 2 are
read, symmetric or not, with columns in any order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from megatron_quant.ckpt.dialects.base import (
    FLOATS,
    SHAPE,
    Dialect,
    Layer,
    ModuleFormat,
    Stored,
)
from megatron_quant.ckpt.dialects.common import (
    LM_HEAD,
    describe_format,
    excluded,
    formats_of,
    linears,
    named_formats,
    patterns,
    refuse_cache,
    stated,
)
from megatron_quant.ckpt.dialects.expressions import Effort, Expression
from megatron_quant.ckpt.dialects.packing import (
    constant_zeros,
    from_gptq_zeros,
    gptq_zeros,
    group_index,
    transposed,
)
from megatron_quant.documents import shown
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats import SIGNED, Format, stored_format
from megatron_quant.native import WHOLE
from megatron_quant.recipes import QuantPlan

_SCALAR = (WHOLE, WHOLE)
_SYMMETRIC = {4: "int4", 8: "int8_group"}
_ASYMMETRIC = {4: "int4_asym", 8: "int8_asym"}
_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def group_scales(weights: Format, signed: bool = False) -> Stored:
    """Describe ``scales`` [K / group, N], of GPTQ and AWQ alike."""
    scale = weights.field("scale")
    return Stored(
        suffix="scales",
        field="scale",
        dtype=scale.dtype,
        block=scale.block,
        to_disk=transposed,
        from_disk=transposed,
        dims=(1, 0),
        also=FLOATS,
        signed=signed,
    )


@lru_cache
def gptq_tensors(weights: Format, version: int) -> tuple[Stored, ...]:
    """List the tensors of a module in an integer format with groups."""
    words = weights.fields[0].block[1]
    group = weights.group_size
    return (
        Stored(
            suffix="qweight",
            field="elements",
            dtype=torch.int32,
            block=(1, words),
            to_disk=transposed,
            from_disk=transposed,
            dims=(1, 0),
        ),
        _zeros(weights, version),
        group_scales(weights, weights.name in SIGNED),
        Stored(
            suffix="g_idx",
            field=SHAPE,
            dtype=torch.int32,
            block=_SCALAR,
            to_disk=partial(group_index, group_size=group),
            optional=True,
        ),
    )


def _zeros(weights: Format, version: int) -> Stored:
    if weights.zero_point:
        offset, bits = 2 - version, weights.bits
        to_disk = partial(gptq_zeros, offset=offset, bits=bits)
        from_disk = partial(from_gptq_zeros, offset=offset, bits=bits)
        block = (32 // weights.bits, weights.field("zero").block[1])
        return Stored(
            suffix="qzeros",
            field="zero",
            dtype=torch.int32,
            block=block,
            to_disk=to_disk,
            from_disk=from_disk,
            dims=(1, 0),
        )
    code = 2 ** (weights.bits - 1) - (version == 1)
    constant = partial(constant_zeros, bits=weights.bits, group_size=weights.group_size, code=code)
    rows = 32 // weights.bits
    return Stored(
        suffix="qzeros", field=SHAPE, dtype=torch.int32, block=_SCALAR, to_disk=constant, rows=rows
    )


def integer_format(bits: int | None, group_size: int | None, symmetric: bool) -> ModuleFormat:
    """Return the weight-only format of these settings; CheckpointError where there is none."""
    name = (_SYMMETRIC if symmetric else _ASYMMETRIC).get(bits or 0)
    if name is None:
        raise CheckpointError(
            f"quantization_config: bits={shown(bits)} with sym={symmetric} is not read; known: "
            "4 and 8 bits"
        )
    try:
        return ModuleFormat(stored_format(name, group_size), None)
    except FormatError as error:
        raise CheckpointError(f"quantization_config: {error}") from None


@dataclass(frozen=True)
class Gptq(Dialect):
    """Dialect ``gptq``; see :class:`megatron_quant.ckpt.dialects.base.Dialect`."""

    version: int = 1

    name = "gptq"
    by_tensors = True

    def stored(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> tuple[Stored, ...]:
        """List the tensors of a quantized module; raise FormatError for formats that GPTQ lacks."""
        integers = (*_SYMMETRIC.values(), *_ASYMMETRIC.values())
        if inputs is not None or weights.name not in integers:
            raise FormatError(
                f"gptq export has no {describe_format(ModuleFormat(weights, inputs))}; it writes "
                "only int4 and int8_group weights: take one of them, or export compressed-tensors"
            )
        return gptq_tensors(weights, self.version)

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """Write the config; bits and groups that differ from most modules' are ``dynamic``.

        Raises:
            FormatError: For asymmetric weights.
        """
        refuse_cache(plan, self.name)
        base, *others = formats_of(plan)
        for fmt in (base, *others):
            self.stored(fmt.weights, fmt.inputs)
            _refuse_asymmetric(fmt)
        dynamic: dict[str, dict[str, Any]] = {
            f"-:{p}": {} for p in patterns(n for n in excluded(plan) if n != LM_HEAD)
        }
        by_module = named_formats(plan)
        for fmt in others:
            modules = (m for m, f in by_module.items() if f == fmt)
            dynamic |= {f"+:{p}": _settings(fmt.weights) for p in patterns(modules)}
        return {
            "quant_method": self.name,
            **_settings(base.weights),
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": next(n for n, v in _VERSIONS.items() if v == self.version),
            "dynamic": dynamic,
        }

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Invert :meth:`quantization_config`; match ``dynamic`` like GPTQModel.

        Raises:
            CheckpointError: For bits or groups that are not known.
        """
        said, effort = stated(config), Effort()
        head = said.flag("lm_head")
        rules = [
            (Expression(k.lstrip("+-").removeprefix(":"), effort), k[:1] == "-", v.values)
            for k, v in said.parts("dynamic").items()
        ]
        found: dict[str, ModuleFormat] = {}
        for module in linears(modules):
            if module == LM_HEAD and not head:
                continue
            skipped, change = next(
                ((skip, v) for pattern, skip, v in rules if pattern.match(module)), (False, {})
            )
            if not skipped:
                found[module] = _read({**config, **change})
        return found

    def is_ordered(self, config: Mapping[str, Any]) -> bool:
        """Return whether ``desc_act`` is false."""
        return not stated(config).flag("desc_act")

    def variant(self, config: Mapping[str, Any]) -> Dialect:
        """Return version 1 or 2, as ``checkpoint_format`` says; CheckpointError for others."""
        found = stated(config).text("checkpoint_format") or "gptq"
        if found not in _VERSIONS:
            raise CheckpointError(
                f"gptq checkpoint_format {shown(found)} is not read; known: {', '.join(_VERSIONS)}"
            )
        return Gptq(_VERSIONS[found])


def _settings(weights: Format) -> dict[str, Any]:
    symmetric = not weights.zero_point
    return {"bits": weights.bits, "group_size": weights.group_size, "sym": symmetric}


def _read(settings: Mapping[str, Any]) -> ModuleFormat:
    said = stated(settings)
    return integer_format(said.whole("bits"), said.whole("group_size"), said.flag("sym", True))


def _refuse_asymmetric(fmt: ModuleFormat) -> None:
    if fmt.weights.zero_point:
        raise FormatError(
            f"gptq export has no {describe_format(fmt)}: its engines refuse zero points, or add "
            "one to them across words; take int4, or export awq, auto-round or compressed-tensors"
        )
