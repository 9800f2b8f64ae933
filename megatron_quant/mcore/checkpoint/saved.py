"""How a Megatron checkpoint says that it is quantized: one JSON document beside its tensors."""

import re
from dataclasses import dataclass
from typing import Any

from megatron_quant import __version__
from megatron_quant.errors import CheckpointError, RecipeError
from megatron_quant.mcore.checkpoint.torch_dist import TorchDist
from megatron_quant.recipes import EXPERT_SCALES, QuantPlan, Recipe, parse_recipe, to_document

HF_FILES = "hf"
"""Folder in the checkpoint with the model's config.json and its tokenizer files."""
_SCHEMA = 1
_APART = re.compile(r"\.experts\.\d+\.linear_fc\d\.weight_quantizer\._amax$")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint with quantizers.

    recipe: None if it was saved without this library, for example by ModelOpt.
    expert_scales: one of ``schema.EXPERT_SCALES``; its experts' weight amaxes are of this kind.
    source: digest of the Hugging Face checkpoint that was quantized; empty if it is not known.
    in_training: whether training goes on from it, which can find the ranges of inputs if it was
        saved before any input had one.
    """

    stored: TorchDist
    recipe: Recipe | None
    expert_scales: str
    source: str = ""
    in_training: bool = False


def describe_run(
    recipe: Recipe, plan: QuantPlan, expert_scales: str, source: str = ""
) -> dict[str, Any]:
    """Write the document that travels with the model; ``plan`` is the recipe resolved for it."""
    return {
        "schema": _SCHEMA,
        "version": __version__,
        "recipe": {"name": recipe.name, **to_document(recipe, plan)},
        "formats": sorted({d.weights.name for d in plan.quantized if d.weights}),
        "expert_scales": expert_scales,
        "source": source,
    }


def parse_description(stored: TorchDist, description: Any) -> Saved:
    """Parse the checkpoint's document; ``description`` is None if it has none.

    Raises CheckpointError for a document that this release cannot read.
    """
    if description is None:
        apart = any(map(_APART.search, stored.shapes))
        return Saved(stored=stored, recipe=None, expert_scales=EXPERT_SCALES[apart])
    try:
        schema, scales = description["schema"], description["expert_scales"]
        recipe = dict(description["recipe"])
        name = str(recipe.pop("name"))
    except (KeyError, TypeError, ValueError) as e:
        raise _unreadable(stored, f"it lacks {e}") from None
    if schema != _SCHEMA:
        version = description.get("version")
        raise _unreadable(stored, f"megatron_quant {version} wrote it, with schema {schema!r}")
    if scales not in EXPERT_SCALES:
        raise _unreadable(stored, f"expert_scales is {scales!r}")
    try:
        source = str(description.get("source", ""))
        parsed = parse_recipe(name, recipe)
        return Saved(stored=stored, recipe=parsed, expert_scales=scales, source=source)
    except RecipeError as e:
        raise _unreadable(stored, str(e)) from None


def _unreadable(stored: TorchDist, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{stored.path}: its description of the quantization cannot be read ({reason}): save the "
        f"model again, or use the release that wrote it; this one is {__version__}"
    )
