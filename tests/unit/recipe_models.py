"""Slots of two-layer models of the four architectures, as the recipes see them."""

from megatron_quant.recipes.plan import Slot

LAYERS, EXPERTS = 2, 4


def _attention(layer: int) -> list[Slot]:
    megatron, hf = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}.self_attn"
    qkv = tuple(f"{hf}.{p}_proj" for p in "qkv")
    norm = f"model.layers.{layer}.input_layernorm"
    return [
        Slot(f"{megatron}.linear_qkv.layer_norm_weight", (norm,), (64,), "norm"),
        Slot(f"{megatron}.linear_qkv.weight", qkv, (128, 64)),
        Slot(f"{megatron}.q_layernorm.weight", (f"{hf}.q_norm",), (16,), "norm"),
        Slot(f"{megatron}.linear_proj.weight", (f"{hf}.o_proj",), (64, 64)),
    ]


def _dense_mlp(layer: int, megatron_mlp: str = "mlp", hf_mlp: str = "mlp") -> list[Slot]:
    megatron, hf = f"decoder.layers.{layer}.{megatron_mlp}", f"model.layers.{layer}.{hf_mlp}"
    fused = (f"{hf}.gate_proj", f"{hf}.up_proj")
    return [
        Slot(f"{megatron}.linear_fc1.weight", fused, (256, 64)),
        Slot(f"{megatron}.linear_fc2.weight", (f"{hf}.down_proj",), (64, 128)),
    ]


def _moe(layer: int, block: str, gate: str, up: str, down: str) -> list[Slot]:
    megatron, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.{block}"
    slots = [Slot(f"{megatron}.router.weight", (f"{hf}.gate",), (EXPERTS, 64), "router")]
    for e in range(EXPERTS):
        fc1 = (f"{hf}.experts.{e}.{gate}", f"{hf}.experts.{e}.{up}")
        fc2 = (f"{hf}.experts.{e}.{down}",)
        slots.append(Slot(f"{megatron}.experts.linear_fc1.weight{e}", fc1, (128, 64)))
        slots.append(Slot(f"{megatron}.experts.linear_fc2.weight{e}", fc2, (64, 64)))
    return slots


def _layer(architecture: str, layer: int) -> list[Slot]:
    if architecture == "mixtral":
        return _moe(layer, "block_sparse_moe", "w1", "w3", "w2")
    if architecture == "qwen3_moe":
        return _moe(layer, "mlp", "gate_proj", "up_proj", "down_proj")
    return _dense_mlp(layer)


def model(architecture: str, tied: bool = False) -> list[Slot]:
    """Slots of ``qwen3_moe``, ``mixtral``, ``qwen3`` or ``llama``."""
    embedding = ("model.embed_tokens",)
    slots = [Slot("embedding.word_embeddings.weight", embedding, (512, 64), "embedding")]
    for layer in range(LAYERS):
        slots += _attention(layer) + _layer(architecture, layer)
    slots.append(Slot("decoder.final_layernorm.weight", ("model.norm",), (64,), "norm"))
    if not tied:
        slots.append(Slot("output_layer.weight", ("lm_head",), (512, 64), "output"))
    return slots


def shared_experts() -> list[Slot]:
    """One shared expert, beside the routed ones."""
    return _dense_mlp(0, "mlp.shared_experts", "mlp.shared_expert")
