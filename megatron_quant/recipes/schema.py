"""The parts of a recipe: an ordered list of rules, each a set of patterns and their treatment."""

from dataclasses import dataclass, replace

from megatron_quant.errors import FormatError, RecipeError
from megatron_quant.formats import FORMATS, Format, get_format, with_signed_scales

SUPPORTED: dict[str, tuple[str | None, ...]] = {
    f.name: f.inputs for f in FORMATS.values() if f.inputs
}
"""Format of the weights -> formats that their inputs may have; None is weight-only."""
ALGORITHMS: dict[str, tuple[str, ...]] = {
    algorithm: tuple(f.name for f in FORMATS.values() if algorithm in f.algorithms)
    for algorithm in ("max", "mse", "imatrix", "four_over_six", "gptq", "awq", "smoothquant")
}
"""Algorithm that quantizes weights -> the formats that it serves. ``max``: the largest magnitude is
the largest code. ``mse``: the scale of least squared error. ``imatrix``: the same, each column
weighted by the squares of its inputs. ``four_over_six``: the largest magnitude of a block is code 6
or code 4, whichever errs less. ``gptq``: scales as ``imatrix``, or the nearest that the format
has; then each column makes up for the errors of the columns that were rounded before it. ``awq``,
``smoothquant``: inputs are divided, and columns of weights multiplied, by factors that are folded
into the weights before; then scales as ``imatrix``, or as ``max``."""
ROUNDING = "gptq"
"""Algorithm that chooses codes too; the others choose scales and round to the nearest."""
FOLDING = ("awq", "smoothquant")
"""Algorithms that move factors from inputs to weights first."""
EXPERT_SCALES = ("shared", "per_expert")
"""Sources of the weight amax for an expert's tensor scale; the first is the default."""
KV_CACHES = ("fp8", "fp8_cast")
"""``fp8``: scales from calibrated keys and values. ``fp8_cast``: scale 1, no calibration."""

