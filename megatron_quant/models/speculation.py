"""Find the layers for speculation, which predict tokens ahead, by config.json and names."""

import re
from collections.abc import Iterable

from megatron_quant.errors import ArchitectureError
from megatron_quant.models.config import Config
from megatron_quant.models.registry import lookup
from megatron_quant.models.spec import Param
from megatron_quant.models.stacks import Shapes
from megatron_quant.models.text import layers_of, text_config

PREDICTS = re.compile(r"(?:[^.]+\.)*?mtp(?:_\w+)?\.")
"""Names of tensors in layers called ``mtp``; Ernie's are called ``mtp_block`` and so on."""
_NUMBERED = re.compile(r"(?:model\.|language_model\.)*layers\.([0-9]{1,9})\.")
"""Names of tensors in numbered layers; a number beyond the model's is a layer for speculation."""
_MOST_DRAFTS = 64
"""Layers for speculation beyond which none is looked for by a table's names."""
_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Keys of config.json, or of its text_config, that count the layers for speculation."""


def is_draft(config: Config, name: str) -> bool:
    """Return whether a tensor is of the layers beyond the model's own, which predict tokens ahead.

    They are called ``mtp``, or numbered on from the model's last layer.
    """
    if PREDICTS.match(name):
        return True
    match = _NUMBERED.match(name)
    drafts = text_config(config).get("num_nextn_predict_layers")
    if match is None or type(drafts) is not int:
        return False
    try:
        layers = layers_of(config)
    except ArchitectureError:
        return False
    return int(match[1]) in range(layers, layers + drafts)


def draft_counts(config: Config) -> tuple[str, ...]:
    """Return those of the keys that ``config`` itself has, with a number above zero."""
    return tuple(k for k in _COUNTS if type(config.get(k)) is int and config[k] > 0)


def stated_drafts(config: Config) -> int | None:
    """Return how many layers for speculation config.json states; None where it says nothing."""
    for of in (config, text_config(config)):
        for key in _COUNTS:
            if type(of.get(key)) is int:
                return max(int(of[key]), 0)
    return None


def has_drafts(config: Config) -> bool:
    """Return whether config.json says that the checkpoint has layers for speculation."""
    return bool(draft_counts(config) or draft_counts(text_config(config)))


def count_drafts(config: Config, names: Iterable[str]) -> int:
    """Count the layers for speculation whose names a table knows, by config.json or by ``names``.

    names: of Hugging Face tensors; read where config.json does not say it, as Qwen3-Next's.
    """
    known = lookup(config).draft_names
    if known is None:
        return 0
    stated = stated_drafts(config)
    if stated is None:
        return int(known.most is not None and any(map(PREDICTS.match, names)))
    return min(stated, known.most or _MOST_DRAFTS)


def named_drafts(config: Config, shapes: Shapes) -> list[Param]:
    """Return those parameters of layers for speculation that a table describes and files hold."""
    count = count_drafts(config, shapes)
    return [
        param
        for param in lookup(config).drafts(config, count)
        if all(shapes.get(s.name) == s.shape for s in param.sources)
    ]
