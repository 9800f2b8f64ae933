"""The model that a training run says it has: ``hf/`` beside its tensors, or ``run_config.yaml``.

Megatron-Bridge writes its whole configuration there, with megatron-core's names. A table maps what
a Hugging Face config has; another value of anything else is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_quant.ckpt.storage import read_config
from megatron_quant.documents import RECIPE, parse_yaml, read_bytes, shown
from megatron_quant.errors import ArchitectureError, CheckpointError
from megatron_quant.fields import Fields
from megatron_quant.mcore.checkpoint.saved import HF_FILES
from megatron_quant.mcore.model import check_said
from megatron_quant.models import lookup

RUN_CONFIG = "run_config.yaml"
_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "seq_length": "max_position_embeddings",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
"""megatron-core's name -> that of a Hugging Face config."""
_EXPERTS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "multi_latent_attention": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1, None),
    "rope_scaling": (False, None),
    "seq_len_interpolation_factor": (None,),
    "window_size": (None,),
    "moe_layer_freq": (1, None),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_num_groups": (None,),
    "moe_router_topk_scaling_factor": (None,),
    "experimental_attention_variant": (None,),
}
"""Values of settings that a config written here says nothing of. Others have no counterpart."""


def model_of_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder with the tokenizer of the checkpoint ``path``, and the model's config.json.

    Raises CheckpointError if the run brings neither, or says what no Hugging Face config here can.
    """
    beside = path / HF_FILES
    if (beside / "config.json").is_file():
        return beside, read_config(beside)
    file = path / RUN_CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {HF_FILES} folder with config.json and the tokenizer, and no "
            f"{RUN_CONFIG}: say where they are with --hf-model-id"
        )
    said = parse_yaml(read_bytes(file, RECIPE), str(file), CheckpointError)
    run = Fields(said if isinstance(said, dict) else {}, str(file))
    model = run.part("model").values
    folder = _tokenizer(file, run)
    if (folder / "config.json").is_file():
        config = read_config(folder)
        _check(file, config, model)
        return folder, config
    return folder, hf_config_of(file, model)


def _tokenizer(file: Path, run: Fields) -> Path:
    model, tokenizer = run.part("model"), run.part("tokenizer")
    for named in (model.get("hf_model_id"), tokenizer.get("tokenizer_model")):
        if isinstance(named, str) and Path(named).is_dir():
            return Path(named)
    raise CheckpointError(
        f"{file} names no folder on this host with the model's tokenizer (hf_model_id, "
        "tokenizer_model): say where config.json and the tokenizer are with --hf-model-id"
    )


def hf_config_of(file: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the model whose TransformerConfig ``file`` spells.

    Raises CheckpointError for a setting that is missing, or that has no counterpart.
    """
    for name, allowed in _ONLY.items():
        value = model.get(name, allowed[0])
        if isinstance(value, list) and set(map(str, value)) == {"1"}:
            value = 1  # every layer has experts
        if value not in allowed:
            raise CheckpointError(
                f"{file}: {name}={shown(value)} has no counterpart in a config.json that "
                "this library writes: give the model's own with --hf-model-id"
            )
    experts = model.get("num_moe_experts") is not None
    names = {**_COMMON, **(_EXPERTS if experts else {})}
    missing = [name for name in names if model.get(name) is None]
    if missing:
        raise CheckpointError(
            f"{file} does not say {missing[0]} of the model: give config.json with --hf-model-id"
        )
    config = {theirs: model[ours] for ours, theirs in names.items()}
    normed = bool(model.get("qk_layernorm"))
    kind = {(True, True): "Qwen3Moe", (False, True): "Qwen3", (False, False): "Llama"}.get(
        (experts, normed), "Mixtral"
    )
    config |= {"architectures": [f"{kind}ForCausalLM"], "hidden_act": "silu"}
    if kind == "Qwen3Moe":
        config["norm_topk_prob"] = not model.get("moe_router_pre_softmax")
    elif kind == "Mixtral":
        config["num_local_experts"] = config.pop("num_experts")
        config["intermediate_size"] = config.pop("moe_intermediate_size")
    config["model_type"] = {"Qwen3Moe": "qwen3_moe"}.get(kind, kind.lower())
    _check(file, config, model)
    return config


def _check(file: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the run's TransformerConfig is not that of ``config``."""
    named = {name: _plain(value) for name, value in model.items() if isinstance(name, str)}
    try:
        described = lookup(config).megatron_config(config)
        check_said(named, described)
    except ArchitectureError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _plain(value: Any) -> Any:
    """Return the name of a function that the file spells as ``_target_``."""
    if isinstance(value, dict) and isinstance(value.get("_target_"), str):
        return value["_target_"].rpartition(".")[2]
    return value
