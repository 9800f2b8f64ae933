"""The form in which DeepSeek-V4 is released: MXFP4 or NVFP4 in routed experts, block FP8 elsewhere.

Base models have block FP8 in routed experts too, with scales in fp32 (``expert_dtype: fp8``).
Scales of a weight are in ``.scale`` beside it, as E8M0. NVFP4 experts have ModelOpt's tensors, and
the config says ``moe_quant_algo`` beside ``quant_method: fp8``. vLLM and SGLang read both. An
export changes routed experts alone; what else a release has in FP8 is carried, code by code.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from megatron_quant.ckpt.dialects.base import (
    FLOATS,
    Dialect,
    Layer,
    ModuleFormat,
    Stored,
    layer_of,
)
from megatron_quant.ckpt.dialects.common import describe_format, linears, refuse_cache, stated
from megatron_quant.ckpt.dialects.modelopt import HF_QUANT_CONFIG, ModelOpt
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.fields import Fields
from megatron_quant.formats import Format, get_format
from megatron_quant.recipes import QuantPlan

_BLOCK, _GROUP = (128, 128), (1, 32)
_E8M0 = torch.float8_e8m0fnu
_NVFP4 = "NVFP4"
_FP8 = ModuleFormat(get_format("fp8_block"), get_format("fp8_group"))


def _as_int8(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.int8)


def _as_uint8(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


def _as_e8m0(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(_E8M0)


def _powers(scale: torch.Tensor) -> torch.Tensor:
    """Return fp32 powers of two as E8M0; raise FormatError for other numbers."""
    found = scale.to(_E8M0)
    if not torch.equal(found.float(), scale):
        raise FormatError(
            "DeepSeek-V4's form has scales that are powers of two, and the source has others; "
            "export another format"
        )
    return found


def _floats(scale: torch.Tensor) -> torch.Tensor:
    return scale.float() if scale.is_floating_point() else scale.view(_E8M0).float()


_TENSORS = {
    "mxfp4": (
        Stored(
            suffix="weight",
            field="elements",
            dtype=torch.int8,
            block=(1, 2),
            to_disk=_as_int8,
            from_disk=_as_uint8,
            also=(torch.uint8,),
        ),
        Stored(suffix="scale", field="scale", dtype=_E8M0, block=_GROUP, to_disk=_as_e8m0),
    ),
    "fp8_block": (
        Stored(suffix="weight", field="elements", dtype=torch.float8_e4m3fn, block=(1, 1)),
        Stored(
            suffix="scale",
            field="scale",
            dtype=_E8M0,
            block=_BLOCK,
            to_disk=_powers,
            from_disk=_floats,
            also=FLOATS,
        ),
    ),
}
_IN_FLOATS = (
    _TENSORS["fp8_block"][0],
    Stored(
        suffix="scale",
        field="scale",
        dtype=torch.float32,
        block=_BLOCK,
        from_disk=_floats,
        also=(*FLOATS, _E8M0),
    ),
)
"""Block FP8 of releases whose experts are FP8 too: their scales are no powers of two."""
_EXCLUDED = ("*.attn.*", "*.ffn.shared_experts.*", "*.ffn.gate.*", "*.hc_*", "embed", "head")
"""What hf_quant_config.json lists as no NVFP4, as ModelOpt does."""


class DeepseekV4(Dialect):
    """Dialect ``deepseek-v4``; see :class:`megatron_quant.ckpt.dialects.base.Dialect`."""

    name = "deepseek-v4"
    extra_names = (HF_QUANT_CONFIG,)
    by_tensors = True
    carries = True

    def __init__(self, fp8_experts: bool = False) -> None:
        """Take the form of most releases, or that of base models, with experts in block FP8."""
        self._fp8_experts = fp8_experts

    def of_model(self, config: Mapping[str, Any]) -> Dialect:
        """Return the form that ``expert_dtype`` says, where vLLM looks for it too."""
        return _WITH_FP8_EXPERTS if config.get("expert_dtype") == "fp8" else self

    def stored(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> tuple[Stored, ...]:
        """List the tensors of a module; raise FormatError for what no release has."""
        fmt = ModuleFormat(weights, inputs)
        kind = (weights.name, inputs.name if inputs else None)
        if layer is Layer.EXPERT and kind == ("nvfp4", "nvfp4"):
            return ModelOpt().stored(weights, inputs, layer)
        if self._fp8_experts and kind == (_FP8.weights.name, "fp8_group"):
            return _IN_FLOATS
        if (layer, kind) in (
            (Layer.EXPERT, ("mxfp4", None)),
            (Layer.DENSE, (_FP8.weights.name, "fp8_group")),
        ):
            return _TENSORS[weights.name]
        where = "in routed experts" if layer is Layer.EXPERT else "outside routed experts"
        raise FormatError(
            f"deepseek-v4 export has no {describe_format(fmt)} {where}; it writes nvfp4 with nvfp4 "
            "inputs, or mxfp4, in routed experts, and carries the rest: take the recipe "
            "deepseek_v4, or export modelopt"
        )

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """Write the release's config; FormatError for a plan that is no release's."""
        refuse_cache(plan, self.name)
        found = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": list(_BLOCK),
        }
        if _experts_of(plan) != "nvfp4":
            return found
        found["moe_quant_algo"] = _NVFP4
        carried = [d for d in plan.quantized if d.carried and not _is_nvfp4(d.weights)]
        modules = [n for d in carried for n in d.slot.sources if layer_of(n) is Layer.EXPERT]
        kept = dict.fromkeys(f"{n.partition('.experts.')[0]}.experts*" for n in modules)
        return {**found, "ignore": list(kept)} if kept else found

    def extra_files(self, plan: QuantPlan) -> dict[str, dict[str, Any]]:
        """Return ``hf_quant_config.json``, where SGLang looks for what NVFP4 experts are."""
        if _experts_of(plan) != "nvfp4":
            return {}
        layer = {"quant_algo": _NVFP4, "group_size": 16}
        modules = (n for d in plan.quantized for n in d.slot.sources if _is_nvfp4(d.weights))
        said = {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "quantized_layers": dict.fromkeys(modules, layer),
            "exclude_modules": list(_EXCLUDED),
        }
        return {HF_QUANT_CONFIG: {"producer": {"name": "modelopt"}, "quantization": said}}

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Return the format of every module that is no plain one.

        Raises:
            CheckpointError: For other blocks, or an algorithm that is not known.
        """
        said = stated(config)
        algorithm = said.text("moe_quant_algo", "")
        if said.get("weight_block_size") != list(_BLOCK) or algorithm not in ("", _NVFP4):
            raise CheckpointError(
                "DeepSeek-V4 with weight_block_size, moe_quant_algo = "
                f"{said.get('weight_block_size')}, {algorithm!r} is not read; known: "
                f"{list(_BLOCK)}, and {_NVFP4} or none"
            )
        nvfp4 = get_format("nvfp4")
        own = _FP8 if self._fp8_experts else _MXFP4
        experts = ModuleFormat(nvfp4, nvfp4) if algorithm else own
        kept = _ignored(said)
        return {
            m: _FP8
            if layer_of(m) is Layer.DENSE
            else own
            if any(fnmatchcase(m, pattern) for pattern in kept)
            else experts
            for m in linears(modules)
        }

    def lists_exclusions(self, config: Mapping[str, Any]) -> bool:
        """Return False: what is plain in a release is not named."""
        return False


