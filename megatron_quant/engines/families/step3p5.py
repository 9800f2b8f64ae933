"""Step-3.5 and Step-3.7: stacks of gate, up and down apart."""

from megatron_quant.engines.families.record import Called, Family, RunAs, Stack

FAMILY = Family(
    title="Step-3.5, Step-3.7",
    classes=("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"),
    kinds=("step3p5", "step3p7"),
    loaded=((r"mlp\.shared_experts\.", "share_expert."),),
    runs_as=(RunAs(of="step3p5", kind="step3p7", tower={"width": 8, "layers": 1, "heads": 1}),),
    called=(
        Called(
            modules=r"(.*\blayers\.\d+)\.((?:self_attn|mlp|moe|share_expert)\..+)",
            engine=r"\1.mtp_block.\2",
            source="vLLM step3p5_mtp.py: the prefix of its decoder layer",
            drafts=True,
        ),
        Called(
            modules=r"(.*\blayers\.\d+)\.transformer\.shared_head\.output",
            engine=r"\1.shared_head.head",
            source="vLLM step3p5_mtp.py: drops .transformer, calls the output head",
            drafts=True,
        ),
    ),
    stacks=(
        Stack(names=r"(.*\bmoe)\.gate_proj\.weight", holds="gate_proj"),
        Stack(names=r"(.*\bmoe)\.up_proj\.weight", holds="up_proj"),
        Stack(names=r"(.*\bmoe)\.down_proj\.weight", holds="down_proj"),
    ),
)
