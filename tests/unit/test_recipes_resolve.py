"""From a recipe and slots to a plan: every weight in one bucket, or an error that says why."""

from dataclasses import replace

import pytest

from megatron_quant.errors import CoverageError, RecipeError
from megatron_quant.recipes.coverage import AuditRow, audit
from megatron_quant.recipes.kv_cache import cache_slots
from megatron_quant.recipes.load import load_recipe, recipe_names
from megatron_quant.recipes.parse import parse_recipe
from megatron_quant.recipes.plan import QuantPlan, Slot
from megatron_quant.recipes.resolution import resolve
from megatron_quant.recipes.schema import Recipe, with_kv_cache

from .recipe_models import EXPERTS, LAYERS, model, shared_experts

ARCHITECTURES = ["qwen3_moe", "mixtral", "qwen3", "llama"]
MOE = ["qwen3_moe", "mixtral"]
ATTENTION, EXPERT = 2 * LAYERS, 2 * LAYERS * EXPERTS
EVERY_LINEAR = sorted(set(recipe_names()) - {"nvfp4_mlp_only", "nvfp4_experts_only"})


def recipe(*rules: dict) -> Recipe:
    return parse_recipe("mine", {"rules": list(rules)})


def quantize(*patterns: str, weights: object = "nvfp4") -> dict:
    return {"quantize": list(patterns), "weights": weights}


def exclude(*patterns: str) -> dict:
    return {"exclude": list(patterns)}


def quantized(plan: QuantPlan) -> set[str]:
    return {d.slot.name for d in plan.quantized}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", EVERY_LINEAR)
@pytest.mark.parametrize("tied", [False, True])
def test_shipped_recipes_quantize_every_linear(architecture: str, name: str, tied: bool) -> None:
    slots = model(architecture, tied)
    plan = resolve(load_recipe(name), slots)
    assert [d.slot for d in plan.decisions] == slots
    assert quantized(plan) == {s.name for s in slots if not s.fixed}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlp_only_leaves_attention(architecture: str) -> None:
    slots = model(architecture)
    plan = resolve(load_recipe("nvfp4_mlp_only"), slots)
    assert quantized(plan) == {s.name for s in slots if not s.fixed and ".mlp." in s.name}


@pytest.mark.parametrize("architecture", MOE)
def test_experts_only_leaves_attention_and_shared_experts(architecture: str) -> None:
    slots = model(architecture) + shared_experts()
    plan = resolve(load_recipe("nvfp4_experts_only"), slots)
    assert quantized(plan) == {s.name for s in slots if ".mlp.experts." in s.name}


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_experts_only_refuses_a_dense_model(architecture: str) -> None:
    message = r"'nvfp4_experts_only', rule 1 \(\*\.experts\.\*\): matches no weight of this model"
    with pytest.raises(RecipeError, match=message):
        resolve(load_recipe("nvfp4_experts_only"), model(architecture))


def test_decisions_carry_formats_and_rules() -> None:
    plan = resolve(load_recipe("nvfp4_experts_only"), model("qwen3_moe"))
    expert = plan.by_name["decoder.layers.1.mlp.experts.linear_fc1.weight3"]
    assert (expert.weights.name, expert.inputs.name) == ("nvfp4", "nvfp4")
    assert expert.rule == "rule 1: nvfp4+nvfp4 *.experts.*"
    proj = plan.by_name["decoder.layers.0.self_attention.linear_proj.weight"]
    assert not proj.quantized
    assert proj.rule == "rule 2: exclude *"
    router = plan.by_name["decoder.layers.0.mlp.router.weight"]
    assert (router.weights, router.inputs) == (None, None)
    assert router.rule == "router: never quantized"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mixed_precision(architecture: str) -> None:
    plan = resolve(load_recipe("fp8_attention_nvfp4_mlp"), model(architecture))
    formats = {
        (".self_attention." in d.slot.name, d.weights.name, d.inputs.name) for d in plan.quantized
    }
    assert formats == {(True, "fp8", "fp8"), (False, "nvfp4", "nvfp4")}


def test_a_layer_stays_by_patterns() -> None:
    rules = recipe(
        exclude("model.layers.0.*"), quantize("*self_attn*", weights="fp8"), quantize("*.experts.*")
    )
    plan = resolve(rules, model("mixtral"))
    assert {d.slot.name.split(".")[2] for d in plan.quantized} == {"1"}
    assert {d.weights.name for d in plan.quantized} == {"fp8", "nvfp4"}