_MXFP4 = ModuleFormat(get_format("mxfp4"), None)
_WITH_FP8_EXPERTS = DeepseekV4(fp8_experts=True)


def _ignored(said: Fields) -> tuple[str, ...]:
    """Return what a config leaves as released beside NVFP4 experts, such as ``mtp.*``."""
    return said.texts("ignore")


def _is_nvfp4(weights: Format | None) -> bool:
    return weights is not None and weights.name == "nvfp4"


def _experts_of(plan: QuantPlan) -> str:
    """Return the format of routed experts; FormatError unless they have one, and engines read it.

    Engines build every other linear as block FP8, so none may be plain.
    """
    found = set()
    for decision in plan.decisions:
        module = decision.slot.sources[0]
        if decision.carried and decision.slot.fixed:  # of layers for speculation
            continue
        if layer_of(module) is Layer.EXPERT:
            found.add(decision.weights.name if decision.weights else "plain")
        elif not decision.slot.fixed and not decision.quantized:
            raise FormatError(
                f"{module} is plain in the source, but engines read DeepSeek-V4's form with block "
                "FP8 there: give the release, or export modelopt"
            )
    if len(found) != 1 or "plain" in found:
        raise FormatError(
            f"recipe {plan.recipe!r} leaves routed experts in {' and '.join(sorted(found))}; "
            "DeepSeek-V4's form has all of them in nvfp4 or mxfp4"
        )
    return found.pop()
