"""The convention of AutoRound: other tools' tensors under a config of its own.

``auto_round:auto_gptq`` holds symmetric integers in the form of GPTQ version 1, without ``g_idx``;
``auto_round:auto_awq`` holds asymmetric ones in the form of AWQ; ``auto_round:llm_compressor``
holds microscaling formats in the form of compressed-tensors. A checkpoint has one packing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_quant.ckpt.dialects.awq import awq_tensors
from megatron_quant.ckpt.dialects.base import Dialect, Layer, ModuleFormat, Stored
from megatron_quant.ckpt.dialects.common import (
    LM_HEAD,
    describe_format,
    excluded,
    format_of_modules,
    formats_of,
    linears,
    named_formats,
    refuse_cache,
    stated,
)
from megatron_quant.ckpt.dialects.compressed_tensors import CompressedTensors
from megatron_quant.ckpt.dialects.expressions import Effort, Expression
from megatron_quant.ckpt.dialects.gptq import gptq_tensors, integer_format
from megatron_quant.documents import shown
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.fields import Fields
from megatron_quant.formats import Format, get_format
from megatron_quant.recipes import QuantPlan

GPTQ, AWQ, MX = "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:llm_compressor"
_PACKINGS = {"int4": GPTQ, "int8_group": GPTQ, "int4_asym": AWQ, "mxfp4": MX, "mxfp8": MX}
_INPUTS = {"mxfp4": ("mxfp4", None), "mxfp8": ("mxfp8", None)}
_ZERO_POINTS = ("int4_asym", "int8_asym")
_UNQUANTIZED = 16
_REGEX = re.compile(r"[*+?^$()\[\]{}|\\]")


@dataclass(frozen=True)
class AutoRound(Dialect):
    """Dialect ``auto-round``; see :class:`megatron_quant.ckpt.dialects.base.Dialect`.

    Attributes:
        packing: Packing of a checkpoint; empty for the one that suits each format.
    """

    packing: str = ""

    name = "auto-round"
    by_tensors = True

    def stored(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> tuple[Stored, ...]:
        """List the tensors of a quantized module; raise FormatError for formats AutoRound lacks."""
        if self.packing == GPTQ and weights.name in _ZERO_POINTS and inputs is None:
            return _as_gptq(weights)  # these are read, never written
        allowed = _INPUTS.get(weights.name, (None,))
        if weights.name not in _PACKINGS or (inputs.name if inputs else None) not in allowed:
            raise FormatError(
                f"auto-round export has no {describe_format(ModuleFormat(weights, inputs))}; "
                "it writes int4, int4_asym and int8_group weights without inputs, and mxfp4 and "
                "mxfp8 with inputs of the same format or none: take one of them, or export "
                "compressed-tensors"
            )
        packing = self.packing or _PACKINGS[weights.name]
        if packing == GPTQ:
            return _as_gptq(weights)
        if packing == AWQ:
            return awq_tensors(weights)
        return CompressedTensors().stored(weights, inputs, layer)

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """Write the config; ``extra_config`` lists the modules that differ from most, by name.

        Raises:
            FormatError: Where two packings would be needed.
        """
        refuse_cache(plan, self.name)
        formats = formats_of(plan)
        for fmt in formats:
            self.stored(fmt.weights, fmt.inputs)
        _refuse_mixtures(formats)
        base = formats[0]
        return {
            "quant_method": self.name,
            "packing_format": _PACKINGS[base.weights.name],
            **_settings(base),
            "block_name_to_quantize": ",".join(_blocks(plan)),
            "extra_config": _extra(plan, base),
            "autoround_version": "0.16.0",
            "iters": 0,
        }

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Invert :meth:`quantization_config`; ``extra_config`` has names or expressions.

        Raises:
            CheckpointError: For a packing or format that is not known.
        """
        said = stated(config)
        extra, blocks = _Extra(said, Effort()), _read_blocks(said)
        found = {}
        for module in linears(modules):
            change = extra.of(module)
            if change is None and not _in_blocks(blocks, module):
                continue
            settings = stated({**config, **(change or {})})
            if (settings.whole("bits") or _UNQUANTIZED) < _UNQUANTIZED:
                found[module] = _read(settings)
        return found

    def variant(self, config: Mapping[str, Any]) -> Dialect:
        """Return the dialect with the packing that the config states.

        CheckpointError for others.
        """
        packing = stated(config).text("packing_format") or GPTQ
        if packing not in (GPTQ, AWQ, MX):
            raise CheckpointError(
                f"auto-round packing_format {shown(packing)} is not read; known: {GPTQ}, {AWQ}, "
                f"{MX}"
            )
        return AutoRound(packing)