def test_algorithm_and_cache_reach_the_plan() -> None:
    plan = resolve(load_recipe("nvfp4_four_over_six"), model("qwen3_moe"))
    assert {d.algorithm for d in plan.quantized} == {"four_over_six"}
    assert {d.algorithm for d in plan.decisions if not d.quantized} == {"max"}
    assert plan.quantized[0].rule.startswith("rule 1: nvfp4+nvfp4 (four_over_six) ")
    assert plan.kv_cache == ""
    cached = resolve(with_kv_cache(load_recipe("int4"), "fp8_cast"), model("llama"))
    assert cached.kv_cache == "fp8_cast"


@pytest.mark.parametrize(
    ("name", "kv_cache", "needed"),
    [
        ("fp8", "", True),
        ("nvfp4", "", True),
        ("int8_static", "", True),
        ("w4a8", "", True),
        ("fp8_channel", "", False),
        ("fp8_block", "", False),
        ("int8", "", False),
        ("mxfp8", "", False),
        ("int4", "", False),
        ("int4", "fp8_cast", False),
        ("int4", "fp8", True),
    ],
)
def test_what_needs_calibration_data(name: str, kv_cache: str, needed: bool) -> None:
    chosen = replace(load_recipe(name), kv_cache=kv_cache)
    assert resolve(chosen, model("llama")).needs_data is needed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_attention_is_cached(architecture: str) -> None:
    chosen = with_kv_cache(load_recipe("nvfp4_mlp_only"), "fp8")
    names = [s.name for s in cache_slots(resolve(chosen, model(architecture)))]
    assert names == [f"model.layers.{i}.self_attn.{p}" for i in range(LAYERS) for p in "kv"]
    assert cache_slots(resolve(load_recipe("fp8"), model(architecture))) == ()


def test_first_matching_rule_wins() -> None:
    rules = recipe(exclude("*layers.0.*"), quantize("*self_attn*", weights="fp8"), quantize("*"))
    plan = resolve(rules, model("llama"))
    formats = {d.slot.name: d.weights and d.weights.name for d in plan.decisions}
    assert formats["decoder.layers.0.mlp.linear_fc1.weight"] is None
    assert formats["decoder.layers.1.self_attention.linear_qkv.weight"] == "fp8"
    assert formats["decoder.layers.1.mlp.linear_fc1.weight"] == "nvfp4"


def test_megatron_module_names_match_too() -> None:
    rules = recipe(
        quantize("decoder.layers.*.mlp.experts.linear_fc?"), exclude("*linear_qkv", "*proj")
    )
    plan = resolve(rules, model("mixtral"))
    assert len(plan.quantized) == EXPERT


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(RecipeError, match=r"\(\*MLP\*\): matches no weight"):
        resolve(recipe(quantize("*"), exclude("*MLP*")), model("llama"))


def test_members_named_one_by_one_claim_the_fused_weight() -> None:
    rules = recipe(exclude("*.q_proj", "*.k_proj", "*.v_proj"), quantize("*"))
    plan = resolve(rules, model("llama"))
    assert not plan.by_name["decoder.layers.0.self_attention.linear_qkv.weight"].quantized
    assert plan.by_name["decoder.layers.0.self_attention.linear_proj.weight"].quantized


def test_a_rule_that_names_some_members() -> None:
    message = (
        r"rule 1: exclude \*\.q_proj: matches model.layers.0.self_attn.q_proj but not "
        r"model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj, .*all of them or none"
    )
    with pytest.raises(CoverageError, match=message):
        resolve(recipe(exclude("*.q_proj"), quantize("*")), model("llama"))


def test_members_claimed_by_different_rules() -> None:
    rules = recipe(exclude("*.q_proj"), exclude("*.k_proj", "*.v_proj"), quantize("*"))
    with pytest.raises(CoverageError, match="which are fused with it"):
        resolve(rules, model("llama"))


def test_unclaimed_weights_are_named() -> None:
    message = (
        r"'mine' says nothing about decoder.layers.0.self_attention.linear_qkv.weight "
        r"\(model.layers.0.self_attn.q_proj, .*\), .* and 1 more: match them in a quantize or"
    )
    with pytest.raises(CoverageError, match=message):
        resolve(recipe(quantize("*mlp*")), model("llama"))


