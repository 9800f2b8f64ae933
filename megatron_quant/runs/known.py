"""The words that arguments may be. Nothing here imports torch."""

from dataclasses import dataclass, fields

from megatron_quant.ckpt.dialects import DIALECT_NAMES
from megatron_quant.engines import ENGINES
from megatron_quant.recipes import EXPERT_SCALES, KV_CACHES, recipe_names
from megatron_quant.runs.options import DTYPES, QuantizeOptions


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Values of the arguments that name one of a few things.

    Attributes:
        recipes: Shipped recipes; a YAML path or a ModelOpt preset may stand in their place.
        formats: Values of ``format``: who can read an export.
        engines: Values of ``Serve.engine``.
        dtypes: Values of ``dtype``.
        expert_scales: Values of ``expert_scales``; the first is the default.
        kv_caches: Values of ``export_kv_cache_quant``.
        flags: Flags of ``quantize`` that are given by name.
    """

    recipes: tuple[str, ...]
    formats: tuple[str, ...]
    engines: tuple[str, ...]
    dtypes: tuple[str, ...]
    expert_scales: tuple[str, ...]
    kv_caches: tuple[str, ...]
    flags: tuple[str, ...]


_ARGUMENTS = (
    *("hf_model_id", "export_quant_cfg", "export_dir", "export_format"),
    *("parallel", "calibration", "serve", "write"),
)
"""Fields that are arguments of the front door, most of them under another name."""


def choices() -> Choices:
    """Return what recipes, formats, engines, ... there are to choose from."""
    return Choices(
        recipes=tuple(recipe_names()),
        formats=DIALECT_NAMES,
        engines=ENGINES,
        dtypes=DTYPES,
        expert_scales=EXPERT_SCALES,
        kv_caches=KV_CACHES,
        flags=tuple(f.name for f in fields(QuantizeOptions) if f.name not in _ARGUMENTS),
    )
