"""NemotronH (Nemotron-3): Mamba, attention and latent experts, one mixer a layer."""

from megatron_quant.engines.families.record import Dense, Family

FAMILY = Family(
    title="Nemotron-3 (NemotronH)",
    classes=("NemotronHForCausalLM",),
    kinds=("nemotron_h",),
    embedding="embeddings",
    layers=("num_hidden_layers", "hybrid_override_pattern", "layers_block_type"),
    gated=False,
    dense=(
        Dense(
            names=r"mixer\.fc[12]_latent_proj\.weight",
            source="every published recipe: ModelOpt's mamba_moe presets, llm-compressor",
        ),
    ),
)
