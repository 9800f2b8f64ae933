"""Read a checkpoint's config.json as transformers' own config, which its classes are built of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from megatron_quant.documents import shown
from megatron_quant.engines.families import RunAs
from megatron_quant.errors import CheckpointError
from megatron_quant.models import run_as


def transformers_config(
    directory: Path, config: Mapping[str, Any], instead: str
) -> PretrainedConfig:
    """Return transformers' config of a checkpoint.

    Some models run as a class of another ``model_type``: see ``Family.runs_as``. The config of a
    training run may be in no file. Code that a
    checkpoint brings is never run. What config.json says of quantization may be in the config.

    Args:
        directory: The checkpoint.
        config: Content of its config.json.
        instead: What the user can do where transformers has no class, for the message.

    Raises:
        CheckpointError: Where transformers has no class, or does not read the config.
    """
    other = run_as(config)
    kind = config.get("model_type") if other is None else other.kind
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{directory}: transformers {transformers.__version__} has no class of model_type "
            f"{shown(kind)}, and code that a checkpoint brings is never run; {instead}"
        )
    try:
        own: PretrainedConfig
        if other is not None:
            own = CONFIG_MAPPING[other.kind].from_dict(_content(config, other))
        elif (directory / "config.json").is_file():
            own = AutoConfig.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        else:
            own = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as e:  # transformers raises whatever a model's code does
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(
            f"{directory}: transformers cannot read it: {reason}; {instead}"
        ) from e
    return own


def _content(config: Mapping[str, Any], other: RunAs) -> dict[str, Any]:
    if other.tower is None:
        return {**config, "model_type": other.kind}
    text = {k: v for k, v in config.items() if k != "quantization_config"}
    return {"model_type": other.kind, "text_config": text, "vision_config": dict(other.tower)}