_SHOWN_PATTERNS = 3


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a recipe: the weights that ``patterns`` match, and their formats.

    Attributes:
        patterns: fnmatch patterns, case-sensitive, on Hugging Face or Megatron module names.
        weights: Format of the weights; None excludes them from quantization.
        inputs: Format of the activations that they multiply; None for weight-only.
        optional: Whether the rule may claim nothing, as the catch-all lists of presets do.
        algorithm: How the weights are quantized, a key of :data:`ALGORITHMS`.
        damp: Part of the mean diagonal of the inputs' second moment that ``gptq`` adds to it; the
            format's default where None.
        alpha: How far ``awq`` and ``smoothquant`` move, from 0 (not at all) to 1; None for awq's
            search, and for 0.5 with smoothquant.
        allow_output: Whether it may quantize the output layer, which a pattern must then call by
            its own name (``lm_head``, ``*.lm_head``): no wildcard stands for it.
        allow_mtp: Whether it may quantize linears of layers for speculation too.
    """

    patterns: tuple[str, ...]
    weights: Format | None = None
    inputs: Format | None = None
    optional: bool = False
    algorithm: str = "max"
    damp: float | None = None
    alpha: float | None = None
    allow_output: bool = False
    allow_mtp: bool = False

    @property
    def action(self) -> str:
        """Return ``exclude``, or the formats: ``nvfp4`` (weight-only), ``nvfp4+nvfp4``."""
        if self.weights is None:
            return "exclude"
        inputs = f"+{self.inputs.name}" if self.inputs else ""
        signed = ", signed scales" if self.weights.signed else ""
        if self.algorithm == "max":
            return f"{self.weights.name}{inputs}" + (f" (max{signed})" if signed else "")
        damp = "" if self.damp is None else f", damp {self.damp:g}"
        alpha = "" if self.alpha is None else f", alpha {self.alpha:g}"
        return f"{self.weights.name}{inputs} ({self.algorithm}{signed}{damp}{alpha})"


@dataclass(frozen=True)
class Recipe:
    """Rules in order; the first one that matches a weight decides on it.

    Attributes:
        name: Name for messages and summaries.
        rules: The rules.
        description: One line for lists of recipes.
        kv_cache: One of :data:`KV_CACHES`; empty where keys and values stay as they are.
    """

    name: str
    rules: tuple[Rule, ...]
    description: str = ""
    kv_cache: str = ""

    @property
    def allows_mtp(self) -> bool:
        """Return whether a rule may quantize layers for speculation."""
        return any(rule.allow_mtp for rule in self.rules)

    def label(self, index: int) -> str:
        """Return the name of rule ``index`` (0-based) in messages and the coverage audit."""
        rule = self.rules[index]
        more = len(rule.patterns) - _SHOWN_PATTERNS
        shown = [*rule.patterns[:_SHOWN_PATTERNS], *([f"{more} more"] if more > 0 else [])]
        return f"rule {index + 1}: {rule.action} {', '.join(shown)}"


def weight_only(recipe: Recipe) -> Recipe:
    """Drop the input formats and the KV cache of a recipe, and with them calibration data.

    Raises:
        RecipeError: Where a rule's weights are run with quantized inputs only.
    """
    rules = (_without_inputs(recipe, i) for i in range(len(recipe.rules)))
    return replace(recipe, rules=tuple(rules), kv_cache="")


def _without_inputs(recipe: Recipe, index: int) -> Rule:
    rule = recipe.rules[index]
    if rule.weights is not None:
        where = f"recipe {recipe.name!r} with --weight-only, {recipe.label(index)}"
        checked_pair(rule.weights, None, where)
        checked_smoothing(rule.algorithm, None, where)
    return replace(rule, inputs=None)


def with_algorithm(recipe: Recipe, algorithm: str) -> Recipe:
    """Set ``algorithm`` in every rule that quantizes.

    Raises:
        RecipeError: For a rule whose format it does not serve.
    """
    rules = []
    for index, rule in enumerate(recipe.rules):
        if rule.weights is not None:
            where = f"recipe {recipe.name!r}, {recipe.label(index)}"
            checked_algorithm(algorithm, rule.weights, where)
            checked_smoothing(algorithm, rule.inputs, where)
            damp = rule.damp if algorithm == ROUNDING else None
            alpha = rule.alpha if algorithm == rule.algorithm else None
            rule = replace(rule, algorithm=algorithm, damp=damp, alpha=alpha)
        rules.append(rule)
    return replace(recipe, rules=tuple(rules))


def with_damp(recipe: Recipe, damp: float) -> Recipe:
    """Set ``damp`` in every rule with algorithm gptq.

    Raises:
        RecipeError: For a value out of range, and where no rule has that algorithm.
    """
    where = f"recipe {recipe.name!r} with --damp"
    if all(rule.algorithm != ROUNDING for rule in recipe.rules):
        raise RecipeError(f"{where}: damp belongs to algorithm {ROUNDING}, which no rule has")
    checked_damp(damp, ROUNDING, where)
    rules = (replace(r, damp=damp) if r.algorithm == ROUNDING else r for r in recipe.rules)
    return replace(recipe, rules=tuple(rules))


def with_alpha(recipe: Recipe, alpha: float) -> Recipe:
    """Set ``alpha`` in every rule with algorithm awq or smoothquant.

    Raises:
        RecipeError: For a value out of range, and where no rule has such an algorithm.
    """
    where = f"recipe {recipe.name!r} with --alpha"
    if all(rule.algorithm not in FOLDING for rule in recipe.rules):
        raise RecipeError(
            f"{where}: alpha belongs to algorithms {' and '.join(FOLDING)}, which no rule has"
        )
    checked_alpha(alpha, FOLDING[0], where)
    rules = (replace(r, alpha=alpha) if r.algorithm in FOLDING else r for r in recipe.rules)
    return replace(recipe, rules=tuple(rules))


def with_mtp(recipe: Recipe) -> Recipe:
    """Allow every rule that quantizes to take layers for speculation too."""
    rules = (replace(r, allow_mtp=True) if r.weights is not None else r for r in recipe.rules)
    return replace(recipe, rules=tuple(rules))


def with_kv_cache(recipe: Recipe, kv_cache: str) -> Recipe:
    """Set ``kv_cache`` to one of :data:`KV_CACHES`, or to ``none``.

    Raises:
        RecipeError: For another name.
    """
    name = "" if kv_cache == "none" else kv_cache
    return replace(recipe, kv_cache=checked_kv_cache(name, f"recipe {recipe.name!r}"))


def checked_rule(
    patterns: tuple[str, ...],
    weights: Format,
    inputs: Format | None,
    where: str,
    algorithm: str = "max",
    damp: float | None = None,
) -> Rule:
    """Return a rule that quantizes, after its checks.

    Args:
        patterns: fnmatch patterns on module names.
        weights: Format of the weights.
        inputs: Format of their inputs; None for weight-only.
        where: Place of the rule, for messages.
        algorithm: How the weights are quantized.
        damp: That of gptq.

    Raises:
        RecipeError: For a combination that is not supported.
    """
    checked_pair(weights, inputs, where)
    checked_algorithm(algorithm, weights, where)
    checked_smoothing(algorithm, inputs, where)
    checked_damp(damp, algorithm, where)
    return Rule(patterns=patterns, weights=weights, inputs=inputs, algorithm=algorithm, damp=damp)


def checked_pair(weights: Format, inputs: Format | None, where: str) -> None:
    """Raise RecipeError, which names ``where``, for a pair that is not :data:`SUPPORTED`."""
    name, given = weights.name, inputs.name if inputs else None
    if not weights.inputs:
        known = ", ".join(SUPPORTED)
        raise RecipeError(f"{where}: {name} is a format of inputs; weights may be {known}")
    if weights.signed and given:
        raise RecipeError(
            f"{where}: signed scales with {given} inputs, and kernels of quantized inputs take no "
            "scale below 0; leave inputs or scales out"
        )
    if given not in weights.inputs:
        known = " or ".join(f"{i or 'no'} inputs" for i in weights.inputs)
        way_out = "; weight-only INT8 is int8_group" if name == "int8" and not given else ""
        raise RecipeError(
            f"{where}: {name} weights with {given or 'no'} inputs; "
            f"{name} weights go with {known}{way_out}"
        )


def checked_scales(weights: Format, scales: object, where: str) -> Format:
    """Return ``weights`` with ``scales``, which must be ``signed``; RecipeError otherwise."""
    if scales != "signed":
        raise RecipeError(f"{where}: scales must be signed, or left out, got {scales!r}")
    try:
        return with_signed_scales(weights)
    except FormatError as e:
        raise RecipeError(f"{where}: {e}; leave scales out") from None


def checked_algorithm(algorithm: str, weights: Format, where: str) -> None:
    """Raise RecipeError, which names ``where``, for an algorithm that does not suit ``weights``."""
    if algorithm not in tuple(ALGORITHMS):
        known = ", ".join(ALGORITHMS)
        raise RecipeError(f"{where}: algorithm must be one of {known}, got {algorithm!r}")
    if algorithm not in weights.algorithms:
        suitable = ", ".join(ALGORITHMS[algorithm])
        raise RecipeError(
            f"{where}: algorithm {algorithm} does not search the scales of {weights.name}, only "
            f"of {suitable}"
        )


def checked_damp(damp: object, algorithm: str, where: str) -> None:
    """Raise RecipeError, which names ``where``, for a damp that ``algorithm`` does not take."""
    if damp is None:
        return
    if algorithm != ROUNDING:
        raise RecipeError(f"{where}: damp belongs to algorithm {ROUNDING}, not to {algorithm}")
    if not isinstance(damp, int | float) or isinstance(damp, bool) or not 0 < damp <= 1:
        raise RecipeError(
            f"{where}: damp must be above 0 and at most 1, got {damp!r}; it is the part of the "
            "mean diagonal that is added to it, such as 0.01 or 0.05"
        )


def checked_alpha(alpha: object, algorithm: str, where: str) -> None:
    """Raise RecipeError, which names ``where``, for an alpha that ``algorithm`` does not take."""
    if alpha is None:
        return
    if algorithm not in FOLDING:
        known = " and ".join(FOLDING)
        raise RecipeError(f"{where}: alpha belongs to algorithms {known}, not to {algorithm}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise RecipeError(
            f"{where}: alpha must be from 0 (nothing moves into the weights) to 1, got {alpha!r}"
        )


def checked_smoothing(algorithm: str, inputs: Format | None, where: str) -> None:
    """Raise RecipeError, which names ``where``, for smoothquant of inputs that stay as they are."""
    if algorithm == "smoothquant" and inputs is None:
        raise RecipeError(
            f"{where}: smoothquant makes inputs easier to quantize, and these are not quantized: "
            "take awq, or give inputs a format"
        )


def checked_kv_cache(name: str, where: str) -> str:
    """Return ``name``, empty or one of :data:`KV_CACHES`; raise RecipeError for another."""
    if name not in ("", *KV_CACHES):
        known = ", ".join(KV_CACHES)
        raise RecipeError(f"{where}: kv_cache must be one of {known}, got {name!r}")
    return name


def checked_format(name: str, group_size: int | None, where: str) -> Format:
    """Return ``get_format(name, group_size)``.

    Raise RecipeError, which names ``where``, instead.
    """
    try:
        return get_format(name, group_size)
    except FormatError as e:
        raise RecipeError(f"{where}: {e}") from None
