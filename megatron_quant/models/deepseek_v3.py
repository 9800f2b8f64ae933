"""DeepSeek-V3: transformers' DeepseekV3ForCausalLM, the class of Kimi-K2 and Moonlight too."""

from dataclasses import replace

from megatron_quant.documents import shown
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import (
    Config,
    experts_in,
    flag,
    number,
    only,
    positive,
    read_decoder,
)
from megatron_quant.models.decoder import Decoder, ExpertNames, Experts, Sigmoid
from megatron_quant.models.latent import check_rotation, read_latent

# DeepseekV3Config's values of keys that config.json lacks
_DEFAULTS = {
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "q_lora_rank": 1536,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
}

_NAMES = ExpertNames(
    router="mlp.gate",
    gate="mlp.experts.{expert}.gate_proj",
    up="mlp.experts.{expert}.up_proj",
    down="mlp.experts.{expert}.down_proj",
    bias="mlp.gate.e_score_correction_bias",
    shared="mlp.shared_experts",
)


def _experts(config: Config, layers: int) -> Experts:
    only(config, "scoring_func", ("sigmoid",))
    only(config, "topk_method", ("noaux_tc",))
    only(config, "moe_layer_freq", (1,))
    dense = config["first_k_dense_replace"]
    if type(dense) is not int or not 0 <= dense < layers:
        raise ArchitectureError(
            f"first_k_dense_replace={shown(dense)} in config.json must be a whole number from 0 to "
            f"{layers - 1}, so that a layer has experts"
        )
    ffn = positive(config, "moe_intermediate_size")
    return Experts(
        count=experts_in(config, "n_routed_experts"),
        topk=positive(config, "num_experts_per_tok"),
        ffn=ffn,
        layers=tuple(i >= dense for i in range(layers)),
        normalized=flag(config, "norm_topk_prob"),
        names=_NAMES,
        shared_ffn=ffn * positive(config, "n_shared_experts"),
        sigmoid=Sigmoid(
            positive(config, "n_group"),
            positive(config, "topk_group"),
            number(config, "routed_scaling_factor"),
        ),
    )


def _check_routing(experts: Experts) -> None:
    """Raise ArchitectureError for a choice of experts that Megatron-Core's router cannot make."""
    assert experts.sigmoid is not None
    groups, chosen, topk = experts.sigmoid.groups, experts.sigmoid.chosen, experts.topk
    if experts.count % groups or chosen > groups or topk > experts.count // groups * chosen:
        raise ArchitectureError(
            f"n_group={groups}, topk_group={chosen} and num_experts_per_tok={topk} in config.json "
            f"do not fit {experts.count} experts; correct them"
        )
    if groups > 1 and topk // chosen != 2:
        raise ArchitectureError(
            f"topk_group={chosen} with num_experts_per_tok={topk} in config.json is not supported: "
            f"Megatron-Core chooses groups by their best {topk // chosen}, the model by their best "
            "2; use a model with twice as many experts per token as groups, or --stream"
        )
    if experts.normalized is not (topk > 1):
        raise ArchitectureError(
            f"norm_topk_prob={experts.normalized} with num_experts_per_tok={topk} in config.json "
            "is not supported by Megatron-Core, whose router always normalizes sigmoid scores of "
            "several experts and never of one; use another model, or --stream"
        )


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    only(config, "num_key_value_heads", (positive(config, "num_attention_heads"),))
    latent = read_latent(config)
    decoder = read_decoder({**config, "head_dim": latent.nope + latent.rope}, qk_norm=True)
    check_rotation(config, decoder.rope)
    experts = _experts(config, decoder.layers)
    _check_routing(experts)
    return replace(decoder, experts=experts, latent=latent)


DEEPSEEK_V3 = Architecture("DeepseekV3ForCausalLM", _decoder, has_drafts=True)
