"""Read ModelOpt's quantization presets, by name, as recipes.

A preset is a list of entries (glob on quantizer names, attributes, enabled or not). The last match
wins, for weights and for inputs apart. See ``QuantizeConfig`` in
modelopt/torch/quantization/config.py (0.47).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from megatron_quant.errors import RecipeError
from megatron_quant.formats import CHANNEL, Format, get_format
from megatron_quant.recipes.modelopt_module import modelopt_config
from megatron_quant.recipes.schema import Recipe, Rule, checked_format, checked_rule

_SIDES = {"weight_quantizer": "weights", "input_quantizer": "inputs"}
_KV_CACHE = "*[kv]_bmm_quantizer"
_KV_CACHES = {"fp8": {"num_bits": (4, 3)}, "fp8_cast": {"num_bits": (4, 3), "use_constant_amax": 1}}
_MAX = ("max", {"method": "max"}, None)
_SWEEP = {"method": "mse", "fp8_scale_sweep": True}
_FOUR_OVER_SIX = {
    "method": "mse",
    "fp8_scale_sweep": False,
    "start_multiplier": 1.0,
    "stop_multiplier": 1.5,
    "step_size": 0.5,
}
_AWQ = {"awq_lite": "awq", "awq_full": "awq", "awq_clip": "imatrix"}
"""ModelOpt's kinds of AWQ: our scales are searched by the inputs too, as awq_clip's are."""
_SMOOTHQUANT_ALPHA = 1.0
"""ModelOpt's default."""
_NVFP4 = {-1: 16, "scale_bits": (4, 3)}
_MX = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}
# (format, side, ModelOpt's attributes). Without a side they mean the same on both sides.
_FORMATS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fp8", "", {"num_bits": (4, 3)}),
    ("fp8_channel", "weights", {"num_bits": (4, 3), "axis": 0}),
    ("fp8_channel", "inputs", {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}),
    ("fp8_block", "weights", {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}}),
    ("int8", "weights", {"axis": 0}),
    ("int8_tensor", "inputs", {}),
    ("nvfp4", "", {"num_bits": (2, 1), "block_sizes": {**_NVFP4, "type": "dynamic"}}),
    ("nvfp4", "weights", {"num_bits": (2, 1), "block_sizes": {**_NVFP4, "type": "static"}}),
    (
        "nvfp4",
        "weights",
        {"num_bits": (2, 1), "block_sizes": {**_NVFP4, "type": "static", "four_over_six": 1}},
    ),
    ("mxfp8", "", {"num_bits": (4, 3), "block_sizes": _MX}),
    ("mxfp4", "", {"num_bits": (2, 1), "block_sizes": _MX}),
)


@dataclass(frozen=True)
class _Entry:
    """One preset entry on modules: it sets ``sides`` to ``format`` (None: disabled)."""

    patterns: tuple[str, ...]
    sides: tuple[str, ...]
    format: Format | None


def load_preset(name: str) -> Recipe:
    """Read the ModelOpt preset called ``name`` (``mtq.config.choices``) as a recipe.

    ``A+B`` is A with the entries of B after its own, as ModelOpt adds a preset of the KV cache.

    Raises:
        RecipeError: For an unknown name, and for a preset that needs more than this library does:
            an algorithm that recipes do not have, other number formats, attention quantizers.
    """
    base, *others = name.split("+")
    where = f"ModelOpt preset {name}"
    algorithm, alpha = _algorithm(_preset(base), where)
    for other in others:
        if _preset(other).get("algorithm") not in _MAX:
            raise RecipeError(
                f"{where}: {other} has an algorithm of its own, but only {base} may have one; "
                f"leave {other} out, or write a recipe"
            )
    raw = [e for part in (base, *others) for e in _raw_entries(part)]
    entries = [entry for e in raw if (entry := _read(e, where)) is not None]
    kv_cache = _kv_cache(raw, where)
    rules = _rules(entries, algorithm, where)
    rules = tuple(replace(r, alpha=alpha) if r.weights is not None else r for r in rules)
    if not rules:
        raise RecipeError(
            f"{where} quantizes no weight: add it to one that does, as in NVFP4_DEFAULT_CFG+{name}"
        )
    return Recipe(name, rules, f"ModelOpt's {name}.", kv_cache)


def _preset(name: str) -> Mapping[str, Any]:
    if name not in modelopt_config().choices:
        known = ", ".join(sorted(modelopt_config().choices))
        raise RecipeError(f"ModelOpt has no preset {name!r}; it has {known}")
    preset: Mapping[str, Any] = getattr(modelopt_config(), name)
    return preset


def _raw_entries(name: str) -> list[Any]:
    return list(modelopt_config().normalize_quant_cfg_list(_preset(name)["quant_cfg"]))


def _algorithm(preset: Mapping[str, Any], where: str) -> tuple[str, float | None]:
    """Return the algorithm that ours calls so, and its alpha where it has one."""
    algorithm = preset.get("algorithm")
    if algorithm in _MAX:
        return "max", None
    if algorithm == _SWEEP:
        return "mse", None
    if algorithm == _FOUR_OVER_SIX:
        return "four_over_six", None
    stated: Mapping[str, Any]
    stated = {"method": algorithm} if isinstance(algorithm, str) else algorithm or {}
    method = str(stated.get("method"))
    if method in _AWQ and stated.keys() <= {"method", "alpha_step"}:
        return _AWQ[method], None
    if method == "smoothquant" and stated.keys() <= {"method", "alpha"}:
        return method, float(stated.get("alpha", _SMOOTHQUANT_ALPHA))
    raise RecipeError(
        f"{where}: algorithm {algorithm!r} is not supported, only max, mse, four_over_six, awq and "
        "smoothquant are"
    )


