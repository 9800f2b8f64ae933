"""The configs of exports by family: both names of a module that an engine calls otherwise."""

from pathlib import Path

import pytest

from megatron_quant.engines.families import engine_names, family_of, fused_names, fused_sets
from megatron_quant.engines.families.registry import FAMILIES
from megatron_quant.models.spec import Role
from megatron_quant.models.structure import describe_structure, recognise
from tests.unit import family_models, sources, tiny

MIXED = """
rules:
  - quantize: ["*self_attn*", "*share*_expert*", "*shared_mlp*", "*linear_attn*"]
    weights: fp8_channel
    inputs: fp8_channel
  - {rest}
"""
OTHERS = {
    "exclude": 'exclude: ["*"]',
    "mxfp8": '{quantize: ["*"], weights: mxfp8, inputs: mxfp8}',
}


def stated(name: str, tmp_path: Path, dialect: str, rest: str) -> dict:
    source = family_models.save(name, tmp_path / "source")
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(MIXED.replace("{rest}", OTHERS[rest]))
    flags = {"export_quant_cfg": str(recipe), "export_format": dialect, "weight_only": False}
    sources.run(source, tmp_path / "out", **flags)
    return sources.config(tmp_path / "out")["quantization_config"]


def test_an_excluded_block_has_both_its_names(tmp_path: Path) -> None:
    ignore = stated("minimax_m2", tmp_path, "compressed-tensors", "exclude")["ignore"]
    for at in ("block_sparse_moe", "mlp"):
        assert f"model.layers.1.{at}.experts.3.w2" in ignore


def test_granites_mamba_is_excluded_under_its_mixer_too(tmp_path: Path) -> None:
    ignore = stated("granitemoehybrid", tmp_path, "modelopt", "exclude")["ignore"]
    assert {f"model.layers.0.{at}.in_proj" for at in ("mamba", "mixer")} <= set(ignore)


def test_longcats_fused_projection_is_excluded_by_its_own_name() -> None:
    module = "model.layers.0.self_attn.1.q_a_proj"
    found = engine_names(family_of(["longcat_flash"]), [module, "model.layers.0.mlps.0.up_proj"])
    assert found == ("model.layers.0.self_attn.1.fused_qkv_a_proj",)


@pytest.mark.parametrize(
    ("kind", "module", "called"),
    [
        ("deepseek_v3", "model.layers.2.shared_head.head", ["model.layers.2.head"]),
        ("glm4_moe", "model.layers.2.shared_head.head", ["model.layers.2.head"]),
        ("glm4_moe", "model.layers.2.mlp.up_proj", []),
        (
            "step3p5",
            "model.layers.2.self_attn.q_proj",
            ["model.layers.2.mtp_block.self_attn.q_proj"],
        ),
        (
            "step3p5",
            "model.layers.2.transformer.shared_head.output",
            ["model.layers.2.shared_head.head"],
        ),
        ("longcat_flash", "model.mtp.layers.0.eh_proj", ["eh_proj"]),
        (
            "longcat_flash",
            "model.mtp.layers.0.transformer_layer.mlp.up_proj",
            ["model.layers.4.mlp.up_proj"],
        ),
        (
            "ernie4_5_moe",
            "model.mtp_block.0.self_attn.q_proj",
            ["model.layers.2.self_attn.q_proj"],
        ),
        (
            "bailing_moe_linear",
            "model.layers.2.attention.g_proj",
            ["model.layers.2.self_attn.g_proj"],
        ),
    ],
)
def test_layers_for_speculation_are_excluded_by_engines_names_too(
    kind: str, module: str, called: list
) -> None:
    """vLLM's classes for them, whose prefixes differ from the checkpoint's."""
    config = {"model_type": kind, "num_nextn_predict_layers": 1}
    config["num_layers" if kind == "longcat_flash" else "num_hidden_layers"] = 2
    own = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    names = [f"model.{name}" for name in ("embed_tokens", "word_embeddings")]
    shapes = {f"{name}.weight": (64, 64) for name in (*names, *own, module)}
    found = {p.name: p for p in recognise(config, shapes).params}
    assert found[f"{module}.weight"].role is Role.DRAFT
    assert list(found[f"{module}.weight"].called) == called
    assert all(found[f"{name}.weight"].called == () for name in own)


