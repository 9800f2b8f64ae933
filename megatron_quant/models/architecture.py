"""An architecture: one Hugging Face class, and the facts that Megatron-Core needs of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_quant.engines.families import engine_names
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.blocks import parameters
from megatron_quant.models.config import Config
from megatron_quant.models.decoder import Decoder, DeltaNet, Experts, Latent, Rope, Sigmoid
from megatron_quant.models.drafts import DraftNames, copies_in_drafts, drafts
from megatron_quant.models.hybrid import hybrid_parameters
from megatron_quant.models.spec import Param, Role, Source, Stage
from megatron_quant.models.text import family

if TYPE_CHECKING:
    from torch import Tensor

_EXPERTS = 200_000
"""Most experts that all layers of a model may have together; some nine times Kimi-K2's."""


def _routing(decoder: Decoder, experts: Experts) -> dict[str, object]:
    # softmax over the chosen logits alone equals softmax over all, renormalized
    freq = 1 if all(experts.layers) else [int(has) for has in experts.layers]
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_layer_freq": freq,
        "moe_router_topk": experts.topk,
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "none",
        **(_sigmoid(experts.sigmoid) if experts.sigmoid else {}),
        **(_shared(experts) if experts.shared_ffn else {}),
    }


def _sigmoid(sigmoid: Sigmoid) -> dict[str, object]:
    grouped = sigmoid.groups > 1
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,  # no load balancing: the checkpoint's bias stays
        "moe_router_num_groups": sigmoid.groups if grouped else None,
        "moe_router_group_topk": sigmoid.chosen if grouped else None,
        "moe_router_topk_scaling_factor": sigmoid.scaling,
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
    }


def _shared(experts: Experts) -> dict[str, object]:
    return {
        "moe_shared_expert_intermediate_size": experts.shared_ffn,
        "moe_shared_expert_gate": bool(experts.names.shared_gate),
    }


def _latent(latent: Latent, rope: Rope) -> dict[str, object]:
    found: dict[str, object] = {
        "multi_latent_attention": True,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.nope,
        "qk_pos_emb_head_dim": latent.rope,
        "v_head_dim": latent.value,
        "rope_type": "yarn" if rope.yarn else "rope",
        "rotary_base": rope.base,
    }
    if rope.yarn is not None:
        found |= {
            "rotary_scaling_factor": rope.yarn.factor,
            "original_max_position_embeddings": rope.yarn.original,
            "beta_fast": rope.yarn.fast,
            "beta_slow": rope.yarn.slow,
            "mscale": rope.yarn.mscale or 1.0,  # with 0: the factor's own scale
            "mscale_all_dim": rope.yarn.mscale_all or 0.0,
        }
    return found


def _attention(decoder: Decoder) -> dict[str, object]:
    """Return the settings that differ from attention to all tokens; empty where none does."""
    found: dict[str, object] = {"softmax_type": "learnable"} if decoder.sinks else {}
    if decoder.window is not None:
        # a query's own token is in the window, but not in Megatron's count of those before it
        found["window_size"] = (decoder.window.tokens - 1, 0)
        found["window_attn_skip_freq"] = [int(has) for has in decoder.window.layers]
    return found


def _delta_net(net: DeltaNet) -> dict[str, object]:
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(has) for has in net.layers],
        "linear_conv_kernel_dim": net.kernel,
        "linear_key_head_dim": net.key_dim,
        "linear_value_head_dim": net.value_dim,
        "linear_num_key_heads": net.key_heads,
        "linear_num_value_heads": net.value_heads,
    }


def _activation(experts: Experts) -> dict[str, object]:
    if experts.clamp is None:
        return {}
    return {
        "activation_func": quick_gelu,
        "activation_func_clamp_value": experts.clamp,
        "glu_linear_offset": 1.0,
    }


def quick_gelu(gate: "Tensor") -> "Tensor":
    """Return ``gate * sigmoid(1.702 gate)``.

    Megatron-Core's own compiles itself on its first call.
    """
    return gate * (1.702 * gate).sigmoid()


def _check_number_of_experts(decoder: Decoder) -> None:
    """Raise ArchitectureError where all layers together have more experts than any model."""
    if decoder.experts is None:
        return
    layers, count = sum(decoder.experts.layers), decoder.experts.count
    if layers * count > _EXPERTS:
        raise ArchitectureError(
            f"{layers} layers with {count} experts each in config.json are more than {_EXPERTS} "
            "experts in all; correct config.json"
        )


