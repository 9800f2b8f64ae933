"""Recipe files: what is read, and one test per error."""

from pathlib import Path

import pytest

import megatron_quant
from megatron_quant.errors import RecipeError
from megatron_quant.formats.spec import get_format
from megatron_quant.recipes.load import load_recipe, recipe_names
from megatron_quant.recipes.schema import Recipe, Rule, parse_recipe, weight_only

SHIPPED = ["fp8", "int4", "nvfp4", "nvfp4_experts_only", "nvfp4_mlp_only", "w4a16_nvfp4"]
NVFP4 = {"quantize": ["*"], "weights": "nvfp4"}


def parse(*rules: object) -> Recipe:
    return parse_recipe("mine", {"rules": list(rules)})


def test_shipped_names() -> None:
    assert recipe_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_say_what_they_are(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.rules[0].weights is not None


def test_configs_are_package_data() -> None:
    package = Path(megatron_quant.__file__).parent
    assert sorted(p.stem for p in (package / "configs").glob("*.yaml")) == SHIPPED


@pytest.mark.parametrize(
    ("name", "weights", "inputs"),
    [
        ("fp8", "fp8", "fp8"),
        ("nvfp4", "nvfp4", "nvfp4"),
        ("w4a16_nvfp4", "nvfp4", None),
        ("int4", "int4", None),
    ],
)
def test_shipped_formats(name: str, weights: str, inputs: str | None) -> None:
    rule = load_recipe(name).rules[0]
    assert rule.weights == get_format(weights)
    assert rule.inputs == (get_format(inputs) if inputs else None)


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
        (Rule(("*.k_proj", "*.q_proj", "*.v_proj")), Rule(("*",), get_format("int4", 64))),
        "two formats",
    )


def test_weight_only_drops_inputs_from_every_rule() -> None:
    recipe = parse(NVFP4 | {"inputs": "nvfp4"}, {"exclude": ["a"]}, NVFP4)
    assert [r.inputs for r in weight_only(recipe).rules] == [None, None, None]
    assert [r.weights for r in weight_only(recipe).rules] == [r.weights for r in recipe.rules]


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
        (["rules"], "must be a mapping of description, rules"),
        ({"rules": [NVFP4], "format": "nvfp4"}, "unknown key format; allowed: description, rules"),
        ({"rules": [NVFP4], "description": 3}, "description must be a string, got 3"),
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
        ("*", "must be a mapping of quantize, exclude, weights, inputs, got '\\*'"),
        (NVFP4 | {"wieghts": "fp8"}, "unknown key wieghts; allowed: quantize, exclude, weights"),
        ({"weights": "fp8"}, "needs either quantize or exclude"),
        ({"quantize": ["a"], "exclude": ["b"]}, "needs either quantize or exclude"),
        ({"exclude": ["a"], "weights": "fp8"}, "belong to quantize, not to exclude"),
        ({"quantize": ["a"]}, "weights is missing; known formats: fp8, nvfp4, int4"),
        ({"exclude": []}, r"exclude: must be a list of at least one pattern, got \[\]"),
        ({"exclude": "*mlp*"}, "exclude: must be a list of at least one pattern, got '\\*mlp\\*'"),
        (NVFP4 | {"quantize": [3]}, r"quantize: must be a list of at least one pattern, got \[3\]"),
        (NVFP4 | {"quantize": [""]}, "quantize: must be a list of at least one pattern"),
        (NVFP4 | {"weights": "fp4"}, "unknown number format 'fp4'; known: fp8, int4, nvfp4"),
        (NVFP4 | {"weights": 8}, "must be a mapping of format, group_size, got 8"),
        (NVFP4 | {"weights": {"group_size": 64}}, "format must be one of fp8, nvfp4, int4"),
        (NVFP4 | {"weights": {"format": "int4", "bits": 3}}, "unknown key bits; allowed: format"),
        (NVFP4 | {"weights": {"format": "int4", "group_size": 48}}, "group_size 48 is not one of"),
        (NVFP4 | {"weights": {"format": "int4", "group_size": "64"}}, "must be an integer"),
        (NVFP4 | {"weights": {"format": "int4", "group_size": True}}, "must be an integer"),
        (NVFP4 | {"weights": {"format": "nvfp4", "group_size": 32}}, "is not one of nvfp4's: 16"),
    ],
)
def test_malformed_rule(rule: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        parse({"exclude": ["first"]}, rule)
    assert "recipe 'mine', rule 2" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [("int4", "int4"), ("int4", "fp8"), ("fp8", "nvfp4"), ("nvfp4", "fp8")],
)
def test_unsupported_pair(weights: str, inputs: str) -> None:
    message = f"{weights} weights with {inputs} inputs; supported: fp8 with no inputs; fp8 with fp8"
    with pytest.raises(RecipeError, match=message):
        parse({"quantize": ["*"], "weights": weights, "inputs": inputs})


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(RecipeError, match=r"'nvpf4'; choose one of fp8, int4, nvfp4, .*ModelOpt"):
        load_recipe("nvpf4")


def test_missing_file() -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe 'no/such.yaml': No such file"):
        load_recipe("no/such.yaml")


@pytest.mark.parametrize("content", [b"rules: [*mlp*]", b"rules: [", b"\xff\xfe"])
def test_not_yaml(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.yml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"is not valid YAML: .*patterns need quotes") as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)
