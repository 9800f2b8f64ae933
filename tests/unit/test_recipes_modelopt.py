"""ModelOpt's presets as recipes."""

from fnmatch import fnmatchcase
from typing import Any

import pytest

from megatron_quant.errors import RecipeError
from megatron_quant.recipes.audit import audit
from megatron_quant.recipes.load import load_recipe
from megatron_quant.recipes.resolve import resolve
from tests.host import ready

from .recipe_models import model

ARCHITECTURES = ["qwen3_moe", "mixtral", "qwen3", "llama"]


@pytest.fixture(scope="module", autouse=True)
def host() -> None:
    ready()


def decided(name: str, architecture: str) -> dict[str, tuple[str | None, str | None]]:
    plan = resolve(load_recipe(name), model(architecture))
    return {
        d.slot.name: (d.weights and d.weights.name, d.inputs and d.inputs.name)
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
    ],
)
def test_preset_decides_as_our_recipe(preset: str, ours: str, architecture: str) -> None:
    assert decided(preset, architecture) == decided(ours, architecture)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts_only(architecture: str) -> None:
    ours = decided("nvfp4_experts_only", architecture)
    assert decided("NVFP4_EXPERTS_ONLY_CFG", architecture) == ours


def test_experts_only_refuses_a_dense_model() -> None:
    with pytest.raises(RecipeError, match=r"\*\.experts\.\*\): matches no weight of this model"):
        decided("NVFP4_EXPERTS_ONLY_CFG", "llama")


def test_patterns_that_name_fused_members_apart() -> None:
    """q_proj, k_proj and v_proj are disabled by three entries: one rule has to hold them."""
    formats = decided("MAMBA_MOE_NVFP4_AGGRESSIVE_CFG", "qwen3_moe")
    assert formats["decoder.layers.0.self_attention.linear_qkv.weight"] == (None, None)
    assert formats["decoder.layers.0.mlp.experts.linear_fc1.weight0"] == ("nvfp4", "nvfp4")


def test_output_projection_and_mlp() -> None:
    formats = decided("NVFP4_OMLP_ONLY_CFG", "qwen3")
    assert formats["decoder.layers.0.self_attention.linear_qkv.weight"] == (None, None)
    assert formats["decoder.layers.0.self_attention.linear_proj.weight"] == ("nvfp4", "nvfp4")


def test_default_excludes_name_the_router_but_not_gate_proj() -> None:
    recipe = load_recipe("NVFP4_DEFAULT_CFG")
    assert {"*mlp.gate", "*mlp.gate.*", "*lm_head*"} <= set(recipe.rules[0].patterns)
    rows = audit(resolve(recipe, model("qwen3")), recipe)
    assert [row.weights for row in rows[:2]] == [0, 8]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("INT4_AWQ_CFG", "INT4_AWQ_CFG: algorithm .*awq_lite.* is not supported, only 'max'"),
        ("NVFP4_KV_CFG", r"NVFP4_KV_CFG: quantizers \*\[kv\]_bmm_quantizer are not supported"),
        ("NVFP4_FP8_MHA_CONFIG", "quantizers .*bmm_quantizer are not supported, only those of lin"),
        (
            "INT8_DEFAULT_CFG",
            r"INT8_DEFAULT_CFG, \*weight_quantizer: .* not supported: .*'axis': 0",
        ),
        ("MXFP4_DEFAULT_CFG", "this number format is not supported: .*-1: 32"),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "number format is not supported: .*-2: 128"),
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "number format is not supported: .*'axis': 0"),
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
    "FP8_DEFAULT_CFG",
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
