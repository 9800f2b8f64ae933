"""Slots and the plan: which logical weight is quantized, how, and by which rule."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_quant.formats import Format
from megatron_quant.recipes.schema import FOLDING, ROUNDING

_BY_INPUTS = ("imatrix", ROUNDING, "awq")
"""Algorithms whose searches for scales weigh columns by their inputs."""
_COARSE_BITS = 4
"""Inputs of so many bits lose so much that weights are rounded for what is left of them."""
OUTPUT = "output"
""":attr:`Slot.fixed` of the output layer, which a rule may name all the same."""
DRAFT = "linear of token prediction"
""":attr:`Slot.fixed` of linears in layers for speculation, which a rule may be allowed to take."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One logical weight that a recipe decides on; equal on every rank and at every layout.

    Attributes:
        name: Global Megatron parameter name (``decoder.layers.0.mlp.experts.linear_fc1.weight5``).
        sources: Hugging Face module names that are fused in it (``model.layers.0...gate_proj``,
            ...). One format serves them all.
        shape: [N, K] of the fused weight.
        fixed: Why rules leave the weight alone (``"router"``, ``"norm"``, ...); empty for a
            linear.
        expert: Global index of the routed expert; None for a weight that every token meets.
        fused: Name of the linear that engines make of several slots, which then share formats and
            scales; empty for a slot that they leave alone.
        called: Names of modules that engines give to its sources where they have others; a config
            states both.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    fixed: str = ""
    expert: int | None = None
    fused: str = ""
    called: tuple[str, ...] = ()

    @property
    def sharing(self) -> str:
        """Return the name of the slots with one scale (experts may still have their own)."""
        return self.fused or self.module

    @property
    def module(self) -> str:
        """Return the global Megatron module name."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The treatment of a slot: quantized (``weights`` is a format) or left alone.

    Attributes:
        slot: The weight.
        rule: Label of the rule, as the coverage audit prints it.
        weights: Format of the weight; None to leave it alone.
        inputs: Format of the activations that the weight multiplies; None for weight-only.
        algorithm: How the weight is quantized, one of ``schema.ALGORITHMS``.
        damp: That of algorithm gptq; the format's default where None.
        alpha: That of algorithms awq and smoothquant; None for their default.
        carried: Whether the weight stays as the source has it, codes and scales.
    """

    slot: Slot
    rule: str
    weights: Format | None = None
    inputs: Format | None = None
    algorithm: str = "max"
    damp: float | None = None
    alpha: float | None = None
    carried: bool = False

    @property
    def treatment(self) -> tuple[object, ...]:
        """Return all that decides on the weight's bytes."""
        return self.weights, self.inputs, self.algorithm, self.damp, self.alpha

    @property
    def quantized(self) -> bool:
        """Return whether the weight is stored in a quantized format."""
        return self.weights is not None

    @property
    def search(self) -> str:
        """Return the search that chooses scales, a key of ``formats.MULTIPLIERS``; or empty."""
        name = "mse" if self.algorithm in _BY_INPUTS else self.algorithm
        searched = self.weights is not None and name in self.weights.algorithms
        return name if searched and name in ("mse", "four_over_six") else ""

    @property
    def searches_tensor(self) -> bool:
        """Return whether a search chooses the scale of a tensor that has no blocks."""
        return bool(self.search) and not self._has_blocks

    @property
    def searches_blocks(self) -> bool:
        """Return whether a search chooses the scale of each block."""
        return bool(self.search) and self._has_blocks

    @property
    def weighted(self) -> bool:
        """Return whether that search weighs each column by the squares of its inputs."""
        by_inputs = self.algorithm in _BY_INPUTS
        return by_inputs and self.weights is not None and "imatrix" in self.weights.algorithms

    @property
    def rounds(self) -> bool:
        """Return whether codes are chosen by the second moment of the inputs (gptq)."""
        return self.algorithm == ROUNDING

    @property
    def serves_codes(self) -> bool:
        """Return whether it is rounded for inputs in 4 bits, not for the inputs themselves."""
        return self.rounds and self.inputs is not None and self.inputs.bits <= _COARSE_BITS

    @property
    def folds(self) -> bool:
        """Return whether factors of its inputs move into it first (awq, smoothquant)."""
        return self.algorithm in FOLDING

    @property
    def needs_squares(self) -> bool:
        """Return whether it is quantized by the squares of its inputs' channels, or products."""
        return self.weighted or self.rounds or self.algorithm == "awq"

    @property
    def needs_peaks(self) -> bool:
        """Return whether it is quantized by the largest magnitudes of its inputs' channels."""
        return self.folds and (self.static or self.algorithm == "smoothquant")

    @property
    def needs_channels(self) -> bool:
        """Return whether calibration data must show each channel of the inputs."""
        return self.quantized and (self.needs_squares or self.needs_peaks)

    @property
    def measured(self) -> bool:
        """Return whether calibration data must show the inputs."""
        return self.quantized and not self.carried and (self.static or self.needs_channels)

    @property
    def static(self) -> bool:
        """Return whether the inputs have a scale that calibration finds."""
        return self.inputs is not None and self.inputs.tensor_scale

    @property
    def keeps_blocks(self) -> bool:
        """Return whether blocks keep the statistics that calibration found, whatever the weight."""
        return (self.searches_blocks or self.rounds) and self._has_blocks

    @property
    def _has_blocks(self) -> bool:
        return self.weights is not None and self.weights.stat_block is not None


def left_alone(slot: Slot) -> Decision:
    """Return the decision on a fixed slot that no rule takes."""
    why = "stays as it is" if slot.fixed == DRAFT else "never quantized"
    return Decision(slot=slot, rule=f"{slot.fixed}: {why}")


@dataclass(frozen=True)
class QuantPlan:
    """Every slot's decision, in the order of the model's parameters.

    Attributes:
        recipe: Name of the recipe.
        decisions: One decision a slot.
        kv_cache: How engines store keys and values, one of ``schema.KV_CACHES``; empty to leave
            them alone.
    """

    recipe: str
    decisions: tuple[Decision, ...]
    kv_cache: str = ""

    def beside(self, slots: Iterable[Slot]) -> "QuantPlan":
        """Return the plan of a model that has these fixed slots too."""
        return replace(self, decisions=(*self.decisions, *map(left_alone, slots)))

    @cached_property
    def by_name(self) -> dict[str, Decision]:
        """Map slot name to decision."""
        return {d.slot.name: d for d in self.decisions}

    @property
    def quantized(self) -> tuple[Decision, ...]:
        """Return the decisions that quantize."""
        return tuple(d for d in self.decisions if d.quantized)

    @property
    def needs_data(self) -> bool:
        """Return whether anything about inputs, keys or values is found by running data."""
        return bool(self.measured) or self.kv_cache == "fp8"

    @property
    def measured(self) -> tuple[Decision, ...]:
        """Return the decisions on weights whose inputs calibration data must show."""
        return tuple(d for d in self.decisions if d.measured)

    @property
    def weighs_inputs(self) -> bool:
        """Return whether weights are quantized by statistics of each channel of their inputs."""
        return any(d.needs_channels for d in self.quantized)

    @property
    def folds(self) -> bool:
        """Return whether factors are folded into weights (awq, smoothquant)."""
        return any(d.folds for d in self.quantized)


def difference(a: QuantPlan, b: QuantPlan) -> str:
    """Return the first slot that two plans of one model treat differently; empty for none."""
    if a.kv_cache != b.kv_cache:
        return "the KV cache"
    for x, y in zip(a.decisions, b.decisions, strict=True):
        if x.treatment != y.treatment:
            return x.slot.name
    return ""
