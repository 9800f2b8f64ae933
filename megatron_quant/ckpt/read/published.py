"""Give a bare model's tensors the names that whole checkpoints are published with.

transformers' ``Qwen3Model.save_pretrained`` writes ``layers.0...``, ``Qwen3ForCausalLM`` writes
``model.layers.0...``. Embedding models are published with the short names. Engines and transformers
read the long names into either class.
"""

from collections.abc import Iterable, Mapping
from typing import Any

PREFIX = "model."
_EMBEDDING = "embed_tokens.weight"
_BESIDE = ("lm_head.", "mtp.", "score.")
"""Beginnings of names that lie beside the bare model in a whole one."""


def published_names(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return stored name -> published name of a bare model's tensors; empty for a whole one.

    Args:
        names: Names of all tensors of a checkpoint.
        config: Content of config.json.
    """
    stored = set(names)
    bare = _EMBEDDING in stored or (
        f"language_model.{_EMBEDDING}" in stored and _is_bare_class(config)
    )
    if not bare or any(name.startswith(PREFIX) for name in stored):
        return {}
    return {n: n if n.startswith(_BESIDE) else PREFIX + n for n in sorted(stored)}


def _is_bare_class(config: Mapping[str, Any]) -> bool:
    """Return whether config.json names a class such as ``Qwen2_5_VLModel``."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return isinstance(first, str) and first.endswith("Model") and "For" not in first
