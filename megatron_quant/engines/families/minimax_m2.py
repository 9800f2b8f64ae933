"""MiniMax-M2: engines build its experts under another name."""

from megatron_quant.engines.families.record import Called, Family

FAMILY = Family(
    title="MiniMax-M2",
    classes=("MiniMaxM2ForCausalLM",),
    kinds=("minimax_m2",),
    called=(
        Called(
            modules=r"(.*\blayers\.\d+)\.block_sparse_moe\.experts\.(.+)",
            engine=r"\1.mlp.experts.\2",
            source="vLLM minimax_m2.py: the block is built as layers.N.mlp",
        ),
    ),
)