def _as_gptq(weights: Format) -> tuple[Stored, ...]:
    return tuple(s for s in gptq_tensors(weights, 1) if s.suffix != "g_idx")


def _settings(fmt: ModuleFormat) -> dict[str, Any]:
    weights = fmt.weights
    settings: dict[str, Any] = {
        "bits": weights.bits,
        "group_size": weights.group_size,
        "sym": not weights.zero_point,
        "data_type": "mx_fp" if _PACKINGS[weights.name] == MX else "int",
    }
    if fmt.inputs is not None:
        settings |= {
            "act_bits": fmt.inputs.bits,
            "act_group_size": fmt.inputs.group_size,
            "act_data_type": "mx_fp",
            "act_sym": True,
            "act_dynamic": True,
        }
    return settings


def _refuse_mixtures(formats: list[ModuleFormat]) -> None:
    base = formats[0]
    for other in formats[1:]:
        both = f"{describe_format(base)} and {describe_format(other)}"
        if _PACKINGS[other.weights.name] != _PACKINGS[base.weights.name]:
            raise FormatError(
                f"auto-round packs a checkpoint in one way, but {both} need two; use one of them, "
                "or export compressed-tensors"
            )
        if _PACKINGS[base.weights.name] == MX:  # readers take one scheme for the whole checkpoint
            raise FormatError(
                f"auto-round reads one microscaling format per checkpoint, not {both}; use one of "
                "them, or export compressed-tensors"
            )


def _blocks(plan: QuantPlan) -> list[str]:
    """Return the names of the lists of layers that hold quantized modules: ``model.layers``."""
    found = (re.match(r"(.*?)\.\d+\.", m) for m in format_of_modules(plan))
    return list(dict.fromkeys(match[1] for match in found if match))


def _extra(plan: QuantPlan, base: ModuleFormat) -> dict[str, dict[str, Any]]:
    blocks = tuple(f"{b}." for b in _blocks(plan))
    extra: dict[str, dict[str, Any]] = {
        name: {"bits": _UNQUANTIZED, "data_type": "float"}
        for name in excluded(plan)
        if name.startswith(blocks)
    }
    for module, fmt in named_formats(plan).items():
        if fmt != base:
            extra[module] = _settings(fmt)
    return extra


class _Extra:
    """``extra_config``: the modules that differ, by name, by its end, or by an expression."""

    def __init__(self, config: Fields, effort: Effort) -> None:
        self._effort = effort
        self._exact = {name: part.values for name, part in config.parts("extra_config").items()}
        self._ends = {n: c for n, c in self._exact.items() if n.startswith(".")}
        self._parts = {n: Expression(n, effort) for n in self._exact if _REGEX.search(n)}
        self._loose = [n for n in self._exact if n in self._ends or n in self._parts]

    def of(self, module: str) -> Mapping[str, Any] | None:
        """Return the entry of a module; None where there is none."""
        self._effort.left()
        if module in self._exact:
            return self._exact[module]
        return next((self._exact[n] for n in self._loose if self._means(n, module)), None)

    def _means(self, name: str, module: str) -> bool:
        by_end = name in self._ends and module.endswith(name)
        return by_end or (name in self._parts and self._parts[name].search(module))


def _read_blocks(config: Fields) -> tuple[str, ...]:
    """Return the prefixes of the quantized modules' names; empty for all but the head."""
    for key in ("block_name_to_quantize", "to_quant_block_names"):
        if config.get(key):
            names = config.get(key)
            found = tuple(names.split(",")) if isinstance(names, str) else config.texts(key)
            return tuple(f"{name}." for name in found)
    return ()


def _in_blocks(blocks: tuple[str, ...], module: str) -> bool:
    return module.startswith(blocks) if blocks else module != LM_HEAD


def _read(settings: Fields) -> ModuleFormat:
    bits, packing = settings.whole("bits"), settings.text("packing_format") or GPTQ
    if packing != MX:
        symmetric = settings.flag("sym", True) and packing != AWQ
        return integer_format(bits, settings.whole("group_size"), symmetric)
    known = {("mx_fp", 4): "mxfp4", ("mx_fp", 8): "mxfp8"}
    data_type = settings.text("data_type")
    name = known.get((data_type, bits or 0))
    act_bits = settings.whole("act_bits") or _UNQUANTIZED
    if name is None or act_bits not in (bits, _UNQUANTIZED):
        raise CheckpointError(
            f"quantization_config: bits={shown(bits)}, data_type={shown(data_type)}, "
            f"act_bits={shown(act_bits)} is not read; known: mx_fp of 4 and 8 bits"
        )
    return ModuleFormat(get_format(name), get_format(name) if act_bits == bits else None)
