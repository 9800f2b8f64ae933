"""Recipe files: what is read, and one test per error."""

from pathlib import Path

import pytest

import megatron_quant
from megatron_quant.errors import RecipeError
from megatron_quant.formats.spec import CHANNEL, get_format
from megatron_quant.recipes.document import to_document
from megatron_quant.recipes.load import load_recipe, recipe_names
from megatron_quant.recipes.parse import parse_recipe
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot
from megatron_quant.recipes.resolution import resolve
from megatron_quant.recipes.schema import (
    ALGORITHMS,
    SUPPORTED,
    Recipe,
    Rule,
    weight_only,
    with_algorithm,
    with_alpha,
    with_damp,
    with_kv_cache,
)

# name -> (weights, inputs, algorithm) of its first rule
SHIPPED = {
    "fp8": ("fp8", "fp8", "max"),
    "fp8_attention_nvfp4_mlp": ("fp8", "fp8", "max"),
    "fp8_block": ("fp8_block", "fp8_group", "max"),
    "fp8_channel": ("fp8_channel", "fp8_channel", "max"),
    "int4": ("int4", None, "max"),
    "int4_asym": ("int4_asym", None, "max"),
    "int4_awq": ("int4", None, "awq"),
    "int8": ("int8", "int8", "max"),
    "int8_group": ("int8_group", None, "max"),
    "int8_sq": ("int8", "int8_tensor", "smoothquant"),
    "int8_static": ("int8", "int8_tensor", "max"),
    "mxfp4": ("mxfp4", None, "max"),
    "mxfp8": ("mxfp8", "mxfp8", "max"),
    "nvfp4": ("nvfp4", "nvfp4", "max"),
    "nvfp4_experts_only": ("nvfp4", "nvfp4", "max"),
    "nvfp4_four_over_six": ("nvfp4", "nvfp4", "four_over_six"),
    "nvfp4_mlp_only": ("nvfp4", "nvfp4", "max"),
    "nvfp4_mse": ("nvfp4", "nvfp4", "mse"),
    "w4a16_nvfp4": ("nvfp4", None, "max"),
    "w4a8": ("int4", "fp8", "max"),
    "w4a8_awq": ("int4", "fp8", "awq"),
    "w4a8_dynamic": ("int4", "fp8_channel", "max"),
}
NVFP4 = {"quantize": ["*"], "weights": "nvfp4"}
GPTQ = {"algorithm": "gptq"}
AWQ = {"algorithm": "awq"}


def parse(*rules: object) -> Recipe:
    return parse_recipe("mine", {"rules": list(rules)})


