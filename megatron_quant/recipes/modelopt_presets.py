"""ModelOpt's quantization presets, by name, as recipes.

A preset is a list of entries (glob on quantizer names, attributes, enabled or not) of which the
last match wins, for weights and for inputs apart. See ``QuantizeConfig`` in
modelopt/torch/quantization/config.py (0.47).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from modelopt.torch.quantization import config as modelopt_config

from megatron_quant.errors import RecipeError
from megatron_quant.formats.spec import Format
from megatron_quant.recipes.schema import Recipe, Rule, checked_format, checked_rule

_SIDES = {"weight_quantizer": "weights", "input_quantizer": "inputs"}
_NVFP4_BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
_MAX = ("max", {"method": "max"}, None)


@dataclass(frozen=True)
class _Entry:
    """What one preset entry says of modules: ``sides`` are set to ``format`` (None: disabled)."""

    patterns: tuple[str, ...]
    sides: tuple[str, ...]
    format: Format | None


def load_preset(name: str) -> Recipe:
    """The ModelOpt preset called ``name`` (``mtq.config.choices``) as a recipe.

    Raises RecipeError for an unknown name, and for a preset that needs what this library does
    not do: another algorithm than max, other number formats, attention or KV-cache quantizers.
    """
    preset = getattr(modelopt_config, name, None) if name in modelopt_config.choices else None
    if preset is None:
        known = ", ".join(sorted(modelopt_config.choices))
        raise RecipeError(f"ModelOpt has no preset {name!r}; it has {known}")
    where = f"ModelOpt preset {name}"
    algorithm = preset.get("algorithm")
    if algorithm not in _MAX:
        raise RecipeError(f"{where}: algorithm {algorithm!r} is not supported, only 'max' is")
    raw = modelopt_config.normalize_quant_cfg_list(preset["quant_cfg"])
    entries = [entry for e in raw if (entry := _read(e, where)) is not None]
    return Recipe(name, _rules(entries, where), f"ModelOpt's {name}.")


def _read(entry: Any, where: str) -> _Entry | None:
    """The entry in terms of modules; None for one that concerns nothing that a recipe decides."""
    name = entry.quantizer_name
    side = next((s for s in _SIDES if name.endswith(s)), None)
    if not entry.enable:
        return _read_disabled(name, side, entry.parent_class, where)
    # A glob such as *proj_weight_quantizer names quantizers that a linear does not have.
    stem = name.removesuffix(side) if side else ""
    if entry.parent_class or not side or stem[-1:] not in ("*", "."):
        raise RecipeError(f"{where}: quantizers {name} are not supported, only those of linears")
    fmt = _format(entry.cfg, f"{where}, {name}")
    return _Entry((stem.removesuffix("."),), (_SIDES[side],), fmt)


def _read_disabled(
    name: str, side: str | None, parent_class: str | None, where: str
) -> _Entry | None:
    if parent_class and "Linear" in parent_class:
        raise RecipeError(f"{where}: entries for the class {parent_class} are not supported")
    if parent_class or (not side and name.endswith("quantizer")):
        return None  # norms, embeddings, outputs, attention: never quantized
    if side:
        return _Entry((name.removesuffix(side).removesuffix("."),), (_SIDES[side],), None)
    # A glob on quantizers that ends in ".*" matches those of the module named before it.
    patterns = (name.removesuffix(".*"), name) if name.endswith(".*") else (name,)
    return _Entry(patterns, tuple(_SIDES.values()), None)


def _format(cfg: Any, where: str) -> Format:
    unsupported = f"{where}: this number format is not supported"
    if not isinstance(cfg, modelopt_config.QuantizerAttributeConfig):
        raise RecipeError(f"{unsupported} (several in sequence, or none): {cfg!r}")
    defaults = modelopt_config.QuantizerAttributeConfig().model_dump()
    # effective_bits only feeds ModelOpt's search for mixed precision.
    defaults["effective_bits"] = cfg.effective_bits
    set_values = {k: v for k, v in cfg.model_dump().items() if v != defaults[k]}
    blocks = set_values.get("block_sizes") or {}
    if set_values == {"num_bits": (4, 3)}:
        return checked_format("fp8", None, where)
    if set_values == {"num_bits": (2, 1), "block_sizes": _NVFP4_BLOCKS}:
        return checked_format("nvfp4", None, where)
    if set_values == {"num_bits": 4, "block_sizes": {"type": "static", **blocks}} and -1 in blocks:
        return checked_format("int4", blocks[-1], where)
    raise RecipeError(f"{unsupported}: {set_values}")


def _rules(entries: Sequence[_Entry], where: str) -> tuple[Rule, ...]:
    """First match wins here and the last one there: the order turns round."""
    merged = _merge_sides(entries, where)[::-1]
    rules = []
    for _, same in groupby(merged, key=lambda rule: (rule.weights, rule.inputs)):
        group = list(same)
        patterns = tuple(p for rule in reversed(group) for p in rule.patterns)
        rules.append(replace(group[0], patterns=patterns))
        if "*" in patterns:
            break  # nothing is left for the rules that follow
    return tuple(rules)


def _merge_sides(entries: Sequence[_Entry], where: str) -> list[Rule]:
    """One rule for adjacent entries on the same modules, in the preset's order."""
    rules: list[Rule] = []
    for patterns, group in groupby(entries, key=lambda e: e.patterns):
        formats = {side: e.format for e in group for side in e.sides}
        for side in _SIDES.values():
            inherits = side not in formats and any(getattr(r, side) for r in rules)
            if inherits:
                raise RecipeError(
                    f"{where}: {patterns[0]} changes weights or inputs alone; write it as a recipe"
                )
        weights, inputs = formats.get("weights"), formats.get("inputs")
        if weights is not None:
            rules.append(checked_rule(patterns, weights, inputs, where))
        elif inputs is None:
            rules.append(Rule(patterns, optional=True))
        else:
            raise RecipeError(f"{where}: quantizes the inputs of {patterns[0]} but not its weights")
    return rules
