"""NemotronH (Nemotron-3): Mamba, attention and latent experts, one mixer a layer."""

from megatron_quant.engines.families.record import Dense, Family, Merged

FAMILY = Family(
    title="Nemotron-3 (NemotronH)",
    classes=("NemotronHForCausalLM",),
    kinds=("nemotron_h",),
    embedding="embeddings",
    layers=("num_hidden_layers", "hybrid_override_pattern", "layers_block_type"),
    gated=False,
    merged=(
        Merged(
            modules=r".*\.mixer\.in_proj",
            parts=(
                ("mamba_num_heads", "mamba_head_dim"),
                ("n_groups", "ssm_state_size"),
                ("mamba_num_heads",),
            ),
            source="vLLM mamba_mixer2.py: five merged shards",
        ),
    ),
    dense=(
        Dense(
            names=r"mixer\.fc[12]_latent_proj\.weight",
            source="every published recipe: ModelOpt's mamba_moe presets, llm-compressor",
        ),
    ),
)
