"""Qwen3-MoE: transformers' Qwen3MoeForCausalLM."""

from dataclasses import replace

from megatron_quant.documents import shown
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import (
    Config,
    check_routing,
    experts_in,
    flag,
    full_attention,
    positive,
    positive_or,
    read_decoder,
)
from megatron_quant.models.decoder import Decoder, ExpertNames, Experts, Rope

# Qwen3MoeConfig's values of keys that config.json lacks
_DEFAULTS = {"rope_theta": 10000.0, "sliding_window": 4096}

NAMES = ExpertNames(
    router="mlp.gate",
    gate="mlp.experts.{expert}.gate_proj",
    up="mlp.experts.{expert}.up_proj",
    down="mlp.experts.{expert}.down_proj",
)


def _expert_layers(config: Config, layers: int, dense_class: str) -> tuple[bool, ...]:
    """Return for each layer whether it has experts; raise ArchitectureError where none has."""
    step = positive_or(config, "decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise ArchitectureError(
            f"mlp_only_layers={shown(dense)} in config.json must be a list of layer numbers"
        )
    without = set(dense)
    chosen = tuple((i + 1) % step == 0 and i not in without for i in range(layers))
    if not any(chosen):
        raise ArchitectureError(
            f"decoder_sparse_step={step} and mlp_only_layers={shown(dense)} in config.json leave "
            f"no layer with experts; convert the model to {dense_class}"
        )
    return chosen


def read_mixture(
    config: Config,
    names: ExpertNames,
    dense_class: str,
    *,
    qk_norm: bool,
    rope: Rope | None = None,
) -> tuple[Decoder, Experts]:
    """Read the facts that Qwen's mixtures have in common.

    Args:
        config: Content of config.json with defaults filled in.
        names: Module names of the experts.
        dense_class: Class to which a model without experts is to be converted.
        qk_norm: Whether heads of q and k are normalized.
        rope: The rotary embedding; None for one over the whole head, which config.json describes.

    Raises:
        ArchitectureError: Names the key that is missing, malformed or not supported.
    """
    decoder = read_decoder(config, qk_norm=qk_norm, rope=rope)
    if flag(config, "use_sliding_window"):
        full_attention(config)
    # transformers >= 5 saves the number under Mixtral's name
    count = experts_in(config, "num_experts" if "num_experts" in config else "num_local_experts")
    experts = Experts(
        count=count,
        topk=positive(config, "num_experts_per_tok"),
        ffn=positive(config, "moe_intermediate_size"),
        layers=_expert_layers(config, decoder.layers, dense_class),
        normalized=flag(config, "norm_topk_prob"),
        names=names,
    )
    check_routing(experts)
    return decoder, experts


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    decoder, experts = read_mixture(config, NAMES, "Qwen3ForCausalLM", qk_norm=True)
    return replace(decoder, experts=experts)


QWEN3_MOE = Architecture("Qwen3MoeForCausalLM", _decoder)
