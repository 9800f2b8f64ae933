"""The facts of a run, as values: what the JSON file holds and the page draws."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One Hugging Face tensor that the recipe decided on.

    Attributes:
        name: Its Hugging Face name.
        slot: Name of the logical weight that holds it, the key of amaxes and tokens.
        family: Kind of weight, alike in all layers and experts (``mlp.experts.down_proj``).
        layer: Global index of its layer; None where it is in none.
        expert: Index of its expert; None where it is in none.
        rule: Label of the rule that decided on it, or the reason that no rule can.
        format: Format of the stored weight; empty where it is left as it is.
        inputs: Format of the inputs; empty where they are not quantized.
        elements: Number of its elements.
        before: Bytes unquantized.
        after: Bytes in the export, scales included; None without an export.
        error: ||w - decoded|| / ||w|| of the verified export; None where it was not compared.
    """

    name: str
    slot: str
    family: str
    layer: int | None
    expert: int | None
    rule: str
    format: str
    inputs: str
    elements: int
    before: int
    after: int | None
    error: float | None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A row of the coverage audit.

    Attributes:
        rule: Label of the rule, or the reason that no rule can decide.
        action: Formats that it gives, or ``exclude``.
        weights: Number of logical weights that it decided on.
        patterns: Pattern -> number of those weights that it matches.
    """

    rule: str
    action: str
    weights: int
    patterns: Mapping[str, int]


@dataclass(frozen=True)
class Quality:
    """Figures on a text.

    Attributes:
        perplexity: exp of the mean negative log likelihood per token.
        kl: Mean KL to the unquantized model per token, in nats; None without one.
        tokens: Number of predicted tokens.
    """

    perplexity: float
    kl: float | None
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The facts of ``quantize``.

    Attributes:
        recipe: Name of the recipe.
        description: Line that the recipe says about itself; may be empty.
        dialect: Dialect of the export; empty without one.
        dtype: Dtype of what is left as it is.
        ranks: Number of ranks that did the work.
        bytes_before: Bytes of all weights unquantized; None without an export.
        bytes_after: Bytes of all weights in the export.
        seconds: Seconds by phase, in order.
        coverage: The coverage audit.
        weights: All tensors that the recipe decided on, in the order of the model.
        weight_amax: Largest magnitude of each logical weight that needs one.
        input_amax: Largest input of each logical weight whose inputs were measured.
        kv_amax: Largest keys and values, if the KV cache was calibrated.
        expert_tokens: Tokens that an expert was given, by logical weight; empty if not counted.
        cold_experts: Logical weights of experts that saw no token.
        left_out: What the source has and the export lacks, a line each.
        verified: Number of tensors that were read back; None if the export was not verified.
        fake_quant: The fake-quantized model on a text; None without one.
    """

    recipe: str
    description: str
    dialect: str
    dtype: str
    ranks: int
    bytes_before: int | None
    bytes_after: int | None
    seconds: Mapping[str, float]
    coverage: tuple[Rule, ...]
    weights: tuple[Weight, ...]
    weight_amax: Mapping[str, float]
    input_amax: Mapping[str, float]
    kv_amax: Mapping[str, float] = field(default_factory=dict)
    expert_tokens: Mapping[str, int] = field(default_factory=dict)
    cold_experts: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    verified: int | None = None
    fake_quant: Quality | None = None


@dataclass(frozen=True, kw_only=True)
class Option:
    """One treatment of a place.

    Attributes:
        format: Formats of weights and inputs; ``none`` leaves the place as it is.
        candidates: Candidates that treat the place so.
        bits: Bits a weight of the place, scales included.
        score: What it is expected to lose; less is better.
        chosen: Whether it was chosen.
    """

    format: str
    candidates: tuple[str, ...]
    bits: float
    score: float
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Place:
    """Weights that have one treatment.

    Attributes:
        name: Its name.
        family: Kind of place, alike in all layers.
        weights: Number of its weights.
        share: Part of it that a token meets.
        options: All treatments that could be chosen.
    """

    name: str
    family: str
    weights: int
    share: float
    options: tuple[Option, ...]

    @property
    def layer(self) -> int | None:
        """Return the index of its layer; None where it is in none."""
        found = _NUMBER.search(self.name) if self.name != self.family else None
        return int(found[1]) if found else None

    @property
    def chosen(self) -> Option:
        """Return the treatment that was chosen."""
        return next(option for option in self.options if option.chosen)


@dataclass(frozen=True)
class Point:
    """A recipe by its bits a weight and the sum of its scores."""

    bits: float
    score: float


