"""gpt-oss."""

from megatron_quant.engines.families.record import Family, Layout

FAMILY = Family(
    title="gpt-oss",
    classes=("GptOssForCausalLM",),
    kinds=("gpt_oss",),
    layout=Layout.ALTERNATING,
    stacked=True,  # vLLM, SGLang and transformers: gpt_oss.py skips single experts without a word
    head_reason="vLLM builds its output layer without a quantization config",
)