def test_shipped_names() -> None:
    assert recipe_names() == list(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_say_what_they_are(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.rules[0].weights is not None


def test_configs_are_package_data() -> None:
    package = Path(megatron_quant.__file__).parent
    assert sorted(p.stem for p in (package / "configs").glob("*.yaml")) == list(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_formats(name: str) -> None:
    weights, inputs, algorithm = SHIPPED[name]
    rule = load_recipe(name).rules[0]
    assert rule.weights == get_format(weights)
    assert rule.inputs == (get_format(inputs) if inputs else None)
    assert rule.algorithm == algorithm


def test_file_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "description: two formats\n"
        "rules:\n"
        '  - exclude: ["*.k_proj", "*.q_proj", "*.v_proj"]\n'
        '  - quantize: ["*"]\n'
        "    weights: {format: int4, group_size: 64}\n"
        "    inputs: null\n"
    )
    recipe = load_recipe(str(path))
    assert recipe == Recipe(
        str(path),
        (
            Rule(patterns=("*.k_proj", "*.q_proj", "*.v_proj")),
            Rule(patterns=("*",), weights=get_format("int4", 64)),
        ),
        "two formats",
    )


def test_weight_only_drops_inputs_from_every_rule() -> None:
    recipe = parse(NVFP4 | {"inputs": "nvfp4"}, {"exclude": ["a"]}, NVFP4)
    assert [r.inputs for r in weight_only(recipe).rules] == [None, None, None]
    assert [r.weights for r in weight_only(recipe).rules] == [r.weights for r in recipe.rules]


def test_weight_only_drops_the_cache() -> None:
    recipe = parse_recipe("mine", {"rules": [NVFP4], "kv_cache": "fp8"})
    assert recipe.kv_cache == "fp8"
    assert weight_only(recipe).kv_cache == ""


def test_weight_only_refuses_what_needs_inputs() -> None:
    message = (
        r"recipe .int8. with --weight-only, rule 1: .*: int8 weights with no inputs; int8 "
        "weights go with int8 inputs or int8_tensor inputs; weight-only INT8 is int8_group"
    )
    with pytest.raises(RecipeError, match=message):
        weight_only(load_recipe("int8"))


@pytest.mark.parametrize(
    ("weights", "inputs"), [(w, i) for w, allowed in SUPPORTED.items() for i in allowed]
)
def test_supported_pairs(weights: str, inputs: str | None) -> None:
    rule = parse({"quantize": ["*"], "weights": weights, "inputs": inputs}).rules[0]
    assert (rule.weights.name, rule.inputs and rule.inputs.name) == (weights, inputs)


@pytest.mark.parametrize("group_size", [32, 64, 128, "channel"])
@pytest.mark.parametrize("name", ["int4", "int4_asym", "int8_group"])
def test_group_sizes(name: str, group_size: object) -> None:
    weights = {"format": name, "group_size": group_size}
    rule = parse({"quantize": ["*"], "weights": weights}).rules[0]
    assert rule.weights.group_size == (CHANNEL if group_size == "channel" else group_size)


def test_algorithm_of_a_rule() -> None:
    recipe = parse(NVFP4 | {"algorithm": "mse"}, {"exclude": ["a"]})
    assert [r.algorithm for r in recipe.rules] == ["mse", "max"]
    assert recipe.label(0) == "rule 1: nvfp4 (mse) *"
    assert [r.algorithm for r in with_algorithm(recipe, "max").rules] == ["max", "max"]
    searched = with_algorithm(load_recipe("nvfp4_four_over_six"), "mse")
    assert searched.rules == load_recipe("nvfp4_mse").rules


def test_algorithm_that_does_not_suit_a_rule() -> None:
    message = r"recipe 'mxfp8', rule 1: .*: algorithm mse does not search the scales of mxfp8, only"
    with pytest.raises(RecipeError, match=message):
        with_algorithm(load_recipe("mxfp8"), "mse")


def test_damp_of_a_rule() -> None:
    recipe = parse(NVFP4 | GPTQ | {"damp": 0.1}, NVFP4 | GPTQ, NVFP4)
    assert [r.damp for r in recipe.rules] == [0.1, None, None]
    assert recipe.label(0) == "rule 1: nvfp4 (gptq, damp 0.1) *"
    assert [r.damp for r in with_damp(recipe, 0.02).rules] == [0.02, 0.02, None]
    assert with_algorithm(recipe, "gptq").rules[0].damp == 0.1
    assert with_algorithm(recipe, "mse").rules[0].damp is None
    with pytest.raises(RecipeError, match="with --damp: damp belongs to algorithm gptq, which no"):
        with_damp(parse(NVFP4), 0.1)
    with pytest.raises(RecipeError, match="with --damp: damp must be above 0 and at most 1, got 2"):
        with_damp(recipe, 2)


def test_alpha_of_a_rule() -> None:
    recipe = parse(NVFP4 | AWQ | {"alpha": 0.5}, {"exclude": ["a"]})
    assert recipe.label(0) == "rule 1: nvfp4 (awq, alpha 0.5) *"
    assert [r.alpha for r in with_alpha(recipe, 0.25).rules] == [0.25, None]
    assert with_algorithm(recipe, "gptq").rules[0].alpha is None
    assert with_algorithm(recipe, "awq").rules[0].alpha == 0.5
    with pytest.raises(RecipeError, match="alpha belongs to algorithms awq and smoothquant, which"):
        with_alpha(parse(NVFP4), 0.5)
    with pytest.raises(RecipeError, match=r"with --alpha: alpha must be from 0 .* to 1, got 2"):
        with_alpha(recipe, 2)
    with pytest.raises(RecipeError, match=r"with --weight-only, rule 1: .*: smoothquant makes inp"):
        weight_only(parse(NVFP4 | {"inputs": "nvfp4", "algorithm": "smoothquant"}))


@pytest.mark.parametrize("more", [GPTQ | {"damp": 0.1}, AWQ | {"alpha": 0.3}])
def test_settings_travel_with_a_model(more: dict[str, object]) -> None:
    recipe = parse(NVFP4 | more)
    slot = Slot(name="a.weight", sources=("a",), shape=(16, 16))
    document = to_document(recipe, resolve(recipe, [slot]))
    assert parse_recipe("mine", document).rules == recipe.rules


def test_every_weight_format_has_gptq() -> None:
    assert set(ALGORITHMS["gptq"]) == set(ALGORITHMS["awq"]) == set(SUPPORTED)
    assert set(ALGORITHMS["imatrix"]) < set(ALGORITHMS["mse"])


def decided(weights: str, algorithm: str) -> Decision:
    slot = Slot(name="a.weight", sources=("a",), shape=(128, 128))
    rule = {"quantize": ["*"], "weights": weights, "algorithm": algorithm}
    return resolve(parse(rule), [slot]).decisions[0]


@pytest.mark.parametrize(
    ("weights", "algorithm", "search", "weighted", "needs_data"),
    [
        ("int4", "max", "", False, False),
        ("int4", "mse", "mse", False, False),
        ("int4", "imatrix", "mse", True, True),
        ("int4", "gptq", "mse", True, True),
        ("int4", "awq", "mse", True, True),
        ("fp8", "awq", "mse", False, True),
        ("mxfp4", "awq", "", False, True),
        ("fp8", "gptq", "mse", False, True),  # one scale: weighing its search gains nothing
        ("mxfp4", "gptq", "", False, True),  # powers of two, which nothing searches
        ("nvfp4", "four_over_six", "four_over_six", False, False),
    ],
)
def test_what_an_algorithm_does(
    weights: str, algorithm: str, search: str, weighted: bool, needs_data: bool
) -> None:
    decision = decided(weights, algorithm)
    assert (decision.search, decision.weighted) == (search, weighted)
    assert QuantPlan("mine", (decision,)).needs_data is needs_data
    assert decision.rounds is (algorithm == "gptq")


def test_cache_of_a_recipe() -> None:
    recipe = load_recipe("int4")
    assert with_kv_cache(recipe, "fp8").kv_cache == "fp8"
    assert with_kv_cache(with_kv_cache(recipe, "fp8"), "none") == recipe
    with pytest.raises(RecipeError, match="recipe 'int4': kv_cache must be one of fp8, fp8_cast"):
        with_kv_cache(recipe, "nvfp4")


def test_labels_are_short() -> None:
    recipe = parse(
        {"quantize": ["a", "b", "c", "d", "e"], "weights": "fp8", "inputs": "fp8"},
        {"exclude": ["f"]},
    )
    assert recipe.label(0) == "rule 1: fp8+fp8 a, b, c, 2 more"
    assert recipe.label(1) == "rule 2: exclude f"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (["rules"], "must be a mapping of description, rules, kv_cache"),
        (
            {"rules": [NVFP4], "format": "nvfp4"},
            "unknown key format; allowed: description, rules, kv",
        ),
        ({"rules": [NVFP4], "description": 3}, "description must be a string, got 3"),
        (
            {"rules": [NVFP4], "kv_cache": "int8"},
            "kv_cache must be one of fp8, fp8_cast, got 'int8'",
        ),
        ({"rules": [NVFP4], "kv_cache": ["fp8"]}, "kv_cache must be one of fp8, fp8_cast"),
        ({}, "rules must be a list of at least one rule, got None"),
        ({"rules": []}, r"rules must be a list of at least one rule, got \[\]"),
        ({"rules": NVFP4}, "rules must be a list of at least one rule"),
    ],
)
def test_malformed_document(document: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe("mine", document)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("*", "exclude, weights, inputs, algorithm, damp, alpha, allow_output, allow_mtp, got"),
        (NVFP4 | {"wieghts": "fp8"}, "unknown key wieghts; allowed: quantize, exclude, weights"),
        ({"weights": "fp8"}, "needs either quantize or exclude"),
        ({"quantize": ["a"], "exclude": ["b"]}, "needs either quantize or exclude"),
        (
            {"exclude": ["a"], "weights": "fp8"},
            "alpha, allow_output and allow_mtp belong to quantize, not to exclude",
        ),
        ({"quantize": ["a"]}, "weights is missing; known formats: fp8, fp8_channel, fp8_block"),
        ({"exclude": []}, r"exclude: must be a list of at least one pattern, got \[\]"),
        ({"exclude": "*mlp*"}, "exclude: must be a list of at least one pattern, got '\\*mlp\\*'"),
        (NVFP4 | {"quantize": [3]}, r"quantize: must be a list of at least one pattern, got \[3\]"),
        (NVFP4 | {"quantize": [""]}, "quantize: must be a list of at least one pattern"),
        (NVFP4 | {"weights": "fp4"}, "unknown number format 'fp4'; known: fp8, fp8_block"),
        (NVFP4 | {"weights": 8}, "must be a mapping of format, group_size, scales, got 8"),
        (NVFP4 | {"weights": {"group_size": 64}}, "format must be one of fp8, fp8_channel"),
        (NVFP4 | {"weights": {"format": "int4", "bits": 3}}, "unknown key bits; allowed: format"),
        (NVFP4 | {"weights": {"format": "int4", "group_size": 48}}, "group_size 48 is not one of"),
        (
            NVFP4 | {"weights": {"format": "int4", "group_size": "64"}},
            "must be an integer or channel",
        ),
        (NVFP4 | {"weights": {"format": "int4", "group_size": True}}, "must be an integer"),
        (NVFP4 | {"weights": {"format": "nvfp4", "group_size": 32}}, "is not one of nvfp4's: 16"),
        (NVFP4 | {"algorithm": "awq2"}, "algorithm must be one of max, mse, imatrix, four_over_s"),
        (NVFP4 | {"algorithm": ["mse"]}, "algorithm must be one of max, mse, imatrix, four_over"),
        (
            {"quantize": ["*"], "weights": "fp8", "algorithm": "imatrix"},
            "algorithm imatrix does not search the scales of fp8, only of fp8_channel, fp8_block",
        ),
        (NVFP4 | {"damp": 0.1}, "damp belongs to algorithm gptq, not to max"),
        (NVFP4 | {"algorithm": "mse", "damp": 0.1}, "belongs to algorithm gptq, not to mse"),
        (NVFP4 | GPTQ | {"damp": 0}, "damp must be above 0 and at most 1, got 0; it is the part"),
        (NVFP4 | GPTQ | {"damp": 1.5}, "damp must be above 0 and at most 1, got 1.5"),
        (NVFP4 | GPTQ | {"damp": float("nan")}, "damp must be above 0 and at most 1, got nan"),
        (NVFP4 | GPTQ | {"damp": True}, "damp must be above 0 and at most 1, got True"),
        (NVFP4 | GPTQ | {"damp": "0.1"}, "damp must be above 0 and at most 1, got '0.1'"),
        (NVFP4 | {"alpha": 0.5}, "alpha belongs to algorithms awq and smoothquant, not to max"),
        (NVFP4 | AWQ | {"alpha": 1.5}, "alpha must be from 0 .* to 1, got 1.5"),
        (NVFP4 | AWQ | {"alpha": -0.1}, "alpha must be from 0 .* to 1, got -0.1"),
        (NVFP4 | AWQ | {"alpha": float("nan")}, "alpha must be from 0 .* to 1, got nan"),
        (NVFP4 | AWQ | {"alpha": True}, "alpha must be from 0 .* to 1, got True"),
        (
            NVFP4 | {"algorithm": "smoothquant"},
            "smoothquant makes inputs easier to quantize, and these are not quantized: take awq",
        ),
        (
            {"quantize": ["*"], "weights": "int8_group", "algorithm": "smoothquant"},
            "smoothquant does not search the scales of int8_group, only of fp8",
        ),
        (
            {"quantize": ["*"], "weights": "int4", "algorithm": "four_over_six"},
            "four_over_six does not search the scales of int4, only of nvfp4",
        ),
        (
            NVFP4 | {"weights": "int8_tensor"},
            "int8_tensor is a format of inputs; weights may be fp8",
        ),
        (NVFP4 | {"weights": "fp8_group"}, "fp8_group is a format of inputs; weights may be fp8"),
    ],
)
def test_malformed_rule(rule: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        parse({"exclude": ["first"]}, rule)
    assert "recipe 'mine', rule 2" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weights", "inputs", "known"),
    [
        ("int4", "int4", "int4 weights go with no inputs or fp8 inputs or fp8_channel inputs"),
        ("fp8", "nvfp4", "fp8 weights go with fp8 inputs or no inputs"),
        ("nvfp4", "fp8", "nvfp4 weights go with nvfp4 inputs or no inputs"),
        ("fp8_block", "fp8", "fp8_block weights go with fp8_group inputs or no inputs"),
        ("int8_group", "int8", "int8_group weights go with no inputs"),
    ],
)
def test_unsupported_pair(weights: str, inputs: str, known: str) -> None:
    with pytest.raises(RecipeError, match=f"{weights} weights with {inputs} inputs; {known}"):
        parse({"quantize": ["*"], "weights": weights, "inputs": inputs})


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(RecipeError, match=r"'nvpf4'; choose one of fp8, .* nvfp4, .*ModelOpt"):
        load_recipe("nvpf4")


def test_missing_file() -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe: no/such.yaml does not exist"):
        load_recipe("no/such.yaml")


@pytest.mark.parametrize("content", [b"rules: [*mlp*]", b"rules: [", b"\xff\xfe"])
def test_not_yaml(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.yml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"is not valid YAML: .*patterns need quotes") as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)
