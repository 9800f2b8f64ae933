"""The KV cache as a place: engines hold all of it in one format, so it is one for the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_quant.ckpt.dialects import StorageSchemes
from megatron_quant.errors import RecipeError
from megatron_quant.models import Param, Source, text_config
from megatron_quant.recipes import QuantPlan, Rule, cache_slots
from megatron_quant.search.names import KV_CACHE, NONE
from megatron_quant.search.problem import Option, Place

_KEYS, _VALUES = ".k_proj.weight", ".v_proj.weight"


def cache_place(
    params: Sequence[Param],
    config: Mapping[str, Any],
    schemes: StorageSchemes,
    plans: Mapping[str, QuantPlan],
    context: int,
) -> Place:
    """Return the place of the KV cache, whose options are those of the candidates, and none.

    An option costs what a token reads: keys and values of all tokens before it, in every layer; in
    a layer whose attention slides, those of its window. FP8 is a byte a value; its scales are two
    numbers a layer, and do not count.

    Args:
        params: The model's logical parameters.
        config: Content of its config.json.
        schemes: How unquantized tensors are stored; the unquantized cache has their dtype.
        plans: Candidate -> its recipe.
        context: Tokens that are cached.

    Raises:
        RecipeError: If no candidate quantizes the cache, or the model caches no keys and values as
            they are.
    """
    by_cache: dict[str, list[str]] = {}
    for name, plan in plans.items():
        if plan.kv_cache:
            by_cache.setdefault(plan.kv_cache, []).append(name)
    if not by_cache:
        raise RecipeError(
            "--auto-quantize-context-length is for candidates that quantize the KV cache, and none "
            "does: add kv_cache to a recipe or --export-kv-cache-quant, or leave it out"
        )
    quantizing = next(plan for plan in plans.values() if plan.kv_cache)
    attentions = {slot.attention for slot in cache_slots(quantizing)}
    keys = [(p, s) for p in params for s in p.sources if s.name.removesuffix(_KEYS) in attentions]
    cached = sum(_width(s, params) * _tokens(p, config, context) for p, s in keys)
    if not cached:
        raise RecipeError(
            "--auto-quantize-context-length: the model caches no keys and values as they are, so "
            "its cache is no place; leave it out"
        )
    (plain,) = schemes.plain(keys[0][1].name).stored
    off = [name for name, plan in plans.items() if not plan.kv_cache]
    quantized = (
        Option(candidates=tuple(names), rule=Rule(patterns=()), nbytes=cached, kv_cache=cache)
        for cache, names in by_cache.items()
    )
    as_it_is = Option(
        candidates=(*off, NONE), rule=Rule(patterns=()), nbytes=cached * plain.dtype.itemsize
    )
    return Place(
        name=KV_CACHE,
        family=KV_CACHE,
        modules=(),
        output=False,
        elements=0,
        active=1,
        stored=1,
        options=(*quantized, as_it_is),
        cached=cached,
    )


def _width(source: Source, params: Sequence[Param]) -> int:
    """Return the cached values a token of one attention: rows of its keys' and values' weights."""
    name = source.name.removesuffix(_KEYS) + _VALUES
    values = (s.shape[0] for p in params for s in p.sources if s.name == name)
    return source.shape[0] + next(values, source.shape[0])  # some share one weight for both


def _tokens(param: Param, config: Mapping[str, Any], context: int) -> int:
    """Return how many tokens a layer's attention sees of ``context``."""
    text = text_config(config)
    kinds, window = text.get("layer_types"), text.get("sliding_window")
    if param.layer is None or not isinstance(kinds, list) or type(window) is not int:
        return context
    slides = param.layer < len(kinds) and kinds[param.layer] == "sliding_attention"
    return min(context, window) if slides else context