@pytest.mark.parametrize(
    ("kind", "stack", "shape", "called"),
    [
        (
            "qwen3_5_moe",
            "mtp.layers.0.mlp.experts.gate_up_proj",
            (4, 64, 64),
            [f"mtp.layers.0.mlp.experts.0.{leaf}_proj" for leaf in ("gate", "up")],
        ),
        (
            "step3p5",
            "model.layers.2.moe.down_proj.weight",
            (4, 64, 32),
            [
                "model.layers.2.moe.experts.0.down_proj",
                "model.layers.2.mtp_block.moe.down_proj",
                "model.layers.2.mtp_block.moe.experts.0.down_proj",
            ],
        ),
    ],
)
def test_their_stacks_are_excluded_as_single_experts_too(
    kind: str, stack: str, shape: tuple, called: list
) -> None:
    """compressed-tensors' reader asks for the format of expert 0."""
    config = {"model_type": kind, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    own = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    shapes = {f"{n}.weight": (64, 64) for n in ("model.embed_tokens", *own)} | {stack: shape}
    (found,) = (p for p in recognise(config, shapes).params if p.role is Role.DRAFT)
    assert list(found.called) == called


def test_so_they_are_beside_a_model_with_a_table() -> None:
    config = {**tiny.config("deepseek_v3"), "num_nextn_predict_layers": 1}
    head = f"model.layers.{config['num_hidden_layers']}.shared_head.head"
    params = describe_structure(config, {f"{head}.weight": (64, 64)}).params
    assert params[-1].called == (head.replace(".shared_head", ""),)


def test_a_key_that_fills_the_value_too_is_named_as_both(tmp_path: Path) -> None:
    """Gemma-4's full attention has no v_proj; vLLM wants one format of all parts of qkv_proj."""
    source = family_models.save("gemma4", tmp_path / "source")
    flags = {"export_quant_cfg": "nvfp4_experts_only", "export_format": "modelopt"}
    sources.run(source, tmp_path / "out", **flags)
    ignore = sources.config(tmp_path / "out")["quantization_config"]["ignore"]
    at = "model.language_model.layers.1.self_attn"
    assert f"{at}.v_proj.weight" not in sources.tensors(source)
    assert {f"{at}.{part}_proj" for part in "qkv"} <= set(ignore)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_formats_by_name_have_both_names(dialect: str, tmp_path: Path) -> None:
    said = stated("minimax_m2", tmp_path, dialect, "mxfp8")
    for at in ("block_sparse_moe", "mlp"):
        if dialect == "modelopt":
            layers = said["quantized_layers"]
            assert layers[f"model.layers.0.{at}.experts.3.w1"]["quant_algo"] == "MXFP8"
        else:
            (targets,) = (
                group["targets"]
                for group in said["config_groups"].values()
                if group["format"] == "mxfp8-quantized"
            )
            assert rf"re:^model\.layers\.0\.{at}\.experts(\..*)?$" in targets


def test_dense_experts_beside_a_quantized_one_are_excluded(tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        'rules:\n  - {quantize: ["*shared_expert*"], weights: fp8_channel, inputs: fp8_channel}\n'
        '  - {quantize: ["*attn*"], weights: mxfp8, inputs: mxfp8}\n  - exclude: ["*"]\n'
    )
    source = family_models.save("glm4_moe", tmp_path / "source")
    flags = {"export_quant_cfg": str(recipe), "export_format": "modelopt", "weight_only": False}
    sources.run(source, tmp_path / "out", **flags)
    said = sources.config(tmp_path / "out")["quantization_config"]
    assert said["ignore"] == ["model.layers.1.mlp.experts*"]


def fused(leaves: str) -> list[str]:
    return [f.name for f in fused_sets(frozenset(leaves.split()))]


def test_what_engines_fuse_follows_from_what_a_module_has() -> None:
    assert fused("q_proj k_proj v_proj o_proj") == ["qkv_proj"]
    assert fused("q_proj k_proj v_proj b_proj f_a_proj f_b_proj") == ["in_proj_qkvgfab"]
    assert fused("q_proj k_proj v_proj b_proj g_proj dense") == ["qkvb_proj"]
    assert fused("q_proj k_proj v_proj g_proj") == ["qkv_proj"]  # Step's gate of heads is alone
    assert fused("q_proj kv_a_proj_with_mqa kv_b_proj") == []
    assert fused("q_proj o_proj gate_proj") == []  # AFMoE's gate of attention is alone
    assert fused_names(["w1", "w3"]) == ("gate_up_proj", "w13")
    assert fused_names(["q_proj"]) == ("qkv_proj",)


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("minimax_m3_vl_text", ["q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"]),
        ("kimi_linear", ["q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"]),
    ],
)
def test_five_that_engines_fuse_are_one_parameter(name: str, members: list, tmp_path: Path) -> None:
    source = family_models.save(name, tmp_path / "source")
    shapes = {n: tuple(w.shape) for n, w in sources.tensors(source).items()}
    found = [p for p in recognise(sources.config(source), shapes).params if p.role is Role.LINEAR]
    leaves = [[s.module.rpartition(".")[2] for s in p.sources] for p in found]
    assert members in leaves


def test_modules_that_the_config_keeps_dense_stay_so(tmp_path: Path) -> None:
    source = family_models.save("longcat_flash", tmp_path / "source")
    sources.config(source, disable_quant_module=["self_attn", "mlps"])
    sources.run(source, tmp_path / "out")
    said = sources.config(tmp_path / "out")["quantization_config"]["ignore"]
    assert "model.layers.0.self_attn.1.o_proj" in said and "model.layers.1.mlps.0.up_proj" in said
    assert not any(".experts." in name for name in said)


def test_families_are_told_apart() -> None:
    kinds = [kind for family in FAMILIES for kind in family.kinds]
    classes = [name for family in FAMILIES for name in family.classes]
    assert len(kinds) == len(set(kinds)) and len(classes) == len(set(classes))
    assert all(row.source for family in FAMILIES for row in (*family.dense, *family.called))
