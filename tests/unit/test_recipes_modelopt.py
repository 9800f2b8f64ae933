"""ModelOpt's presets as recipes."""

from fnmatch import fnmatchcase
from typing import Any

import pytest

from megatron_quant.errors import RecipeError
from megatron_quant.formats.spec import CHANNEL
from megatron_quant.recipes.coverage import audit
from megatron_quant.recipes.load import load_recipe
from megatron_quant.recipes.resolution import resolve
from tests.host import ready

from .recipe_models import model

ARCHITECTURES = ["qwen3_moe", "mixtral", "qwen3", "llama"]


@pytest.fixture(scope="module", autouse=True)
def host() -> None:
    ready()


def decided(name: str, architecture: str) -> dict[str, tuple[str | None, str | None, str]]:
    plan = resolve(load_recipe(name), model(architecture))
    return {
        d.slot.name: (d.weights and d.weights.name, d.inputs and d.inputs.name, d.algorithm)
        for d in plan.decisions
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("preset", "ours"),
    [
        ("FP8_DEFAULT_CFG", "fp8"),
        ("NVFP4_DEFAULT_CFG", "nvfp4"),
        ("NVFP4_MLP_ONLY_CFG", "nvfp4_mlp_only"),
        ("W4A16_NVFP4_CFG", "w4a16_nvfp4"),
        ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4"),
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "fp8_channel"),
        ("INT8_DEFAULT_CFG", "int8_static"),
        ("MXFP8_DEFAULT_CFG", "mxfp8"),
        ("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", "nvfp4_mse"),
        ("NVFP4_FOUR_OVER_SIX_CFG", "nvfp4_four_over_six"),
        ("INT4_AWQ_CFG", "int4_awq"),
        ("W4A8_AWQ_BETA_CFG", "w4a8_awq"),
        ("INT8_SMOOTHQUANT_CFG", "int8_sq"),
    ],
)
def test_preset_decides_as_our_recipe(preset: str, ours: str, architecture: str) -> None:
    assert decided(preset, architecture) == decided(ours, architecture)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts_only(architecture: str) -> None:
    ours = decided("nvfp4_experts_only", architecture)
    assert decided("NVFP4_EXPERTS_ONLY_CFG", architecture) == ours


@pytest.mark.parametrize(
    ("preset", "weights", "inputs", "group_size"),
    [
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8_block", None, 128),
        ("INT8_WEIGHT_ONLY_CFG", "int8_group", None, CHANNEL),
        ("MXFP4_DEFAULT_CFG", "mxfp4", "mxfp4", 32),
        ("MXFP4_MLP_WEIGHT_ONLY_CFG", "mxfp4", None, 32),
    ],
)
def test_presets_without_a_recipe_of_ours(
    preset: str, weights: str, inputs: str | None, group_size: int
) -> None:
    (rule,) = [r for r in load_recipe(preset).rules if r.weights]
    assert (rule.weights.name, rule.inputs and rule.inputs.name) == (weights, inputs)
    assert rule.weights.group_size == group_size


def test_smoothquant_takes_modelopts_alpha() -> None:
    (rule,) = [r for r in load_recipe("INT8_SMOOTHQUANT_CFG").rules if r.weights]
    assert rule.alpha == 1.0


def test_cache_preset_added_to_another() -> None:
    both, alone = load_recipe("NVFP4_DEFAULT_CFG+FP8_KV_CFG"), load_recipe("NVFP4_DEFAULT_CFG")
    assert (both.name, both.kv_cache) == ("NVFP4_DEFAULT_CFG+FP8_KV_CFG", "fp8")
    assert (both.rules, alone.kv_cache) == (alone.rules, "")


def test_experts_only_refuses_a_dense_model() -> None:
    with pytest.raises(RecipeError, match=r"\*\.experts\.\*\): matches no weight of this model"):
        decided("NVFP4_EXPERTS_ONLY_CFG", "llama")


def test_patterns_that_name_fused_members_apart() -> None:
    """q_proj, k_proj and v_proj are disabled by three entries: one rule has to hold them."""
    formats = decided("MAMBA_MOE_NVFP4_AGGRESSIVE_CFG", "qwen3_moe")
    assert formats["decoder.layers.0.self_attention.linear_qkv.weight"] == (None, None, "max")
    assert formats["decoder.layers.0.mlp.experts.linear_fc1.weight0"] == ("nvfp4", "nvfp4", "max")


