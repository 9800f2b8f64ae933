"""NemotronH (Nemotron-3): transformers' NemotronHForCausalLM.

Its parameters are known by Megatron's names, so that training checkpoints can be read and layouts
planned. This library does not build the model, which needs Mamba's kernels.
"""

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
from megatron_quant.models.decoder import (
    ATTENTION,
    MAMBA,
    MLP,
    MOE,
    Decoder,
    ExpertNames,
    Experts,
    Hybrid,
    Rope,
    Sigmoid,
)

# NemotronHConfig's values of keys that config.json lacks
_DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "use_conv_bias": True,
    "intermediate_size": 21504,
    "conv_kernel": 4,
}
_KINDS = {
    "mamba": MAMBA,
    "linear_attention": MAMBA,
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "mlp": MLP,
    "moe": MOE,
}
_NAMES = ExpertNames(
    router="mixer.gate",
    gate="",
    up="mixer.experts.{expert}.up_proj",
    down="mixer.experts.{expert}.down_proj",
    bias="mixer.gate.e_score_correction_bias",
    shared="mixer.shared_experts",
)
_PATTERN, _LISTED = "hybrid_override_pattern", "layers_block_type"


def _kinds(config: Config) -> str:
    """Return the kind of each layer, by either of the keys that say so."""
    key = _PATTERN if config.get(_PATTERN) is not None else _LISTED
    given = config.get(key)
    letters = given if isinstance(given, str) else None
    if isinstance(given, list):
        letters = "".join(_KINDS.get(kind, "?") if isinstance(kind, str) else "?" for kind in given)
    if not letters or set(letters) - set(_KINDS.values()):
        raise ArchitectureError(
            f"{key}={shown(given)} in config.json must name the layers: {MAMBA}, {ATTENTION}, "
            f"{MLP} and {MOE} in {_PATTERN}, or a list of {', '.join(_KINDS)} in {_LISTED}"
        )
    stated = config.get("num_hidden_layers")
    if stated is not None and stated != len(letters):
        raise ArchitectureError(
            f"num_hidden_layers={shown(stated)} in config.json, but {key} names {len(letters)} "
            "layers; correct one of them"
        )
    return letters


def _experts(config: Config, kinds: str) -> Experts | None:
    if MOE not in kinds:
        return None
    shared = config.get("n_shared_experts") != 0
    key = "moe_shared_expert_intermediate_size"
    return Experts(
        count=experts_in(config, "n_routed_experts"),
        topk=positive(config, "num_experts_per_tok"),
        ffn=positive(config, "moe_intermediate_size"),
        layers=tuple(kind == MOE for kind in kinds),
        normalized=flag(config, "norm_topk_prob"),
        names=_NAMES,
        shared_ffn=positive(config, key) if shared else 0,
        sigmoid=Sigmoid(
            positive(config, "n_group"),
            positive(config, "topk_group"),
            number(config, "routed_scaling_factor"),
        ),
    )


def _hybrid(config: Config, kinds: str) -> Hybrid:
    heads, groups = positive(config, "mamba_num_heads"), positive(config, "n_groups")
    if heads % groups:
        raise ArchitectureError(
            f"n_groups={groups} in config.json does not divide mamba_num_heads={heads}; correct "
            "config.json"
        )
    latent = config.get("moe_latent_size")
    return Hybrid(
        kinds=kinds,
        heads=heads,
        head_dim=positive(config, "mamba_head_dim"),
        groups=groups,
        state=positive(config, "ssm_state_size"),
        kernel=positive(config, "conv_kernel"),
        conv_bias=flag(config, "use_conv_bias"),
        latent=0 if latent is None else positive(config, "moe_latent_size"),
    )


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    if config.get("block_configs") is not None:
        raise ArchitectureError(
            "block_configs in config.json gives layers sizes of their own, which no table here "
            "describes; pass --stream, which needs no table"
        )
    only(config, "use_bias", (False,))
    only(config, "mamba_proj_bias", (False,))
    only(config, "mlp_hidden_act", ("relu2",))
    kinds = _kinds(config)
    alike = {
        "num_hidden_layers": len(kinds),
        "rms_norm_eps": config["layer_norm_epsilon"],
        "hidden_act": None,
    }
    # no position is rotated; the base is in no parameter
    decoder = read_decoder({**config, **alike}, qk_norm=False, rope=Rope(base=10000.0))
    return replace(decoder, experts=_experts(config, kinds), hybrid=_hybrid(config, kinds))


NEMOTRON_H = Architecture("NemotronHForCausalLM", _decoder)
