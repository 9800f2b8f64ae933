"""Tables with latent attention, shared experts, sigmoid routers: configs, refusals, fusion."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_quant.ckpt.dialects import get_dialect
from megatron_quant.ckpt.plan.quantizable import slots
from megatron_quant.ckpt.plan.sidecars import companions
from megatron_quant.ckpt.read.checks import check_weights
from megatron_quant.ckpt.read.directory import open_directory
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.engines.serving import obstacle
from megatron_quant.errors import ArchitectureError, CheckpointError, CoverageError, LayoutError
from megatron_quant.models import Role, check_layout, lookup
from megatron_quant.models.spec import engine_groups
from megatron_quant.models.structure import describe_structure, has_table
from megatron_quant.recipes.load import load_recipe
from megatron_quant.recipes.parse import parse_recipe
from megatron_quant.recipes.resolution import resolve
from tests.dist.command import command
from tests.dist.pool import Ranks
from tests.unit import hf_models, tiny
from tests.unit.test_stream_models import run

CONFIG = tiny.config("deepseek_v3")
YARN = CONFIG["rope_parameters"]
DOWN = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False .* use --stream"),
    ("deepseek_v3", {"kv_lora_rank": None}, "no 'kv_lora_rank'"),
    ("deepseek_v3", {"num_key_value_heads": 4}, "num_key_value_heads=4 .* only 8 is"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' .* only 'sigmoid'"),
    ("deepseek_v3", {"first_k_dense_replace": 3}, "first_k_dense_replace=3 .* from 0 to 2"),
    ("deepseek_v3", {"n_group": 3}, "n_group=3, topk_group=2 .* do not fit 8 experts"),
    ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 1}, "by their best 1, .* --stream"),
    ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=False with .*=4 .* --stream"),
    ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": None}}, "mscale_all_dim=0.7 without"),
    ("deepseek_v3", {"rope_parameters": {**YARN, "truncate": False}}, "truncate=False"),
    (
        "deepseek_v3",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type='linear' .* only 'default' or 'yarn'",
    ),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0"),
    ("qwen2_moe", {"decoder_sparse_step": 3}, "no layer with experts"),
    ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts=0"),
    ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor=1.5"),
    (
        "glm4_moe",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "partial_rotary_factor=0.5 with rope_type 'yarn' .* use --stream",
    ),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense"] * 3}, "no layer with experts"),
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types=.* each of 3 layers"),
    ("glm4_moe_lite", {"first_k_dense_replace": 1}, "mlp_layer_types and .*=1 .* different"),
    ("dots1", {"layer_types": None, "max_window_layers": 1, "sliding_window": 8}, "window=8"),
    ("dots1", {"norm_topk_prob": False}, "norm_topk_prob=False with .*=3"),
    ("hy_v3", {"qk_norm": False}, "qk_norm=False .* only True"),
    ("hy_v3", {"route_norm": False}, "norm_topk_prob=False with"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_a_table_does_not_describe_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    config = {**tiny.config(name), **changes}
    with pytest.raises(ArchitectureError, match=message) as caught:
        lookup(config).params(config)
    assert "\n" not in str(caught.value)
    assert not has_table(config)


def test_the_smaller_glm_and_keys_as_the_hub_has_them() -> None:
    config = tiny.config("glm4_moe")
    config |= {"use_qk_norm": False, "first_k_dense_replace": 1}
    del config["rope_parameters"]
    config |= {"rope_theta": 1e6, "partial_rotary_factor": 0.25, "rope_scaling": None}
    found = lookup(config)
    assert found.megatron_config(config)["qk_layernorm"] is False
    assert found.megatron_config(config)["add_qkv_bias"] is True
    assert found.gpt_config(config)["rotary_percent"] == 0.25
    hunyuan = tiny.config("hy_v3")
    hub = {"expert_hidden_dim": hunyuan.pop("moe_intermediate_size"), "first_k_dense_replace": 1}
    del hunyuan["mlp_layer_types"]
    described = lookup(hunyuan).megatron_config({**hunyuan, **hub})
    assert (described["moe_ffn_hidden_size"], described["moe_layer_freq"]) == (16, [0, 1])


def test_a_text_decoder_beside_a_tower() -> None:
    config = tiny.config("kimi_k25")
    params = lookup(config).params(config)
    assert {s.name.partition(".")[0] for p in params for s in p.sources} == {"language_model"}
    inner = lookup(CONFIG).megatron_config(CONFIG)
    assert lookup(config).megatron_config(config) == inner
    shapes = {s.name: s.shape for p in params for s in p.sources}
    tower = {"vision_tower.patch_embed.proj.weight": (2, 3, 4, 4), "mm_projector.proj.0.bias": (2,)}
    described = describe_structure(config, {**shapes, **tower}).params
    outside = [p.sources[0].name for p in described if p.role is Role.OUTSIDE]
    assert outside == list(tower) and len(described) == len(params) + 2
    shapes = {**shapes, "language_model.model.layers.0.odd.weight": (2, 2)}
    assert describe_structure(config, shapes).params == params  # check_weights refuses the odd one
    for found, lines in ((described, 0), (params, 1)):
        quant = resolve(load_recipe("w4a16_nvfp4"), slots(found))
        made = companions(config, quant, get_dialect("modelopt"), torch.bfloat16)
        assert len(made.left_out) == lines and all("vision tower" in n for n in made.left_out)


def test_both_scales_of_yarn() -> None:
    found = lookup(CONFIG).megatron_config(CONFIG)
    assert (found["mscale"], found["mscale_all_dim"], found["rope_type"]) == (1.0, 0.7, "yarn")
    without = {k: v for k, v in YARN.items() if not k.startswith("mscale")}
    config = {**CONFIG, "rope_parameters": without}
    found = lookup(config).megatron_config(config)
    assert (found["mscale"], found["mscale_all_dim"]) == (1.0, 0.0)
    # GPTModel makes no rotary embedding of its own then
    assert lookup(config).gpt_config(config)["position_embedding_type"] == "rope"
    assert lookup(config).config_attributes(config) == {}


def test_the_first_layers_are_dense() -> None:
    found = lookup(CONFIG).megatron_config(CONFIG)
    assert found["moe_layer_freq"] == [0, 1, 1]
    assert found["moe_shared_expert_intermediate_size"] == 32
    biases = [p for p in lookup(CONFIG).params(CONFIG) if p.fp32]
    assert [(p.layer, p.role, p.shape) for p in biases] == [
        (1, Role.ROUTER, (8,)),
        (2, Role.ROUTER, (8,)),
    ]


def test_a_layout_that_cuts_the_shared_expert() -> None:
    config = {**tiny.config("qwen2_moe"), "shared_expert_intermediate_size": 22}
    with pytest.raises(LayoutError, match=r"--tp 4 does not divide .* of the shared expert \(22\)"):
        check_layout(config, 4, 1, 1)


def test_what_engines_fuse_has_one_format() -> None:
    params = lookup(CONFIG).params(CONFIG)
    first = f"model.layers.0.{DOWN[0]}"
    members = next(g for g in engine_groups(params) if g[0].module == first)
    assert [s.module for s in members] == [f"model.layers.0.{leaf}" for leaf in DOWN]
    rules = [
        {"exclude": ["*kv_a_proj_with_mqa"]},
        {"quantize": ["*self_attn*", "*mlp*"], "weights": "fp8_block"},
    ]
    with pytest.raises(CoverageError, match=f"{DOWN[0]} .* and .*{DOWN[1]} .* engines fuse, diff"):
        resolve(parse_recipe("mine", {"rules": rules}), slots(params))
    plain = lookup(config := tiny.config("deepseek_v3_plain")).params(config)
    resolve(parse_recipe("mine", {"rules": rules}), slots(plain))  # q is not compressed there


def test_serving_over_ranks() -> None:
    sizes = {"moe_intermediate_size": 256, "intermediate_size": 256, "q_lora_rank": 128}
    more = {"hidden_size": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 28, "v_head_dim": 36}
    config = {**CONFIG, **sizes, **more}
    params = lookup(config).params(config)
    plan = resolve(load_recipe("fp8_block"), slots(params))
    assert obstacle(plan, params, "fp8", "vllm", 1) is None
    found = obstacle(plan, params, "fp8", "vllm", 4)
    assert found is not None and "self_attn.o_proj" in found.what


def test_the_cache_of_latent_attention_has_no_scales(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "q_lora_rank": 32, "moe_intermediate_size": 32}
    config = {**CONFIG, **sizes, "v_head_dim": 16, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["quantize", "--hf-model-id", str(tmp_path), "--export-quant-cfg", "nvfp4", "--dry-run"]
    ended = command(*argv, "--export-kv-cache-quant", "fp8")
    assert ended.status and "take fp8_cast, or none" in ended.err
    ended = command(*argv, "--export-kv-cache-quant", "fp8_cast")
    assert (ended.status, ended.err) == (0, "")


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a layer beyond the model's own, as DeepSeek's checkpoints have it."""
    directory = hf_models.save("deepseek_v3", tmp_path_factory.mktemp("drafting"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(64, 128, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"rope_interleave": True, "num_nextn_predict_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_layers_that_draft_are_left_out_or_streamed_as_they_are(
    drafting: Path, tmp_path: Path
) -> None:
    checkpoint = open_directory(drafting)
    params = lookup(checkpoint.config).params(checkpoint.config)
    assert check_weights(checkpoint, params) == ("model.layers.2.eh_proj.weight",)
    out = load_file(run(drafting, tmp_path / "out") / "model.safetensors")
    assert torch.equal(out["model.layers.2.eh_proj.weight"], torch.ones(64, 128).bfloat16())
    assert out["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    checkpoint.config["num_nextn_predict_layers"] = 0
    with pytest.raises(
        CheckpointError, match=r"eh_proj.weight .* is no tensor of the architecture"
    ):
        check_weights(checkpoint, params)


@pytest.mark.parametrize("scales", ["shared", "per_expert"])
def test_fused_linears_share_a_scale(drafting: Path, tmp_path: Path, scales: str) -> None:
    out = run(drafting, tmp_path / "out", expert_scales=scales)
    assert not verify(out, drafting).problems
    tensors = load_file(out / "model.safetensors")
    first, second = (f"model.layers.0.{leaf}.weight_scale_2" for leaf in DOWN)
    assert tensors[first] == tensors[second]
    tensors[second] *= 2
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (problem,) = verify(out).problems
    assert DOWN[0] in problem and "engines use one scale for all" in problem


def test_a_config_that_its_table_refuses_is_recognised() -> None:
    config = {**CONFIG, "rope_interleave": False}
    shapes = {s.name: s.shape for p in lookup(CONFIG).params(CONFIG) for s in p.sources}
    names = {p.name for p in describe_structure(config, shapes).params}
    assert "model.layers.0.self_attn.fused_qkv_a_proj.weight" in names


@pytest.mark.parametrize("name", ["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"])
def test_gated_delta_nets_are_streamed(name: str) -> None:
    with pytest.raises(ArchitectureError, match=r"gated delta nets, .* pass --stream"):
        lookup({"architectures": [name]})


def with_normed_queries() -> None:
    """A layer as megatron-core 0.19 builds it."""
    from megatron_quant.mcore.model.check import check_model

    model = torch.nn.Module()
    model.register_parameter("layer_norm_weight", torch.nn.Parameter(torch.ones(1)))
    for name in ("linear_q_proj", "self_attention", "0", "layers"):
        inner, model = model, torch.nn.Module()
        model.add_module(name, inner)
    check_model([model], [])


def test_a_release_that_normalizes_queries_twice(ranks: Ranks) -> None:
    (error,) = ranks.errors(1, with_normed_queries)
    assert isinstance(error, ArchitectureError)
    assert "q_lora_rank=None" in str(error) and "--stream" in str(error)