def _kv_cache(raw: Sequence[Any], where: str) -> str:
    """Return the format that the last entry for keys and values names."""
    found = ""
    for entry in raw:
        if entry.quantizer_name == _KV_CACHE and entry.enable:
            found = _kv_format(entry.cfg, where)
    return found


def _kv_format(cfg: Any, where: str) -> str:
    attributes = _set_values(cfg, where)
    for name, known in _KV_CACHES.items():
        if attributes == known:
            return name
    raise RecipeError(f"{where}: a KV cache of {attributes} is not supported; take one of FP8")


def _read(entry: Any, where: str) -> _Entry | None:
    """Read the entry in terms of modules; None for one that no rule decides on."""
    name = entry.quantizer_name
    side = next((s for s in _SIDES if name.endswith(s)), None)
    if not entry.enable:
        return _read_disabled(name, side, entry.parent_class, where)
    if name == _KV_CACHE:
        return None
    # A glob such as *proj_weight_quantizer names quantizers that a linear does not have.
    stem = name.removesuffix(side) if side else ""
    if entry.parent_class or not side or stem[-1:] not in ("*", "."):
        raise RecipeError(
            f"{where}: quantizers {name} are not supported, only those of linears and {_KV_CACHE}"
        )
    fmt = _format(entry.cfg, _SIDES[side], f"{where}, {name}")
    return _Entry((stem.removesuffix("."),), (_SIDES[side],), fmt)


def _read_disabled(
    name: str, side: str | None, parent_class: str | None, where: str
) -> _Entry | None:
    if parent_class and "Linear" in parent_class:
        raise RecipeError(
            f"{where}: entries for the class {parent_class} are not supported; write a recipe"
        )
    if parent_class or (not side and name.endswith("quantizer")):
        return None  # norms, embeddings, outputs, attention: never quantized
    if side:
        return _Entry((name.removesuffix(side).removesuffix("."),), (_SIDES[side],), None)
    # A glob on quantizers that ends in ".*" matches those of the module named before it.
    patterns = (name.removesuffix(".*"), name) if name.endswith(".*") else (name,)
    return _Entry(patterns, tuple(_SIDES.values()), None)


def _format(cfg: Any, side: str, where: str) -> Format:
    if isinstance(cfg, list | tuple) and len(cfg) == 2 and side == "weights":
        # INT4 whose group scales are such that FP8 kernels can multiply it
        first, second = cfg
        if _set_values(second, where) == {"num_bits": (4, 3)}:
            cfg = first
    attributes = _set_values(cfg, where)
    for name, of_side, known in _FORMATS:
        if attributes == known and of_side in ("", side):
            return get_format(name)
    blocks = attributes.get("block_sizes") or {}
    group = {"num_bits": 4, "block_sizes": {-1: blocks.get(-1), "type": "static"}}
    if attributes == group and side == "weights":
        return checked_format("int4", blocks[-1], where)
    raise RecipeError(f"{where}: this number format is not supported: {attributes}")


def _set_values(cfg: Any, where: str) -> dict[str, Any]:
    """Return the attributes that are not ModelOpt's defaults."""
    if not isinstance(cfg, modelopt_config().QuantizerAttributeConfig):
        raise RecipeError(
            f"{where}: this number format is not supported (several in sequence, or none): {cfg!r}"
        )
    defaults = modelopt_config().QuantizerAttributeConfig().model_dump()
    # effective_bits only feeds ModelOpt's search for mixed precision.
    defaults["effective_bits"] = cfg.effective_bits
    return {k: v for k, v in cfg.model_dump().items() if v != defaults[k]}


def _rules(entries: Sequence[_Entry], algorithm: str, where: str) -> tuple[Rule, ...]:
    """Turn the order round: the last match wins in a preset, and the first one in a recipe."""
    merged = _merge_sides(entries, algorithm, where)[::-1]
    rules = []
    for _, same in groupby(merged, key=lambda rule: (rule.weights, rule.inputs)):
        group = list(same)
        patterns = tuple(p for rule in reversed(group) for p in rule.patterns)
        rules.append(replace(group[0], patterns=patterns))
        if "*" in patterns:
            break  # nothing is left for the rules that follow
    return tuple(rules)


def _merge_sides(entries: Sequence[_Entry], algorithm: str, where: str) -> list[Rule]:
    """Make one rule of adjacent entries on the same modules, in the preset's order."""
    rules: list[Rule] = []
    for patterns, group in groupby(entries, key=lambda e: e.patterns):
        formats = {side: e.format for e in group for side in e.sides}
        for side in _SIDES.values():
            inherits = side not in formats and any(getattr(r, side) for r in rules)
            if inherits:
                raise RecipeError(
                    f"{where}: {patterns[0]} changes only weights or only inputs; write a recipe"
                )
        weights, inputs = formats.get("weights"), formats.get("inputs")
        if weights is not None:
            rules.append(_rule(patterns, weights, inputs, algorithm, where))
        elif inputs is None:
            rules.append(Rule(patterns=patterns, optional=True))
        else:
            raise RecipeError(f"{where}: quantizes the inputs of {patterns[0]} but not its weights")
    return rules


def _rule(
    patterns: tuple[str, ...], weights: Format, inputs: Format | None, algorithm: str, where: str
) -> Rule:
    if weights.name == "int8" and inputs is None:  # one scale per row: a group as long as the row
        weights = get_format("int8_group", CHANNEL)
    return checked_rule(patterns, weights, inputs, where, algorithm)
