"""A checkpoint's description of its quantization, written and read again."""

from pathlib import Path
from typing import Any

import pytest

from megatron_quant.errors import CheckpointError
from megatron_quant.mcore.checkpoint.saved import describe_run, parse_description
from megatron_quant.mcore.checkpoint.torch_dist import TorchDist
from megatron_quant.recipes.load import load_recipe, recipe_names
from megatron_quant.recipes.plan import QuantPlan, difference
from megatron_quant.recipes.resolution import resolve
from megatron_quant.recipes.schema import Recipe, Rule, weight_only, with_algorithm, with_kv_cache
from tests.unit.recipe_models import model

STORED = TorchDist(Path("/saved"), {})


def plan(recipe: Recipe) -> QuantPlan:
    return resolve(recipe, model("qwen3_moe"))


def recipes() -> list[Recipe]:
    shipped = [load_recipe(name) for name in recipe_names()]
    changed = [weight_only(load_recipe("nvfp4")), with_algorithm(load_recipe("int4"), "mse")]
    idle = Rule(patterns=("*of another model*",), optional=True)  # as presets have them
    preset = Recipe("preset", (idle, *load_recipe("nvfp4").rules))
    return [*shipped, *changed, preset, with_kv_cache(load_recipe("fp8"), "fp8_cast")]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_recipes_come_back(recipe: Recipe) -> None:
    saved = parse_description(STORED, describe_run(recipe, plan(recipe), "per_expert"))
    assert saved.recipe is not None and saved.recipe.name == recipe.name
    assert saved.expert_scales == "per_expert"
    assert difference(plan(saved.recipe), plan(recipe)) == ""


def test_plans_that_differ() -> None:
    int4 = load_recipe("int4")
    other = plan(with_algorithm(int4, "mse"))
    assert difference(plan(int4), other) == "decoder.layers.0.self_attention.linear_qkv.weight"
    assert difference(plan(int4), plan(with_kv_cache(int4, "fp8_cast"))) == "the KV cache"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 9}, "wrote it, with schema 9"),
        ({"expert_scales": "most"}, "expert_scales is 'most'"),
        ({"recipe": None}, "cannot be read"),
        ({"recipe": {"name": "x", "rules": []}}, "recipe 'x': rules must be a list"),
    ],
)
def test_descriptions_that_cannot_be_read(change: dict[str, Any], words: str) -> None:
    recipe = load_recipe("fp8")
    with pytest.raises(CheckpointError, match=words) as caught:
        parse_description(STORED, {**describe_run(recipe, plan(recipe), "shared"), **change})
    assert str(caught.value).startswith("/saved: its description")


@pytest.mark.parametrize("description", [{}, [], "text"])
def test_what_is_no_description(description: Any) -> None:
    with pytest.raises(CheckpointError, match="its description of the quantization"):
        parse_description(STORED, description)


@pytest.mark.parametrize(
    ("key", "scales"),
    [
        ("decoder.layers.0.mlp.experts.experts.linear_fc1.weight_quantizer._amax", "shared"),
        ("decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight_quantizer._amax", "per_expert"),
    ],
)
def test_without_a_description_the_keys_say_whose_scales(key: str, scales: str) -> None:
    saved = parse_description(TorchDist(Path("/saved"), {key: (1,)}), None)
    assert saved.recipe is None and saved.expert_scales == scales
