"""Ernie-4.5."""

from megatron_quant.engines.families.record import Called, Family

FAMILY = Family(
    title="Ernie-4.5",
    classes=("Ernie4_5_MoeForCausalLM",),
    kinds=("ernie4_5_moe",),
    called=(
        Called(
            modules=r"model\.mtp_block\.0\.(.+)",
            engine=r"model.layers.{layer}.\1",
            source="vLLM ernie_mtp.py: numbered on from the model's layers",
            drafts=True,
        ),
    ),
)
