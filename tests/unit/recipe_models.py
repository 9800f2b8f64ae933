"""Slots of two-layer models of the four architectures, as the recipes see them."""

from megatron_quant.recipes.plan import Slot

LAYERS, EXPERTS = 2, 4


def _attention(layer: int) -> list[Slot]:
    megatron, hf = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}.self_attn"
    qkv = tuple(f"{hf}.{p}_proj" for p in "qkv")
    norm = f"model.layers.{layer}.input_layernorm"
    return [
        Slot(
            name=f"{megatron}.linear_qkv.layer_norm_weight",
            sources=(norm,),
            shape=(64,),
            fixed="norm",
        ),
        Slot(name=f"{megatron}.linear_qkv.weight", sources=qkv, shape=(128, 64)),
        Slot(
            name=f"{megatron}.q_layernorm.weight",
            sources=(f"{hf}.q_norm",),
            shape=(16,),
            fixed="norm",
        ),
        Slot(name=f"{megatron}.linear_proj.weight", sources=(f"{hf}.o_proj",), shape=(64, 64)),
    ]


def _dense_mlp(layer: int, megatron_mlp: str = "mlp", hf_mlp: str = "mlp") -> list[Slot]:
    megatron, hf = f"decoder.layers.{layer}.{megatron_mlp}", f"model.layers.{layer}.{hf_mlp}"
    fused = (f"{hf}.gate_proj", f"{hf}.up_proj")
    return [
        Slot(name=f"{megatron}.linear_fc1.weight", sources=fused, shape=(256, 64)),
        Slot(name=f"{megatron}.linear_fc2.weight", sources=(f"{hf}.down_proj",), shape=(64, 128)),
    ]


def _moe(layer: int, block: str, gate: str, up: str, down: str) -> list[Slot]:
    megatron, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.{block}"
    slots = [
        Slot(
            name=f"{megatron}.router.weight",
            sources=(f"{hf}.gate",),
            shape=(EXPERTS, 64),
            fixed="router",
        )
    ]
    for e in range(EXPERTS):
        fc1 = (f"{hf}.experts.{e}.{gate}", f"{hf}.experts.{e}.{up}")
        fc2 = (f"{hf}.experts.{e}.{down}",)
        slots.append(
            Slot(name=f"{megatron}.experts.linear_fc1.weight{e}", sources=fc1, shape=(128, 64))
        )
        slots.append(
            Slot(name=f"{megatron}.experts.linear_fc2.weight{e}", sources=fc2, shape=(64, 64))
        )
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
    slots = [
        Slot(
            name="embedding.word_embeddings.weight",
            sources=embedding,
            shape=(512, 64),
            fixed="embedding",
        )
    ]
    for layer in range(LAYERS):
        slots += _attention(layer) + _layer(architecture, layer)
    slots.append(
        Slot(
            name="decoder.final_layernorm.weight",
            sources=("model.norm",),
            shape=(64,),
            fixed="norm",
        )
    )
    if not tied:
        slots.append(
            Slot(name="output_layer.weight", sources=("lm_head",), shape=(512, 64), fixed="output")
        )
    return slots


def shared_experts() -> list[Slot]:
    """One shared expert, beside the routed ones."""
    return _dense_mlp(0, "mlp.shared_experts", "mlp.shared_expert")
