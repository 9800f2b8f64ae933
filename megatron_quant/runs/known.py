"""List the values that arguments may have. Nothing here imports torch."""

from dataclasses import dataclass, fields

from megatron_quant.ckpt.dialects import DIALECT_NAMES
from megatron_quant.engines import ENGINES
from megatron_quant.recipes import EXPERT_SCALES, KV_CACHES, family_recipe_names, recipe_names
from megatron_quant.runs.options import DTYPES, QuantizeOptions
from megatron_quant.search import COSTS, METHODS


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Values of the arguments that are one of a few names.

    Attributes:
        recipes: Shipped recipes; a YAML path or a ModelOpt preset works too.
        formats: Values of ``format``: who can read an export.
        engines: Values of ``Serve.engine``.
        dtypes: Values of ``dtype``.
        expert_scales: Values of ``expert_scales``; the first is the default.
        kv_caches: Values of ``export_kv_cache_quant``.
        search_methods: Values of ``AutoQuantize.method``.
        search_costs: Values of ``AutoQuantize.cost``.
        flags: Flags of ``quantize`` that are given by name.
    """

    recipes: tuple[str, ...]
    formats: tuple[str, ...]
    engines: tuple[str, ...]
    dtypes: tuple[str, ...]
    expert_scales: tuple[str, ...]
    kv_caches: tuple[str, ...]
    search_methods: tuple[str, ...]
    search_costs: tuple[str, ...]
    flags: tuple[str, ...]


_ARGUMENTS = (
    *("hf_model_id", "export_quant_cfg", "export_dir", "export_format"),
    *("parallel", "calibration", "serve", "write", "auto"),
)
"""Fields that are arguments of the front door, mostly under another name."""


def choices() -> Choices:
    """List the recipes, formats, engines and other names to choose from."""
    return Choices(
        recipes=(*recipe_names(), *family_recipe_names()),
        formats=DIALECT_NAMES,
        engines=ENGINES,
        dtypes=DTYPES,
        expert_scales=EXPERT_SCALES,
        kv_caches=KV_CACHES,
        search_methods=METHODS,
        search_costs=COSTS,
        flags=tuple(f.name for f in fields(QuantizeOptions) if f.name not in _ARGUMENTS),
    )
