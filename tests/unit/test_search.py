"""Places, costs and the choice among them, without a model's weights."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.dialects import StorageSchemes, get_dialect
from megatron_quant.ckpt.plan import Layout, StorageRules, plan_export, slots
from megatron_quant.engines import check_serving
from megatron_quant.errors import FormatError, RecipeError
from megatron_quant.models import Param, lookup
from megatron_quant.recipes import QuantPlan, difference, load_recipe, parse_recipe, resolve
from megatron_quant.search import (
    Model,
    Problem,
    check_mixtures,
    find_problem,
    to_recipe,
    write_recipe,
)
from megatron_quant.search.solver import solve
from tests.unit import tiny

# 64 and 128 columns everywhere, so that every format fits
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16}
EXPERTS = {"moe_intermediate_size": 128}


def params(name: str, **changes: object) -> tuple[tuple[Param, ...], dict[str, object]]:
    config = tiny.config(name) | SIZES | changes
    return lookup(config).params(config), config


def model(name: str, dialect: str = "modelopt", **changes: object) -> Model:
    found, config = params(name, **changes)
    schemes = StorageSchemes(get_dialect(dialect), torch.bfloat16, {})
    return Model(params=found, config=config, schemes=schemes)


def plans(of: Model, *names: str) -> dict[str, QuantPlan]:
    return {name: resolve(load_recipe(name), slots(of.params)) for name in names}


@pytest.fixture(scope="module")
def moe() -> Model:
    return model("qwen3_moe", **EXPERTS)


@pytest.fixture(scope="module")
def problem(moe: Model) -> Problem:
    return find_problem(moe, plans(moe, "nvfp4", "fp8"))


def scores_by_bits(problem: Problem) -> dict[str, list[float]]:
    """Scores that fall with bytes, in different steps at each place."""
    random.seed(1)
    return {
        p.name: [random.random() * (1 / o.nbytes) if o.rule.weights else 0.0 for o in p.options]
        for p in problem.places
    }


# --- the solver ---------------------------------------------------------------------------------


def brute(costs: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], limit: int) -> float:
    return min(
        sum(s[i] for s, i in zip(scores, chosen, strict=True))
        for chosen in itertools.product(*(range(len(c)) for c in costs))
        if sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= limit
    )


def test_the_choice_is_the_best_of_all_and_within_the_limit() -> None:
    random.seed(0)
    for _ in range(300):
        sizes = [random.randint(1, 4) for _ in range(random.randint(1, 6))]
        costs = [[random.randint(0, 30) for _ in range(n)] for n in sizes]
        scores = [
            [random.choice([random.random(), random.randint(0, 3)]) for _ in c] for c in costs
        ]
        limit = sum(map(min, costs)) + random.randint(0, 60)
        chosen = solve(costs, scores, limit)
        assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= limit
        got = sum(s[i] for s, i in zip(scores, chosen, strict=True))
        assert got == pytest.approx(brute(costs, scores, limit), abs=1e-12)


def test_a_large_model_gets_the_choice_that_an_integer_program_finds() -> None:
    scipy = pytest.importorskip("scipy.optimize")
    numpy = pytest.importorskip("numpy")
    random.seed(2)
    costs, scores = [], []
    for _ in range(48):
        for n in (2048 * 6144, 4096 * 2048, 128 * 3 * 2048 * 768, 2048 * 512):
            worst = random.lognormvariate(0, 2)
            costs.append([n * 9 // 2 + 32, n * 8 + 32, n * 16])
            scores.append([worst, worst * random.uniform(0.02, 0.2), 0.0])
    limit = sum(c[2] for c in costs) // 16 * 21 // 4
    chosen = solve(costs, scores, limit)
    assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= limit
    flat, unit = numpy.array(scores).ravel(), 1e-9
    once = numpy.kron(numpy.eye(len(costs)), numpy.ones(3))
    found = scipy.milp(
        flat,
        integrality=numpy.ones_like(flat),
        bounds=scipy.Bounds(0, 1),
        constraints=[
            scipy.LinearConstraint(once, 1, 1),
            scipy.LinearConstraint(numpy.array(costs).ravel() * unit, -numpy.inf, limit * unit),
        ],
        options={"mip_rel_gap": 0},
    )
    got = sum(s[i] for s, i in zip(scores, chosen, strict=True))
    assert got <= found.fun + 1e-6 * abs(found.fun)


def test_ties_are_broken_by_cost_and_then_by_order() -> None:
    assert solve([[5, 3, 3]], [[1.0, 1.0, 1.0]], 9) == (1,)
    assert solve([[1, 2], [1, 2]], [[1.0, 0.0], [1.0, 0.0]], 3) in ((0, 1), (1, 0))
    again = {solve([[1, 2], [1, 2]], [[1.0, 0.0], [1.0, 0.0]], 3) for _ in range(5)}
    assert len(again) == 1


def test_scores_that_differ_by_many_orders_are_kept_apart() -> None:
    chosen = solve([[1, 2], [1, 2], [1, 2]], [[1e9, 0], [2e-9, 0], [1e-9, 0]], 5)
    assert chosen == (1, 1, 0)


# --- places and costs ---------------------------------------------------------------------------


def names(problem: Problem) -> list[str]:
    return [place.name.removeprefix("model.layers.0.") for place in problem.places]


def test_what_engines_fuse_is_one_place(problem: Problem) -> None:
    assert names(problem)[:3] == [
        "self_attn.o_proj",
        "self_attn.q_proj+k_proj+v_proj",
        "mlp.experts",
    ]
    experts = problem.places[2]
    assert (experts.active, experts.stored, experts.share) == (2, 4, Fraction(1, 2))
    assert len(experts.modules) == 12
    assert [o.candidates for o in experts.options] == [("nvfp4",), ("fp8",), ("none",)]
    assert {p.family for p in problem.places} == {
        "self_attn.o_proj",
        "self_attn.q_proj+k_proj+v_proj",
        "mlp.experts",
    }


def test_shared_experts_and_dense_layers_are_places() -> None:
    shared = model("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=128)
    found = find_problem(shared, plans(shared, "nvfp4"))
    assert "mlp.shared_expert" in names(found)
    (place,) = [p for p in found.places if p.name == "model.layers.0.mlp.shared_expert"]
    assert [m.rpartition(".")[2] for m in place.modules] == ["gate_proj", "up_proj", "down_proj"]
    dense = model("llama", num_key_value_heads=8)
    assert {"mlp.gate_proj+up_proj", "mlp.down_proj"} <= set(
        names(find_problem(dense, plans(dense, "fp8")))
    )


def test_latent_projections_are_one_place() -> None:
    latent = model("deepseek_v3", **EXPERTS, q_lora_rank=64, kv_lora_rank=112, qk_rope_head_dim=16)
    found = find_problem(latent, plans(latent, "fp8"))
    assert any("q_a_proj" in name and "kv_a_proj" in name for name in names(found))


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("recipe", ["nvfp4", "fp8_channel", "w4a16_nvfp4"])
def test_costs_are_the_bytes_of_the_export(dialect: str, recipe: str) -> None:
    if (dialect, recipe) == ("modelopt", "fp8_channel"):
        recipe = "mxfp8"
    of = model("qwen3_moe", dialect, **EXPERTS)
    plan = plans(of, recipe)[recipe]
    rules = StorageRules(
        dialect=get_dialect(dialect), dtype=torch.bfloat16, max_shard_bytes=1 << 40
    )
    export = plan_export(of.params, plan, Layout.simulate(1, 1, 1, 1), rules)
    problem = find_problem(of, {recipe: plan})
    modules = {m for p in problem.places for m in p.modules}
    stored = sum(
        entry.nbytes
        for target in export.targets
        if target.source.module in modules and target.source.name.endswith(".weight")
        for entry in target.entries
    )
    assert sum(p.options[0].nbytes for p in problem.places) == stored
    assert problem.bits([0] * len(problem.places), "weight") == pytest.approx(
        8 * stored / sum(p.elements for p in problem.places)
    )


def test_active_counts_experts_by_the_share_that_a_token_meets(problem: Problem) -> None:
    experts_at_16 = [0 if "experts" not in p.name else 2 for p in problem.places]
    by_weight, by_active = (problem.bits(experts_at_16, cost) for cost in ("weight", "active"))
    elements = sum(p.elements for p in problem.places)
    experts = sum(p.elements for p in problem.places if "experts" in p.name)
    small = 8 * sum(p.options[0].nbytes for p in problem.places if "experts" not in p.name)
    assert by_weight == pytest.approx((small + 16 * experts) / elements)
    assert by_active == pytest.approx((small + 8 * experts) / (elements - experts / 2))


def test_active_needs_the_number_of_experts_that_a_token_meets(moe: Model) -> None:
    config = {k: v for k, v in moe.config.items() if k != "num_experts_per_tok"}
    found = find_problem(replace(moe, config=config), plans(moe, "nvfp4"))
    assert found.solved(scores_by_bits(found), 6.0, "weight")
    with pytest.raises(RecipeError, match=r"fewer than all 4 of .*experts; take weight"):
        found.solved(scores_by_bits(found), 6.0, "active")


def test_a_candidate_that_changes_nothing_at_a_place_is_no_other_option(moe: Model) -> None:
    both = plans(moe, "fp8", "fp8_attention_nvfp4_mlp", "nvfp4_experts_only")
    found = find_problem(moe, both)
    attention, experts = found.places[0], found.places[2]
    assert [o.candidates for o in attention.options] == [
        ("fp8", "fp8_attention_nvfp4_mlp"),
        ("nvfp4_experts_only", "none"),
    ]
    assert [o.candidates for o in experts.options] == [
        ("fp8",),
        ("fp8_attention_nvfp4_mlp", "nvfp4_experts_only"),
        ("none",),
    ]
    fewer = found.restricted(["fp8_attention_nvfp4_mlp"])
    assert [len(p.options) for p in fewer.places[:3]] == [2, 2, 2]


def test_places_to_keep_have_no_other_option(moe: Model) -> None:
    kept = replace(moe, keep=("*.layers.0.*",))
    found = find_problem(kept, plans(moe, "nvfp4"))
    assert [len(p.options) for p in found.places] == [1, 1, 1, 2, 2, 2]
    with pytest.raises(RecipeError, match=r"--auto-quantize-keep '\*\.layers\.9\.\*' matches no"):
        find_problem(replace(moe, keep=("*.layers.9.*",)), plans(moe, "nvfp4"))


# --- the choice and its recipe ------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["weight", "active"])
@pytest.mark.parametrize("bits", [4.75, 5.0, 6.0, 9.5])
def test_the_found_recipe_treats_places_as_chosen(
    moe: Model, problem: Problem, tmp_path: Path, bits: float, cost: str
) -> None:
    chosen = problem.solved(scores_by_bits(problem), bits, cost)
    assert problem.bits(chosen, cost) <= bits
    recipe = to_recipe(problem, chosen, "found", "found by a test")
    write_recipe(tmp_path / "found.yaml", recipe)
    plan = resolve(load_recipe(tmp_path / "found.yaml"), slots(moe.params))
    of_module = {m: d for d in plan.decisions for m in d.slot.sources if not d.slot.fixed}
    for place, index in zip(problem.places, chosen, strict=True):
        rule = place.options[index].rule
        assert {(of_module[m].weights, of_module[m].inputs) for m in place.modules} == {
            (rule.weights, rule.inputs)
        }
    assert difference(plan, resolve(recipe, slots(moe.params))) == ""


def test_the_output_layer_is_a_place_where_a_recipe_may_quantize_it(tmp_path: Path) -> None:
    of = model("qwen3", num_key_value_heads=8)
    rules = [
        {"quantize": ["lm_head"], "weights": "fp8", "inputs": "fp8", "allow_output": True},
        {"quantize": ["*"], "weights": "nvfp4", "inputs": "nvfp4"},
    ]
    head = resolve(parse_recipe("head", {"rules": rules}), slots(of.params))
    found = find_problem(of, {"head": head})
    (place,) = [p for p in found.places if p.output]
    assert place.name == "lm_head"
    for index in range(len(place.options)):
        chosen = [index if p.output else 0 for p in found.places]
        write_recipe(tmp_path / "r.yaml", to_recipe(found, chosen, "r", ""))
        plan = resolve(load_recipe(tmp_path / "r.yaml"), slots(of.params))
        formats = {d.slot.sources[0]: d.weights for d in plan.decisions}
        assert formats["lm_head"] == place.options[index].rule.weights


def test_modules_that_no_candidate_quantizes_are_excluded_by_name(moe: Model) -> None:
    found = find_problem(moe, plans(moe, "nvfp4_experts_only"))
    assert all("experts" in p.name for p in found.places)
    recipe = to_recipe(found, [0] * len(found.places), "r", "")
    assert "model.layers.0.self_attn.o_proj" in recipe.rules[-1].patterns
    assert recipe.rules[-1].weights is None
    own = resolve(load_recipe("nvfp4_experts_only"), slots(moe.params))
    assert difference(resolve(recipe, slots(moe.params)), own) == ""


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "cost", "message"),
    [
        (4.2, "weight", r"--auto-quantize-bits 4\.2 is below 4\.50\d, the least that nvfp4, fp8"),
        (16.0, "weight", "--auto-quantize-bits 16 would leave every weight as it is, at 16 bits"),
        (float("nan"), "weight", "--auto-quantize-bits is nan: give bits a weight"),
        (-1.0, "weight", "--auto-quantize-bits is -1.0: give bits a weight"),
        (5.0, "bytes", "--auto-quantize-cost is 'bytes': give one of weight, active"),
    ],
)
def test_a_bound_that_cannot_be_met(problem: Problem, bits: float, cost: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        problem.solved(scores_by_bits(problem), bits, cost)
    assert "\n" not in str(error.value)


def test_the_least_bound_in_the_message_can_be_met(problem: Problem) -> None:
    with pytest.raises(RecipeError) as error:
        problem.solved(scores_by_bits(problem), 3, "weight")
    least = float(str(error.value).split(" is below ")[1].split(",")[0])
    chosen = problem.solved(scores_by_bits(problem), least, "weight")
    assert problem.bits(chosen, "weight") <= least


def test_formats_that_do_not_fit() -> None:
    narrow = model("qwen3_moe", hidden_size=136, **EXPERTS)
    with pytest.raises(FormatError, match=r"136 inputs are not a multiple of 16, as nvfp4"):
        find_problem(narrow, plans(narrow, "nvfp4"))
    with pytest.raises(FormatError):
        find_problem(model("qwen3_moe", "gptq", **EXPERTS), plans(narrow, "fp8"))


def test_a_recipe_that_splits_a_place() -> None:
    shared = model("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=128)
    rules = [
        {"exclude": ["*shared_expert.down_proj"]},
        {"quantize": ["*"], "weights": "nvfp4"},
    ]
    split = resolve(parse_recipe("split", {"rules": rules}), slots(shared.params))
    with pytest.raises(
        RecipeError, match=r"split: .*gate_proj is nvfp4 but .*down_proj is exclude"
    ):
        find_problem(shared, {"split": split})


def test_candidates_that_were_not_scored(problem: Problem) -> None:
    with pytest.raises(RecipeError, match="'mxfp8' was not scored: choose among nvfp4, fp8, none"):
        problem.restricted(["mxfp8"])


def mixture(moe: Model, dialect: str, engine: str | None, *names: str) -> None:
    of = replace(moe, schemes=StorageSchemes(get_dialect(dialect), torch.bfloat16, {}))

    def check(plan: QuantPlan) -> None:
        check_serving(plan, moe.params, dialect, engine, None, moe.config)
        get_dialect(dialect).quantization_config(plan)

    check_mixtures(find_problem(of, plans(moe, *names)), slots(moe.params), check)


def test_candidates_that_can_be_mixed_pass(moe: Model) -> None:
    mixture(moe, "modelopt", "vllm", "nvfp4", "fp8")
    mixture(moe, "compressed-tensors", None, "nvfp4", "fp8", "fp8_channel")


def test_candidates_that_cannot_be_mixed(moe: Model) -> None:
    with pytest.raises(RecipeError, match="int4 and mxfp8 cannot be mixed") as error:
        mixture(moe, "modelopt", None, "int4", "mxfp8")
    assert "\n" not in str(error.value)
