"""List the parameters of real models, from config values alone.

Qwen3-235B-A22B uses its table. For DeepSeek-V3 and Kimi-K2 the tensors are written out here, by the
names and shapes of transformers' DeepseekV3ForCausalLM (MLA, dense first layers, one shared expert,
without the multi-token-prediction layer).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_quant.models import lookup
from megatron_quant.models.spec import Domain, Parallel, Param, Role, Source

QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class DeepSeek:
    """Sizes of config.json; ``dense``: layers at the start without experts."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    expert_ffn: int
    experts: int
    dense: int
    vocab: int
    q_rank: int = 1536
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    v: int = 128

    def params(self) -> Iterator[Param]:
        """Every parameter, cut as Megatron cuts it."""
        vocab = (self.vocab, self.hidden)
        yield _one("model.embed_tokens", vocab, Role.EMBEDDING, Parallel.COLUMN)
        for layer in range(self.layers):
            yield from self._attention(f"model.layers.{layer}.")
            yield from self._mlp(layer, f"model.layers.{layer}.mlp.")
        yield _one("model.norm", (self.hidden,), Role.NORM, Parallel.REPLICATED)
        yield _one("lm_head", vocab, Role.OUTPUT, Parallel.COLUMN)

    def _attention(self, at: str) -> Iterator[Param]:
        head, norm, whole = self.nope + self.rope, Role.NORM, Parallel.REPLICATED
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield _one(at + name, (self.hidden,), norm, whole)
        at += "self_attn."
        yield _one(at + "q_a_layernorm", (self.q_rank,), norm, whole)
        yield _one(at + "kv_a_layernorm", (self.kv_rank,), norm, whole)
        yield _linear(at + "q_a_proj", (self.q_rank, self.hidden), whole)
        yield _linear(at + "q_b_proj", (self.heads * head, self.q_rank), Parallel.COLUMN)
        yield _linear(at + "kv_a_proj_with_mqa", (self.kv_rank + self.rope, self.hidden), whole)
        out = self.heads * (self.nope + self.v)
        yield _linear(at + "kv_b_proj", (out, self.kv_rank), Parallel.COLUMN)
        yield _linear(at + "o_proj", (self.hidden, self.heads * self.v), Parallel.ROW)

    def _mlp(self, layer: int, at: str) -> Iterator[Param]:
        if layer < self.dense:
            yield from self._gated(at, self.ffn)
            return
        router = (self.experts, self.hidden)
        yield _one(at + "gate", router, Role.ROUTER, Parallel.REPLICATED)
        yield from self._gated(at + "shared_experts.", self.expert_ffn)
        for expert in range(self.experts):
            yield from self._gated(at + f"experts.{expert}.", self.expert_ffn, layer, expert)

    def _gated(
        self, at: str, ffn: int, layer: int | None = None, expert: int | None = None
    ) -> Iterator[Param]:
        domain = Domain.DENSE if expert is None else Domain.EXPERT
        inner = (ffn, self.hidden)
        sources = tuple(Source(f"{at}{name}.weight", inner) for name in ("gate_proj", "up_proj"))
        shape, role = (2 * ffn, self.hidden), Role.LINEAR
        first = f"{at}linear_fc1.weight"
        yield Param(
            name=first,
            sources=sources,
            shape=shape,
            role=role,
            parallel=Parallel.COLUMN,
            domain=domain,
            groups=0,
            layer=layer,
            expert=expert,
        )
        down = Source(f"{at}down_proj.weight", (self.hidden, ffn))
        yield Param(
            name=down.name,
            sources=(down,),
            shape=down.shape,
            role=role,
            parallel=Parallel.ROW,
            domain=domain,
            groups=0,
            layer=layer,
            expert=expert,
        )


def _one(module: str, shape: tuple[int, ...], role: Role, parallel: Parallel) -> Param:
    source = Source(f"{module}.weight", shape)
    return Param(name=source.name, sources=(source,), shape=shape, role=role, parallel=parallel)


def _linear(module: str, shape: tuple[int, ...], parallel: Parallel) -> Param:
    return _one(module, shape, Role.LINEAR, parallel)


DEEPSEEK_V3 = DeepSeek(
    layers=61,
    hidden=7168,
    heads=128,
    ffn=18432,
    expert_ffn=2048,
    experts=256,
    dense=3,
    vocab=129280,
)
KIMI_K2 = DeepSeek(
    layers=61,
    hidden=7168,
    heads=64,
    ffn=18432,
    expert_ffn=2048,
    experts=384,
    dense=1,
    vocab=163840,
)


def params(model: str) -> tuple[Param, ...]:
    """All parameters of one of :data:`MODELS`."""
    if model == "Qwen3-235B-A22B":
        return lookup(QWEN3_235B).params(QWEN3_235B)
    return tuple({"DeepSeek-V3": DEEPSEEK_V3, "Kimi-K2": KIMI_K2}[model].params())


MODELS = ("Qwen3-235B-A22B", "DeepSeek-V3", "Kimi-K2")
EXPERTS = {"Qwen3-235B-A22B": 128, "DeepSeek-V3": 256, "Kimi-K2": 384}
