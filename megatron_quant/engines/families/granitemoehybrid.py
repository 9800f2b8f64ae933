"""Granite-4: Mamba and attention, stacks of experts with names of their own."""

from megatron_quant.engines.families.record import Called, Family, Merged, Stack

FAMILY = Family(
    title="Granite-4",
    classes=("GraniteMoeHybridForCausalLM",),
    kinds=("granitemoehybrid",),
    merged=(
        Merged(
            modules=r".*\.mamba\.in_proj",
            parts=(
                ("mamba_n_heads", "mamba_d_head"),
                ("mamba_n_groups", "mamba_d_state"),
                ("mamba_n_heads",),
            ),
            source="vLLM mamba_mixer2.py: five merged shards",
        ),
    ),
    called=(
        Called(
            modules=r"(.*\blayers\.\d+)\.mamba\.(.+)",
            engine=r"\1.mixer.\2",
            source="vLLM granitemoehybrid.py: the prefix of its Mamba mixer",
        ),
    ),
    stacks=(
        Stack(names=r"(.*\bblock_sparse_moe)\.input_linear\.weight", holds="gate_up_proj"),
        Stack(names=r"(.*\bblock_sparse_moe)\.output_linear\.weight", holds="down_proj"),
    ),
)