def test_rule_that_matches_nothing() -> None:
    message = r"rule 2 \(\*vision\*, \*audio\*\): matches no weight of this model: correct"
    with pytest.raises(RecipeError, match=message):
        resolve(recipe(quantize("*"), exclude("*vision*", "*audio*")), model("llama"))


def test_a_typo_is_reported_before_the_weights_that_it_leaves() -> None:
    with pytest.raises(RecipeError, match=r"\(\*self_atn\*\): matches no weight"):
        resolve(recipe(quantize("*mlp*"), exclude("*self_atn*")), model("llama"))


def test_rule_whose_weights_an_earlier_rule_took() -> None:
    message = (
        r"rule 2 \(\*mlp\*\): every weight it matches is claimed before it \(rule 1: nvfp4 \*\)"
    )
    with pytest.raises(RecipeError, match=message):
        resolve(recipe(quantize("*"), exclude("*mlp*")), model("llama"))


@pytest.mark.parametrize("pattern", ["*lm_head*", "output_layer", "*norm*", "model.embed_tokens"])
def test_excluding_what_is_never_quantized_is_fine(pattern: str) -> None:
    plan = resolve(recipe(quantize("*"), exclude(pattern)), model("llama"))
    assert plan.by_name["output_layer.weight"].rule == "output: never quantized"


def test_quantizing_what_is_never_quantized() -> None:
    message = r"rule 1 \(\*lm_head\*\): matches only weights that are never quantized \(output\)"
    with pytest.raises(RecipeError, match=message):
        resolve(recipe(quantize("*lm_head*"), quantize("*")), model("llama"))


def test_nothing_quantized() -> None:
    with pytest.raises(RecipeError, match="'mine' excludes every weight: add a quantize rule"):
        resolve(recipe(exclude("*")), model("llama"))


@pytest.mark.parametrize(
    "rules",
    [
        [exclude("*.experts.3.*"), quantize("*")],
        [quantize("*.down_proj", weights="fp8"), quantize("*")],
        [
            quantize("*.down_proj", weights={"format": "int4", "group_size": 32}),
            quantize("*", weights="int4"),
        ],
        [{**quantize("*.experts.3.*"), "algorithm": "mse"}, quantize("*")],
    ],
)
def test_experts_of_a_layer_that_differ(rules: list[dict]) -> None:
    with pytest.raises(CoverageError, match="are experts of one layer but differ: give all"):
        resolve(recipe(*rules), model("qwen3_moe"))


def test_layers_may_differ() -> None:
    rules = recipe(exclude("*layers.0.*"), quantize("*"))
    assert len(resolve(rules, model("qwen3_moe")).quantized) == (ATTENTION + EXPERT) // LAYERS


def test_many_experts_of_a_large_model() -> None:
    slots = [
        Slot(
            name=f"decoder.layers.{layer}.mlp.experts.linear_fc2.weight{e}",
            sources=(f"model.layers.{layer}.mlp.experts.{e}.down_proj",),
            shape=(4096, 1536),
        )
        for layer in range(94)
        for e in range(128)
    ]
    assert len(resolve(recipe(quantize("*.experts.*")), slots).quantized) == 94 * 128


def test_audit_counts_rules_and_patterns() -> None:
    rules = load_recipe("nvfp4_experts_only")
    assert audit(resolve(rules, model("mixtral")), rules) == [
        AuditRow(rules.label(0), "nvfp4+nvfp4", EXPERT, (("*.experts.*", EXPERT),)),
        AuditRow(
            rules.label(1),
            "exclude",
            ATTENTION,
            (("*", ATTENTION),),
        ),
        AuditRow("embedding: never quantized", "exclude", 1),
        AuditRow("norm: never quantized", "exclude", 2 * LAYERS + 1),
        AuditRow("router: never quantized", "exclude", LAYERS),
        AuditRow("output: never quantized", "exclude", 1),
    ]


@pytest.mark.parametrize("name", recipe_names())
def test_audit_adds_up(name: str) -> None:
    rules = load_recipe(name)
    slots = model("qwen3_moe")
    assert sum(row.weights for row in audit(resolve(rules, slots), rules)) == len(slots)