def test_output_projection_and_mlp() -> None:
    formats = decided("NVFP4_OMLP_ONLY_CFG", "qwen3")
    assert formats["decoder.layers.0.self_attention.linear_qkv.weight"] == (None, None, "max")
    assert formats["decoder.layers.0.self_attention.linear_proj.weight"] == (
        "nvfp4",
        "nvfp4",
        "max",
    )


def test_default_excludes_name_the_router_but_not_gate_proj() -> None:
    recipe = load_recipe("NVFP4_DEFAULT_CFG")
    assert {"*mlp.gate", "*mlp.gate.*", "*lm_head*"} <= set(recipe.rules[0].patterns)
    rows = audit(resolve(recipe, model("qwen3")), recipe)
    assert [row.weights for row in rows[:2]] == [0, 8]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (
            "NVFP4_SVDQUANT_DEFAULT_CFG",
            "algorithm .*svdquant.* is not supported, only max, mse, four_over_six, awq and smooth",
        ),
        ("FP8_KV_CFG", r"FP8_KV_CFG quantizes no weight: .* as in NVFP4_DEFAULT_CFG\+FP8_KV_CFG"),
        ("NVFP4_KV_CFG", r"NVFP4_KV_CFG: a KV cache of .*\(2, 1\).* is not supported; take one"),
        ("FP8_AFFINE_KV_CFG", "a KV cache of .*bias.* is not supported; take one of FP8"),
        ("FP8_DEFAULT_CFG+NVFP4_KV_CFG", "a KV cache of .* is not supported; take one of FP8"),
        (
            "FP8_DEFAULT_CFG+INT8_SMOOTHQUANT_CFG",
            "INT8_SMOOTHQUANT_CFG has an algorithm of its own",
        ),
        ("FP8_DEFAULT_CFG+FP9_KV_CFG", "ModelOpt has no preset 'FP9_KV_CFG'"),
        ("NVFP4_KV_ROTATE_CFG", r"quantizers \*k_bmm_quantizer are not supported"),
        ("NVFP4_FP8_MHA_CONFIG", "quantizers .*bmm_quantizer are not supported, only those of lin"),
        ("MXFP6_DEFAULT_CFG", "this number format is not supported: .*\\(3, 2\\)"),
        ("MXINT8_DEFAULT_CFG", "this number format is not supported: .*-1: 32"),
        ("W4A8_MXFP4_FP8_CFG", "mxfp4 weights with fp8 inputs; mxfp4 weights go with no inputs or"),
        ("W4A8_NVFP4_FP8_CFG", "number format is not supported: .*-1: 32"),
        ("NVFP5_DEFAULT_CFG", "ModelOpt has no preset 'NVFP5_DEFAULT_CFG'; it has .*FP8_DEFAULT"),
    ],
)
def test_unsupported_preset(preset: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(preset)
    assert "\n" not in str(error.value)


def test_every_preset_is_a_recipe_or_a_recipe_error() -> None:
    from modelopt.torch.quantization import config

    for name in sorted(config.choices):
        try:
            recipe = load_recipe(name)
        except RecipeError as error:
            assert name in str(error)
        else:
            assert recipe.name == name


LOADED = [
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "INT8_DEFAULT_CFG",
    "INT8_WEIGHT_ONLY_CFG",
    "MXFP4_MLP_WEIGHT_ONLY_CFG",
    "NVFP4_FOUR_OVER_SIX_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "MAMBA_MOE_FP8_CONSERVATIVE_CFG",
    "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG",
    "NVFP4_DEFAULT_CFG",
    "NVFP4_MLP_ONLY_CFG",
    "NVFP4_OMLP_ONLY_CFG",
    "W4A16_NVFP4_CFG",
]


def enabled(entries: list[Any], quantizer: str) -> bool:
    """ModelOpt's rule for a linear: the last entry that matches the quantizer decides."""
    states = [e.enable for e in entries if fnmatchcase(quantizer, e.quantizer_name)]
    return states[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("preset", LOADED)
def test_first_match_here_is_last_match_there(preset: str, architecture: str) -> None:
    from modelopt.torch.quantization import config

    entries = config.normalize_quant_cfg_list(getattr(config, preset)["quant_cfg"])
    entries = [e for e in entries if not e.parent_class]
    for decision in resolve(load_recipe(preset), model(architecture)).decisions:
        for module in () if decision.slot.fixed else decision.slot.sources:
            weights = enabled(entries, f"{module}.weight_quantizer")
            inputs = enabled(entries, f"{module}.input_quantizer")
            ours = (decision.weights is not None, decision.inputs is not None)
            assert ours == (weights, inputs), module
