"""Qwen3-Next, Qwen3.5 and Qwen3.6 with experts: gated delta nets beside gated attention.

They are transformers' Qwen3NextForCausalLM, Qwen3_5MoeForCausalLM and, beside a vision tower,
Qwen3_5MoeForConditionalGeneration.
"""

from dataclasses import replace

from megatron_quant.documents import shown
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import Config, positive, read_partial_rope
from megatron_quant.models.decoder import Decoder, DeltaNet
from megatron_quant.models.drafts import APART
from megatron_quant.models.qwen3_moe import NAMES, read_mixture
from megatron_quant.models.text import text_config

# Values of keys that config.json lacks, of Qwen3NextConfig and Qwen3_5MoeTextConfig
_DEFAULTS = {
    "rope_theta": 10000.0,
    "head_dim": 256,
    "norm_topk_prob": True,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_NAMES = replace(NAMES, shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
_DENSE = "one of its family without experts, for --stream"
_KINDS = ("linear_attention", "full_attention")
_TIED = "tie_word_embeddings"


def _layers(config: Config, layers: int) -> tuple[bool, ...]:
    """Return for each layer whether it has linear attention."""
    interval = positive(config, "full_attention_interval")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [_KINDS[(i + 1) % interval == 0] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in _KINDS for k in kinds):
        raise ArchitectureError(
            f"layer_types={shown(kinds)} in config.json must name one of {' and '.join(_KINDS)} "
            f"for each of {layers} layers"
        )
    return tuple(kind == _KINDS[0] for kind in kinds)


def _delta_net(config: Config, layers: int, *, grouped: bool) -> DeltaNet | None:
    chosen = _layers(config, layers)
    keys = positive(config, "linear_num_key_heads")
    values = positive(config, "linear_num_value_heads")
    if values % keys:
        raise ArchitectureError(
            f"linear_num_key_heads={keys} in config.json does not divide "
            f"linear_num_value_heads={values}; correct config.json"
        )
    net = DeltaNet(
        layers=chosen,
        key_heads=keys,
        value_heads=values,
        key_dim=positive(config, "linear_key_head_dim"),
        value_dim=positive(config, "linear_value_head_dim"),
        kernel=positive(config, "linear_conv_kernel_dim"),
        grouped=grouped,
    )
    return net if any(chosen) else None


def _read(config: Config, *, grouped: bool) -> Decoder:
    config = {**_DEFAULTS, **config}
    rope = read_partial_rope(config, part=0.25)
    decoder, experts = read_mixture(config, _NAMES, _DENSE, qk_norm=True, rope=rope)
    experts = replace(experts, shared_ffn=positive(config, "shared_expert_intermediate_size"))
    delta = _delta_net(config, decoder.layers, grouped=grouped)
    return replace(decoder, experts=experts, delta=delta, gated=True, centered=True)


def _next(config: Config) -> Decoder:
    return _read(config, grouped=True)


def _three_five(config: Config) -> Decoder:
    text = text_config(config)
    # the outer config says whether a decoder beside a tower is tied; every layer has experts
    outer = {_TIED: config[_TIED]} if _TIED in config else {}
    fixed = {"decoder_sparse_step": 1, "mlp_only_layers": [], "intermediate_size": 1}
    return _read({**text, **outer, **fixed}, grouped=False)


QWEN3_NEXT = Architecture("Qwen3NextForCausalLM", _next, draft_names=APART)
QWEN3_5_MOE = Architecture("Qwen3_5MoeForCausalLM", _three_five, draft_names=APART)
QWEN3_5_MOE_VL = Architecture(
    "Qwen3_5MoeForConditionalGeneration",
    _three_five,
    draft_names=APART,
    renamed=(("model.", "model.language_model."), ("lm_head.", "lm_head.")),
)
