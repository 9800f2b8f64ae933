"""A small MoE as values, and every rank of a layout at once, for tests of the export."""

from functools import cache

import torch

from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.ckpt.plan.export_plan import ExportPlan, plan_export
from megatron_quant.ckpt.plan.parts import RankPart
from megatron_quant.ckpt.plan.placing import StorageRules
from megatron_quant.ckpt.plan.quantizable import slots
from megatron_quant.ckpt.plan.ranks import Layout
from megatron_quant.formats.spec import Format, get_format
from megatron_quant.models import Param, copies, local_shape, lookup
from megatron_quant.recipes.plan import Decision, QuantPlan

EXPERTS = 4
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
LAYOUTS = {  # world, tp, ep, etp
    "tp1": (1, 1, 1, 1),
    "tp2": (2, 2, 1, 1),
    "ep2": (2, 1, 2, 1),
    "tp4": (4, 4, 1, 1),
    "tp2-ep2": (4, 2, 2, 1),
    "tp2-ep4-of-8": (8, 2, 4, 1),
    "tp2-etp2": (4, 2, 2, 2),
    "dp4": (4, 1, 1, 1),
}
RECIPES: dict[str, tuple[str, Format | None, Format | None]] = {
    "fp8": ("modelopt", get_format("fp8"), get_format("fp8")),
    "nvfp4": ("compressed-tensors", get_format("nvfp4"), get_format("nvfp4")),
    "w4a16_nvfp4": ("modelopt", get_format("nvfp4"), None),
    "int4": ("compressed-tensors", get_format("int4", 32), None),
    "int4-awq": ("modelopt", get_format("int4", 32), None),
    "none": ("modelopt", None, None),
}


@cache
def model() -> tuple[Param, ...]:
    return lookup(CONFIG).params(CONFIG)


def quant(recipe: str, params: tuple[Param, ...]) -> QuantPlan:
    _, weights, inputs = RECIPES[recipe]
    decisions = (
        Decision(slot=slot, rule="test")
        if slot.fixed
        else Decision(slot=slot, rule="test", weights=weights, inputs=inputs)
        for slot in slots(params)
    )
    return QuantPlan(recipe, tuple(decisions))


def plan(
    recipe: str,
    layout: str,
    params: tuple[Param, ...] = (),
    max_shard: int = 40_000,
    dtype: torch.dtype = torch.bfloat16,
) -> ExportPlan:
    params = params or model()
    return plan_export(
        params,
        quant(recipe, params),
        Layout.simulate(*LAYOUTS[layout], experts=EXPERTS),
        StorageRules(
            dialect=get_dialect(RECIPES[recipe][0]), dtype=dtype, max_shard_bytes=max_shard
        ),
    )


@cache
def weights() -> dict[str, torch.Tensor]:
    """Hugging Face tensors of the model, bf16, by name."""
    rng = torch.Generator().manual_seed(0)
    sources = (source for param in model() for source in param.sources)
    return {s.name: torch.randn(s.shape, generator=rng).bfloat16() for s in sources}


def local(param: Param, layout: Layout, rank: int) -> torch.Tensor:
    """What a rank holds of a parameter."""
    shard = layout.shard_of(param, rank)
    assert shard is not None, f"rank {rank} lacks {param.name}"
    held = torch.zeros(local_shape(param, *shard), dtype=torch.bfloat16)
    for copy in copies(param, *shard):
        held[copy.dst.index] = weights()[copy.source.name][copy.src.index]
    return held


def weight_amax(param: Param) -> torch.Tensor:
    return torch.stack([weights()[s.name].float().abs().amax() for s in param.sources]).amax()


def input_amax(part: RankPart) -> torch.Tensor:
    return torch.tensor(3.0 + (part.param.layer or 0))
