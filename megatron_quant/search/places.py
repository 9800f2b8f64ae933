"""Find the places of a model, and what each candidate does there."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from megatron_quant.ckpt.dialects import StorageSchemes, layer_of
from megatron_quant.errors import RecipeError
from megatron_quant.models import Param, text_config, whole
from megatron_quant.recipes import OUTPUT, Decision, QuantPlan, Rule
from megatron_quant.search.cache_place import cache_place
from megatron_quant.search.names import NONE
from megatron_quant.search.problem import Option, Place, Problem

_SHARED = re.compile(r"(.*\.shared_(?:experts?|mlp))\..*")
_LAYER = re.compile(r".*?\blayers\.\d+\.")
_TOPK = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k"),
    *("moe_top_k", "experts_per_token"),
)
"""Keys of config.json for the number of experts that a token is sent to."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is searched.

    Attributes:
        params: Its logical parameters.
        config: Content of its config.json.
        schemes: How the export stores its tensors.
        keep: fnmatch patterns of Hugging Face or Megatron modules that stay unquantized.
    """

    params: Sequence[Param]
    config: Mapping[str, Any]
    schemes: StorageSchemes
    keep: tuple[str, ...] = ()


def find_problem(
    model: Model, plans: Mapping[str, QuantPlan], kv_cache: str = "", context: int | None = None
) -> Problem:
    """Return the places of a model, with the options that the candidates' plans give.

    Args:
        model: The model.
        plans: Candidate -> its recipe, resolved for the model's parameters.
        kv_cache: That of the found recipe, where the cache is no place.
        context: Tokens in the KV cache, which makes it a place.

    Raises:
        RecipeError: For a candidate that treats the weights of a place differently, and for a
            pattern to keep that matches nothing.
        FormatError: For a weight that a candidate's format cannot store.
    """
    found: dict[str, list[Param]] = {}
    decisions = {name: plan.by_name for name, plan in plans.items()}
    left: list[str] = []
    for param in model.params:
        if any(d[param.name].quantized for d in decisions.values()):
            found.setdefault(_key(param), []).append(param)
        else:
            slot = next(iter(decisions.values()))[param.name].slot
            left += slot.sources if not slot.fixed else ()
    _add_mates(model.params, found, left)
    _check_keep(model, found)
    places = tuple(_place(model, params, decisions) for params in found.values())
    if context is not None:
        cache = cache_place(model.params, model.config, model.schemes, plans, context)
        places, kv_cache = (*places, cache), ""
    return Problem(places=places, candidates=(*plans, NONE), left=tuple(left), kv_cache=kv_cache)


def _key(param: Param) -> str:
    """Name the set of parameters that share a treatment."""
    if param.expert is not None:
        return param.name.partition(".experts.")[0] + ".experts"
    shared = _SHARED.fullmatch(param.sources[0].module)
    return shared[1] if shared else param.fused or param.name


def _add_mates(params: Sequence[Param], found: dict[str, list[Param]], left: list[str]) -> None:
    """Put weights that no candidate quantizes beside those that they share a place with."""
    by_module = {s.module: p for p in params for s in p.sources if s.name.endswith(".weight")}
    for module in list(left):
        param = by_module.get(module)
        if param is not None and _key(param) in found:
            left.remove(module)
            if param not in found[_key(param)]:
                found[_key(param)].append(param)


def _check_keep(model: Model, found: Mapping[str, Sequence[Param]]) -> None:
    names = [name for params in found.values() for p in params for name in _names(p)]
    for pattern in model.keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(
                f"--auto-quantize-keep {pattern!r} matches no weight that a format would quantize: "
                "correct it or leave it out"
            )


def _names(param: Param) -> Iterator[str]:
    yield param.module
    yield from (source.module for source in param.sources)


def _place(
    model: Model, params: Sequence[Param], decisions: Mapping[str, Mapping[str, Decision]]
) -> Place:
    modules = tuple(source.module for p in params for source in p.sources)
    experts = {p.expert for p in params if p.expert is not None}
    kept = any(fnmatchcase(n, k) for k in model.keep for p in params for n in _names(p))
    rules: dict[Rule, list[str]] = {}
    for name, of in decisions.items() if not kept else ():
        rules.setdefault(_rule(name, [of[p.name] for p in params]), []).append(name)
    rules.setdefault(Rule(patterns=()), []).append(NONE)
    options = tuple(
        Option(candidates=tuple(names), rule=rule, nbytes=_nbytes(model.schemes, params, rule))
        for rule, names in rules.items()
    )
    name = _name(modules)
    return Place(
        name=name,
        family=_LAYER.sub("", name),
        modules=modules,
        output=any(d[params[0].name].slot.fixed == OUTPUT for d in decisions.values()),
        elements=sum(p.shape[0] * p.shape[1] for p in params),
        active=min(_topk(model.config), len(experts)) if experts else 1,
        stored=len(experts) or 1,
        options=options,
    )


def _rule(candidate: str, decisions: Sequence[Decision]) -> Rule:
    """Return the one treatment of a place; RecipeError if its weights have several."""
    rules = {d.slot.sources[0]: _treatment(d) for d in decisions}
    first, *others = rules
    for other in others:
        if rules[other] != rules[first]:
            raise RecipeError(
                f"--auto-quantize-formats {candidate}: {first} is {rules[first].action} but "
                f"{other} is {rules[other].action}, and both are one place: take a recipe that "
                "treats them alike"
            )
    return rules[first]


def _treatment(d: Decision) -> Rule:
    return Rule(
        patterns=(),
        weights=d.weights,
        inputs=d.inputs,
        algorithm=d.algorithm if d.quantized else "max",
        damp=d.damp,
        alpha=d.alpha,
        allow_output=d.quantized and d.slot.fixed == OUTPUT,
    )


def _nbytes(schemes: StorageSchemes, params: Sequence[Param], rule: Rule) -> int:
    total = 0
    for source in (source for p in params for source in p.sources):
        scheme = schemes.plain(source.name)
        if rule.weights is not None:
            scheme = schemes.of(rule.weights, rule.inputs, layer_of(source.module))
            scheme.check_shape(source)
        total += scheme.nbytes(source.shape, whole(source.shape))
    return total


def _name(modules: Sequence[str]) -> str:
    """Name a place: ``...self_attn.q_proj+k_proj+v_proj``, ``...mlp.experts``."""
    if ".experts." in modules[0]:
        return modules[0].partition(".experts.")[0] + ".experts"
    if shared := _SHARED.fullmatch(modules[0]):
        return shared[1]
    parent = modules[0].rpartition(".")[0]
    leaves = [m.removeprefix(f"{parent}.") for m in modules]
    return "+".join((modules[0], *leaves[1:]))


def _topk(config: Mapping[str, Any]) -> int:
    text = text_config(config)
    found = (text.get(key) for key in _TOPK)
    return next((n for n in found if isinstance(n, int) and n > 0), 1 << 30)
