"""The part of config.json that describes the text decoder, and the family that it is of."""

from megatron_quant.documents import shown
from megatron_quant.engines.families import LAYERS, Family, RunAs, family_of
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.config import Config, positive

_NESTED = ("text_config", "llm_config", "language_config")


def text_config(config: Config) -> Config:
    """Return the part of config.json that describes the text decoder."""
    return next((part for key in _NESTED if isinstance(part := config.get(key), dict)), config)


def family(config: Config) -> Family | None:
    """Return the family that ``model_type`` names, the text decoder's first; None for others."""
    return family_of((text_config(config).get("model_type"), config.get("model_type")))


def run_as(config: Config) -> RunAs | None:
    """Return as which other model transformers runs this one; None where it has its own class."""
    known, kind = family(config), config.get("model_type")
    return next((row for row in known.runs_as if row.of == kind), None) if known else None


def layers_of(config: Config) -> int:
    """Return the number of the decoder's layers, which some families list instead.

    Raises:
        ArchitectureError: Where config.json has no such number.
    """
    text = text_config(config)
    key = next((k for k in LAYERS if text.get(k) is not None), LAYERS[0])
    listed = text.get(key)
    if not isinstance(listed, str | list):
        return positive(text, key)
    if not listed:
        raise ArchitectureError(f"{key}={shown(listed)} in config.json lists no layer; correct it")
    return len(listed)


def has_plain_router(config: Config) -> bool:
    """Return whether engines are known to build the model's router plain, whatever is stored."""
    known = family(config)
    return known is not None and known.plain_router


def has_stacks_alone(config: Config) -> bool:
    """Return whether engines load the model's routed experts as stacks alone."""
    known = family(config)
    return known is not None and known.stacked
