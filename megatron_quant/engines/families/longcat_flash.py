"""LongCat-Flash: two attentions a layer, and experts that compute nothing."""

from megatron_quant.engines.families.record import Called, Family

FAMILY = Family(
    title="LongCat-Flash",
    classes=("LongcatFlashForCausalLM",),
    kinds=("longcat_flash",),
    layers=("num_layers", "num_hidden_layers"),
    dense_key="disable_quant_module",
    idle_key="zero_expert_num",
    called=(
        Called(
            modules=r"(.*\bself_attn\.\d+)\.(?:q_a_proj|kv_a_proj_with_mqa)",
            engine=r"\1.fused_qkv_a_proj",
            source="vLLM longcat_flash.py: not in its packed_modules_mapping",
        ),
        Called(
            modules=r"model\.mtp\.layers\.0\.eh_proj",
            engine="eh_proj",
            source="vLLM longcat_flash_mtp.py: a prefix of its own",
            drafts=True,
        ),
        Called(
            modules=r"model\.mtp\.layers\.0\.(?:transformer_layer\.)?((?:self_attn|mlp)\..+)",
            engine=r"model.layers.{layer}.\1",
            source="vLLM longcat_flash_mtp.py: numbered on, two to a layer",
            drafts=True,
            numbered=2,
        ),
    ),
)
