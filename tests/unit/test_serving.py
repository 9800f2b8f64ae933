"""Only exports that an engine cannot serve are refused, with the nearest that it can."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_quant.ckpt.convert import whole_tensors
from megatron_quant.ckpt.dialects.registry import DIALECTS
from megatron_quant.ckpt.plan.quantizable import slots
from megatron_quant.engines.facts import ENGINES, FACTS, READS
from megatron_quant.engines.serving import check_serving, obstacle
from megatron_quant.errors import FormatError
from megatron_quant.models import Param, lookup
from megatron_quant.recipes.load import load_recipe
from megatron_quant.recipes.parse import parse_recipe
from megatron_quant.recipes.plan import QuantPlan
from megatron_quant.recipes.resolution import resolve

from . import tiny

CT = "compressed-tensors"
DENSE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
MOE = {**DENSE, "moe_intermediate_size": 256, "num_experts": 8}


def params(name: str, **sizes: int) -> tuple[Param, ...]:
    base = DENSE if name in ("llama", "qwen3") else MOE
    config: dict[str, Any] = {**tiny.config(name), **base, **sizes}
    return lookup(config).params(config)


def plan(recipe: str, of: tuple[Param, ...]) -> QuantPlan:
    return resolve(load_recipe(recipe), slots(of))


def grouped(name: str, group_size: object, of: tuple[Param, ...]) -> QuantPlan:
    weights = {"format": name, "group_size": group_size}
    rule = {"quantize": ["*self_attn*", "*mlp*", "*experts*"], "weights": weights}
    return resolve(parse_recipe("mine", {"rules": [rule]}), slots(of))


def refusal(chosen: QuantPlan, of: tuple[Param, ...], *args: Any) -> str:
    with pytest.raises(FormatError) as error:
        check_serving(chosen, of, *args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_table_knows_every_dialect() -> None:
    assert {d for read in READS.values() for d in read} == set(DIALECTS)
    assert {f.dialect for f in FACTS} <= set(DIALECTS)
    assert all(f.dialect in READS[engine] for f in FACTS for engine in f.engines)


@pytest.mark.parametrize(
    ("engine", "dialect", "instead"),
    [
        ("transformers", "modelopt", CT),
        ("tensorrt-llm", CT, "modelopt"),
        ("tensorrt-llm", "gptq", "modelopt"),
    ],
)
def test_dialect_that_an_engine_does_not_read(engine: str, dialect: str, instead: str) -> None:
    of = params("llama")
    message = refusal(plan("int4", of), of, dialect, engine)
    assert message == (
        f"{engine} cannot serve this: {engine} does not read {dialect}; "
        f"take --export-format {instead}"
    )


EXPERT, LAYER = "qwen3_moe", "llama"


@pytest.mark.parametrize(
    ("engine", "dialect", "recipe", "model", "reason", "instead"),
    [
        ("vllm", "modelopt", "int4", LAYER, "W4A16_AWQ is read by Ten", "compressed-tensors"),
        ("sglang", "modelopt", "int4", LAYER, "W4A16_AWQ is read by Ten", "compressed-tensors"),
        ("vllm", "modelopt", "w4a8", LAYER, "W4A8_AWQ is read by Tensor", "w4a8_dynamic with"),
        ("tensorrt-llm", "modelopt", "mxfp8", LAYER, "no quant_algo MXFP8", "recipe fp8_block"),
        ("tensorrt-llm", "modelopt", "w4a16_nvfp4", LAYER, "W4A16_NVFP4", "recipe nvfp4"),
        ("vllm", CT, "w4a8", LAYER, "dynamic FP8 inputs only", "recipe w4a8_dynamic"),
        ("transformers", CT, "int4_asym", LAYER, "zero points fail to load", "recipe int4"),
        ("transformers", CT, "fp8_block", EXPERT, "are not converted", "--export-format fp8"),
        ("transformers", CT, "int8", EXPERT, "are not converted", "fp8_channel or int8_group"),
        ("transformers", CT, "nvfp4", EXPERT, "global scales are ignored", "recipe mxfp4"),
        ("transformers", CT, "fp8_attention_nvfp4_mlp", EXPERT, "mixed precision", "one format"),
        ("vllm", "gptq", "int4_asym", LAYER, "sym=false is refused", "awq or compressed"),
    ],
)
def test_combination_that_an_engine_rejects_or_misreads(
    engine: str, dialect: str, recipe: str, model: str, reason: str, instead: str
) -> None:
    of = params(model)
    message = refusal(plan(recipe, of), of, dialect, engine)
    assert message.startswith(f"{engine} cannot serve this: ")
    what, _, way_out = message.partition("; take ")
    assert reason in what
    assert instead in way_out


@pytest.mark.parametrize("weights", ["fp8", "fp8_channel"])
def test_fp8_experts_of_vllm_need_inputs(weights: str) -> None:
    rule = {"quantize": ["*self_attn*", "*mlp*", "*experts*"], "weights": weights}
    recipe = parse_recipe("mine", {"rules": [rule]})
    of = params(EXPERT)
    message = refusal(resolve(recipe, slots(of)), of, CT, "vllm")
    assert "experts.0.gate_proj: FP8 experts need quantized inputs there; take inputs of" in message
    dense = params(LAYER)
    check_serving(resolve(recipe, slots(dense)), dense, CT, "vllm")


@pytest.mark.parametrize(
    ("recipe", "dialect", "engine"),
    [
        ("fp8", "modelopt", "vllm"),
        ("nvfp4", "modelopt", "tensorrt-llm"),
        ("int4", "modelopt", "tensorrt-llm"),
        ("w4a8", "modelopt", "tensorrt-llm"),
        ("mxfp8", "modelopt", "vllm"),
        ("fp8_attention_nvfp4_mlp", "modelopt", "vllm"),
        ("fp8_channel", CT, "vllm"),
        ("fp8_channel", CT, "transformers"),
        ("int4", CT, "transformers"),
        ("w4a8_dynamic", CT, "vllm"),
        ("int8", CT, "vllm"),
        ("nvfp4", CT, "vllm"),
        ("mxfp4", CT, "transformers"),
        ("int4", "gptq", "vllm"),
        ("int4_asym", "awq", "vllm"),
        ("int4_asym", "auto-round", "vllm"),
        ("fp8_block", "fp8", "transformers"),
        ("fp8_block", "fp8", "sglang"),
    ],
)
def test_combination_that_is_served(recipe: str, dialect: str, engine: str) -> None:
    for model in (EXPERT, LAYER):
        of = params(model)
        check_serving(plan(recipe, of), of, dialect, engine, 2 if engine == "vllm" else None)


def test_without_an_engine_one_that_serves_it_is_enough() -> None:
    of = params(EXPERT)
    for recipe, dialect in (("int4", "modelopt"), ("nvfp4", CT), ("int4_asym", CT)):
        check_serving(plan(recipe, of), of, dialect)
    ragged = params(EXPERT, moe_intermediate_size=192)
    check_serving(plan("int4", ragged), ragged, "gptq")  # no shapes without an engine or a size
    check_serving(plan("fp8_block", ragged), ragged, CT)  # whose last block may be smaller


@pytest.mark.parametrize("recipe", ["int4", "int4_asym", "int8_group"])
def test_groups_that_rows_do_not_fill_are_refused_in_compressed_tensors(recipe: str) -> None:
    """Without an engine or a size too: its own library refuses them, as every engine does."""
    ragged = params(EXPERT, moe_intermediate_size=192)
    assert refusal(plan(recipe, ragged), ragged, CT) == (
        "no engine can serve this: model.layers.0.mlp.experts.0.down_proj: its 192 inputs end "
        "inside a group of 128; take group_size: 64"
    )


def test_without_an_engine_what_none_serves_is_refused() -> None:
    of = params(EXPERT, moe_intermediate_size=192)
    message = refusal(plan("int4", of), of, "gptq", None, 1)
    assert message.startswith("no engine can serve this: model.layers.0.mlp.experts.0.down_proj at")


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4", "int8", "fp8_block"])
def test_engine_that_is_not_known(recipe: str) -> None:
    of = params(LAYER)
    message = refusal(plan(recipe, of), of, CT, "llama.cpp")
    assert message == f"--serve-engine 'llama.cpp' is not one of {', '.join(ENGINES)}"
    assert refusal(plan(recipe, of), of, CT, None, 0) == "--serve-tp is 0: give at least 1"


@pytest.mark.parametrize(
    ("size", "group", "tp", "instead"),
    [
        (768, 128, 4, "group_size: 64 or --serve-tp 3"),
        (768, 128, 8, "group_size: 32 or --serve-tp 6"),
        (704, 128, 1, "group_size: 64"),
        (704, 64, 2, "group_size: 32 or --serve-tp 1"),
        (704, 64, 4, "group_size: channel or --serve-tp 1"),
        (384, 128, 2, "group_size: 64 or --serve-tp 1"),
    ],
)
@pytest.mark.parametrize("dialect", [CT, "gptq"])
def test_group_that_a_serving_rank_would_cut(
    dialect: str, size: int, group: int, tp: int, instead: str
) -> None:
    heads = {"num_attention_heads": 24, "num_key_value_heads": 24, "hidden_size": 3072}
    of = params(EXPERT, moe_intermediate_size=size, **heads)
    message = refusal(grouped("int4", group, of), of, dialect, "vllm", tp)
    assert (
        f"experts.0.down_proj at tensor-parallel size {tp}: a rank's {size // tp} inputs end "
        f"inside a group of {group}; take {instead}" in message
    )


@pytest.mark.parametrize("dialect", [CT, "gptq", "awq"])
def test_the_proposed_group_size_works(dialect: str) -> None:
    of = params(EXPERT, moe_intermediate_size=704)
    for group, tp in ((32, 2), (64, 1), ("channel", 4)):
        check_serving(grouped("int4", group, of), of, dialect, "vllm", tp)


def test_channels_may_be_cut_between_words_only() -> None:
    of = params(LAYER, intermediate_size=520)
    check_serving(grouped("int4", "channel", of), of, CT, "vllm", 1)
    check_serving(grouped("int8_group", "channel", of), of, CT, "vllm", 2)
    message = refusal(grouped("int4", "channel", of), of, CT, "vllm", 2)
    assert "a rank's 260 inputs end inside a word of 8; take --serve-tp 1" in message


def test_blocks_that_a_serving_rank_would_cut() -> None:
    of = params(LAYER, intermediate_size=768)
    check_serving(plan("fp8_block", of), of, "fp8", "vllm", 2)
    message = refusal(plan("fp8_block", of), of, "fp8", "vllm", 4)
    assert "gate_proj at tensor-parallel size 4: a rank's 192 outputs end inside a block" in message
    assert message.endswith("; take --serve-tp 2")
    ragged = params(LAYER, intermediate_size=448)
    message = refusal(plan("fp8_block", ragged), ragged, "fp8", "vllm", 1)
    assert "gate_proj at tensor-parallel size 1: a rank's 448 outputs" in message
    assert message.endswith("; take a format with a scale per channel, such as fp8_channel")


@pytest.mark.parametrize(
    ("recipe", "size", "tp", "group"), [("nvfp4", 48, 2, 16), ("mxfp4", 96, 2, 32)]
)
def test_blocks_of_microscaling_formats(recipe: str, size: int, tp: int, group: int) -> None:
    of = params(EXPERT, moe_intermediate_size=size)
    check_serving(plan(recipe, of), of, CT, "vllm", 1)
    message = refusal(plan(recipe, of), of, CT, "vllm", tp)
    assert (
        f"a rank's {size // tp} inputs end inside a group of {group}; take --serve-tp 1" in message
    )


def test_zero_points_are_packed_along_the_outputs() -> None:
    of = params(LAYER, intermediate_size=576)
    message = refusal(grouped("int4_asym", 32, of), of, CT, "vllm", 16)
    assert "a rank's 36 outputs end inside a word of 8" in message


def test_size_that_does_not_divide_the_weights() -> None:
    of = params(LAYER)
    message = refusal(plan("fp8", of), of, CT, "vllm", 3)
    assert "it does not divide the weight's 256 x 512; take --serve-tp 2" in message


def test_few_key_value_heads_are_copied() -> None:
    of = params(LAYER, hidden_size=512, intermediate_size=1024)
    check_serving(plan("fp8_block", of), of, CT, "vllm", 4)


def test_transformers_has_no_shape_rules() -> None:
    of = params(LAYER, intermediate_size=448)
    check_serving(plan("fp8_block", of), of, "fp8", "transformers", 4)


def test_plan_of_whole_tensors() -> None:
    """As the export verb has it: one slot for each Hugging Face tensor."""
    of = params(EXPERT, moe_intermediate_size=192)
    recipe = load_recipe("int4")
    by_source = {s: d for d in resolve(recipe, slots(of)).decisions for s in d.slot.sources}
    decisions = [
        replace(by_source[slot.sources[0]], slot=slot) for slot in slots(whole_tensors(of))
    ]
    taken_apart = QuantPlan("int4", tuple(decisions))
    assert refusal(taken_apart, of, CT, "vllm") == refusal(plan("int4", of), of, CT, "vllm")


def test_fused_members_of_two_formats() -> None:
    of = params(LAYER)
    decisions = []
    for slot in slots(whole_tensors(of)):
        weights = None if slot.fixed or "up_proj" in slot.name else load_recipe("int4").rules[0]
        by = plan("int4", of).quantized[0]
        chosen = by.weights if weights else None
        decisions.append(replace(by, slot=slot, weights=chosen))
    message = refusal(QuantPlan("mine", tuple(decisions)), of, CT, "vllm")
    assert (
        "gate_proj and model.layers.0.mlp.up_proj are fused but differ in format; take one format"
        in message
    )


def test_obstacle_is_what_the_dry_run_shows() -> None:
    of = params(EXPERT)
    chosen = plan("nvfp4", of)
    assert obstacle(chosen, of, "modelopt", "vllm", 1) is None
    found = obstacle(chosen, of, "modelopt", "transformers", 1)
    assert found is not None
    assert found.instead == "--export-format compressed-tensors"


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
def test_gpt_oss_has_its_experts_loaded_as_stacks_there(engine: str) -> None:
    of, config = params("gpt_oss"), tiny.config("gpt_oss")
    for given in (of, whole_tensors(of)):
        said = refusal(plan("int8", given), given, CT, engine, None, config)
        assert "experts.0.gate_proj is quantized" in said and "--export-format mxfp4" in said
    check_serving(plan("int8", of), of, CT, None, None, config)
    check_serving(plan("gpt_oss", of), of, "mxfp4", engine, 8, config)  # 32 / 8 is no group


def test_only_gpt_oss_has_such_stacks() -> None:
    of = params("qwen3_moe")
    said = refusal(
        plan("nvfp4_experts_only", of), of, "mxfp4", None, None, tiny.config("qwen3_moe")
    )
    assert "gpt-oss's alone" in said