def _on_both_ends(embedding: Param) -> Param:
    return replace(embedding, stage=Stage.BOTH)


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers.

    Attributes:
        name: Its entry in ``architectures`` of config.json.
        decoder: Reads the facts out of config.json; raises ArchitectureError for a config that no
            table describes.
        draft_names: Names of its layers for speculation; None where they are not known.
        renamed: (beginning of a name, beginning that the checkpoint has instead) of all tensors of
            a text decoder that other models lie beside; empty where it is the whole checkpoint.
    """

    name: str
    decoder: Callable[[Config], Decoder]
    draft_names: DraftNames | None = None
    renamed: tuple[tuple[str, str], ...] = ()

    def drafts(self, hf_config: Config, count: int) -> tuple[Param, ...]:
        """List the parameters of ``count`` layers for speculation; none where no names are known.

        Copies of the embedding and the output layer, which files may have, are not among them.
        """
        if self.draft_names is None:
            return ()
        decoder = self.decoder(hf_config)
        found = drafts(decoder, self.draft_names, count)
        return tuple(self._draft(hf_config, decoder.layers, param) for param in found)

    def with_drafts(self, hf_config: Config, count: int) -> tuple[Param, ...]:
        """List the parameters of a GPTModel with ``count`` layers for speculation (``mtp``).

        Copies of the embedding and the output layer, which exports have, are the last.
        """
        own = self.params(hf_config)
        if count == 0 or self.draft_names is None:
            return own
        decoder = self.decoder(hf_config)
        found = copies_in_drafts(decoder, self.draft_names, count)
        copies = (self._draft(hf_config, decoder.layers, param) for param in found)
        embeds = (_on_both_ends(p) if p.role is Role.EMBEDDING else p for p in own)
        return (*embeds, *self.drafts(hf_config, count), *copies)

    def params(self, hf_config: Config) -> tuple[Param, ...]:
        """List every logical parameter of the model (Transformer Engine spec), in its order."""
        decoder = self.decoder(hf_config)
        _check_number_of_experts(decoder)
        if decoder.hybrid is not None:
            return tuple(hybrid_parameters(decoder, decoder.hybrid))
        return tuple(map(self._named, parameters(decoder)))

    def is_outside(self, name: str) -> bool:
        """Return whether a tensor is of a model beside the text decoder, such as a vision tower."""
        return bool(self.renamed) and not name.startswith(tuple(own for _, own in self.renamed))

    def _draft(self, hf_config: Config, layers: int, param: Param) -> Param:
        """Return ``param`` with its names in the checkpoint and, where they differ, in engines."""
        named = self._named(param)
        modules = [source.module for source in named.sources]
        called = engine_names(family(hf_config), modules, layers)
        return replace(named, called=called)

    def _named(self, param: Param) -> Param:
        """Return ``param`` with the names that the checkpoint has."""
        return replace(param, sources=tuple(map(self._source, param.sources)))

    def _source(self, source: Source) -> Source:
        for plain, own in self.renamed:
            if source.name.startswith(plain):
                return replace(source, name=own + source.name.removeprefix(plain))
        return source

    def megatron_config(self, hf_config: Config) -> dict[str, object]:
        """Return keyword arguments of megatron-core's TransformerConfig that describe the model.

        They are those of its MLATransformerConfig where ``multi_latent_attention`` is among them.

        Dropout is 0, and no load-balancing loss is set. The caller decides how the model runs
        (parallel sizes, dtype, grouped GEMM, dispatcher). Where only some layers have experts,
        ``moe_layer_freq`` is a list, which ``get_gpt_decoder_block_spec`` reads.
        """
        import torch.nn.functional as F

        decoder = self.decoder(hf_config)
        return {
            "num_layers": decoder.layers,
            "hidden_size": decoder.hidden,
            "num_attention_heads": decoder.heads,
            "num_query_groups": decoder.query_groups,
            "kv_channels": decoder.head_dim,
            "ffn_hidden_size": decoder.ffn,
            "normalization": "RMSNorm",
            "layernorm_epsilon": decoder.epsilon,
            "qk_layernorm": decoder.qk_norm,
            "add_bias_linear": decoder.biased,
            "add_qkv_bias": decoder.qkv_bias,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "layernorm_zero_centered_gamma": decoder.centered,
            "attention_output_gate": decoder.gated,
            **_attention(decoder),
            **(_delta_net(decoder.delta) if decoder.delta else {}),
            **(_latent(decoder.latent, decoder.rope) if decoder.latent else {}),
            **(_routing(decoder, decoder.experts) if decoder.experts else {}),
            **(_activation(decoder.experts) if decoder.experts else {}),
        }

    def config_attributes(self, hf_config: Config) -> dict[str, object]:
        """Return what megatron-core's GPTModel reads from attributes of a TransformerConfig.

        They are no fields of it: set them once it is made.
        """
        decoder = self.decoder(hf_config)
        yarn = decoder.rope.yarn
        if yarn is None or decoder.latent is not None:  # latent attention has fields for it
            return {}
        return {
            "yarn_rotary_scaling_factor": yarn.factor,
            "yarn_original_max_position_embeddings": yarn.original,
            "yarn_beta_fast": yarn.fast,
            "yarn_beta_slow": yarn.slow,
            "yarn_mscale": yarn.mscale,
            "yarn_mscale_all_dim": yarn.mscale_all,
            "yarn_correction_range_round_to_int": yarn.truncate,
        }

    def gpt_config(self, hf_config: Config) -> dict[str, Any]:
        """Return keyword arguments of megatron-core's GPTModel that describe the model.

        ``vocab_size`` is the checkpoint's. At tp > 1 pass its ``padded_vocab`` instead.
        """
        decoder = self.decoder(hf_config)
        rope = decoder.rope
        scaling = {} if rope.llama3_factor is None else {"rope_scaling_factor": rope.llama3_factor}
        return {
            "vocab_size": decoder.vocab,
            "max_sequence_length": decoder.positions,
            "position_embedding_type": "yarn" if rope.yarn and not decoder.latent else "rope",
            "rotary_base": rope.base,
            "rotary_percent": rope.part,
            "rope_scaling": rope.llama3_factor is not None,
            "seq_len_interpolation_factor": rope.interpolation,
            "share_embeddings_and_output_weights": decoder.tied,
            **scaling,
        }