@dataclass(frozen=True)
class Excluded:
    """A module that a search leaves as it is, and why."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Search:
    """The facts of a search for mixed precision; docs/auto_quantize.md describes them.

    Attributes:
        version: Version of their form.
        method: How it scored (``gradient``, ``kl_div``).
        unit: What scores are, in words.
        cost: How bits are counted (``weight``, ``active``).
        candidates: Names; ``none`` is the last.
        bound: Most bits a weight that were allowed.
        bits: Bits a weight of the choice.
        score: Sum of the scores of the choice.
        places: The places, in the order of the model.
        frontier: The best choices for rising bits.
        excluded: Modules that it leaves as they are.
    """

    version: int
    method: str
    unit: str
    cost: str
    candidates: tuple[str, ...]
    bound: float
    bits: float
    score: float
    places: tuple[Place, ...]
    frontier: tuple[Point, ...]
    excluded: tuple[Excluded, ...]


def search_of(document: Mapping[str, Any]) -> Search:
    """Return the facts of a search of what it says about itself as JSON."""
    places = (
        place | {"options": tuple(Option(**option) for option in place["options"])}
        for place in document["places"]
    )
    inner = {
        "candidates": tuple(document["candidates"]),
        "places": tuple(Place(**place) for place in places),
        "frontier": tuple(Point(**point) for point in document["frontier"]),
        "excluded": tuple(Excluded(**one) for one in document["excluded"]),
    }
    return Search(**{**document, **inner})


@dataclass(frozen=True, kw_only=True)
class FamilyLoss:
    """The loss of a family of weights in a format, everything else unquantized.

    Attributes:
        family: Its name.
        format: The recipe that it is quantized by, or the form of the KV cache.
        weights: Number of its weights that are quantized; 0 for the cache.
        bits: Bits of each, scales included.
        kl: Mean KL divergence of a token from the unquantized model, in nats.
    """

    family: str
    format: str
    weights: int
    bits: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The facts of ``sensitivity``.

    Attributes:
        version: Version of their form.
        tokens: Number of tokens that were run.
        rows: Families in every format that changes them.
        left_out: What was not measured, and why, a line each.
    """

    version: int
    tokens: int
    rows: tuple[FamilyLoss, ...]
    left_out: tuple[str, ...]


def sensitivity_of(document: Mapping[str, Any]) -> Sensitivity:
    """Return the facts of a measurement of families of what it says about itself as JSON."""
    rows = tuple(FamilyLoss(**row) for row in document["rows"])
    return Sensitivity(**{**document, "rows": rows, "left_out": tuple(document["left_out"])})


@dataclass(frozen=True, kw_only=True)
class Part:
    """Figures of a part of a text's tokens.

    Attributes:
        label: The part: positions in a window, or a class of tokens.
        tokens: Number of predicted tokens.
        perplexity: That of these tokens.
        kl: Mean KL of these tokens, in nats; None without a reference.
    """

    label: str
    tokens: int
    perplexity: float
    kl: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The facts of ``eval``.

    Attributes:
        quality: Figures of all tokens.
        text: The text's path.
        against: Path of the reference; empty without one.
        seq_length: Tokens of a window.
        positions: Figures by position in the window, in order.
        classes: Figures by class of the predicted token.
    """

    quality: Quality
    text: str
    against: str
    seq_length: int
    positions: tuple[Part, ...]
    classes: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is known of a run.

    Attributes:
        command: The verb: ``quantize``, ``search``, ``sensitivity`` or ``eval``.
        model: Name or path of the model; for ``search`` the directory of scores.
        version: Version of megatron_quant.
        quantized: Facts of ``quantize``.
        search: Facts of a search.
        sensitivity: Facts of ``sensitivity``.
        evaluation: Facts of ``eval``.
    """

    command: str
    model: str
    version: str
    quantized: Quantized | None = None
    search: Search | None = None
    sensitivity: Sensitivity | None = None
    evaluation: Evaluation | None = None

    def document(self) -> dict[str, Any]:
        """Return the facts as JSON has them; a number that is not finite becomes null."""
        head = {"command": self.command, "model": self.model, "version": self.version}
        found: dict[str, Any] = head | (asdict(self.quantized) if self.quantized else {})
        if self.search is not None:
            found["search"] = asdict(self.search)
        if self.sensitivity is not None:
            found["sensitivity"] = asdict(self.sensitivity)
        if self.evaluation is not None:
            own = asdict(self.evaluation)
            found |= own.pop("quality") | own
        clean: dict[str, Any] = _finite(found)
        return clean


def _finite(value: Any) -> Any:
    """Return a JSON value without NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value
