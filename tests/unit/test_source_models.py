"""Families that once were refused, or had tensors quantized that engines keep plain."""

import json
from pathlib import Path

import pytest
import torch

from megatron_quant.engines.families import DENSE
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.spec import Role
from megatron_quant.models.structure import recognise
from tests.dist.checkpoints import tokenizer
from tests.unit import family_models, hf_models, sources

INDEXER = {"wq_b": (128, 32), "wk": (32, 64), "weights_proj": (4, 64), "k_norm": (32,)}


@pytest.mark.parametrize("dialect", ["compressed-tensors", "gptq", "modelopt"])
def test_the_indexer_of_sparse_attention_stays_as_engines_build_it(
    dialect: str, tmp_path: Path
) -> None:
    source = hf_models.save("deepseek_v3", tmp_path / "source")
    at = "model.layers.0.self_attn.indexer"
    added = {f"{at}.{n}.weight": torch.ones(s).bfloat16() for n, s in INDEXER.items()}
    sources.edit(source, lambda found: {**found, **added})
    sources.config(source, architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32")
    recipe = {"modelopt": "w4a16_nvfp4", "gptq": "int4"}.get(dialect, "fp8_channel")
    out = tmp_path / "out"
    if dialect == "gptq":
        text = "rules: [{quantize: ['*'], weights: {format: int4, group_size: channel}}]\n"
        (tmp_path / "all.yaml").write_text(text)
        recipe = str(tmp_path / "all.yaml")
    sources.run(source, out, export_quant_cfg=recipe, export_format=dialect)
    found = sources.tensors(out)
    for name in ("wk", "weights_proj"):
        assert torch.equal(found[f"{at}.{name}.weight"], added[f"{at}.{name}.weight"]), name
    packed = {"gptq": "qweight", "modelopt": "weight_scale"}.get(dialect, "weight_scale")
    assert f"{at}.wq_b.{packed}" in found
    stated = json.dumps(sources.config(out)["quantization_config"])
    assert "weights_proj" in stated and "wk" in stated


def test_every_row_of_what_stays_dense_says_who_says_so() -> None:
    assert DENSE and all(row.names and row.source for row in DENSE)


@pytest.mark.parametrize(
    "name",
    ["mlp.expert_bias", "mlp.gate.expert_bias", "mlp.moe_statics.e_score_correction_bias"],
)
def test_a_bias_of_the_router_is_kept_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    source = hf_models.save("glm4_moe", tmp_path / "source")
    sources.config(source, architectures=["UnknownForCausalLM"])  # no table names it
    old = "mlp.gate.e_score_correction_bias"
    sources.edit(source, lambda found: {n.replace(old, name): w for n, w in found.items()})
    before = sources.tensors(source)[f"model.layers.1.{name}"]
    sources.run(source, tmp_path / "out")
    after = sources.tensors(tmp_path / "out")[f"model.layers.1.{name}"]
    assert after.dtype == before.dtype and torch.equal(after, before)


def test_the_projections_that_minimax_m3_fuses_are_one_parameter() -> None:
    at = "model.layers.0.self_attn"
    members = ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj")
    shapes = {f"{at}.{m}.weight": (64, 128) for m in members}
    shapes["model.embed_tokens.weight"] = (10, 128)
    (param,) = (
        p for p in recognise({"num_hidden_layers": 1}, shapes).params if p.role is Role.LINEAR
    )
    assert [s.module.rpartition(".")[2] for s in param.sources] == list(members)


@pytest.mark.parametrize("inner", [32, 16])  # of 32 the fused stack is square
def test_qwen3_vl_moe_of_the_hub_gives_the_bytes_of_the_saved_one(
    inner: int, tmp_path: Path
) -> None:
    saved, hub = tmp_path / "saved", tmp_path / "hub"
    for directory in (saved, hub):
        torch.manual_seed(0)
        family_models.qwen3_vl_moe(inner).bfloat16().save_pretrained(directory)
        tokenizer().save_pretrained(directory)
    sources.edit(
        hub, lambda f: {n: w.transpose(1, 2) if ".experts." in n else w for n, w in f.items()}
    )
    found = []
    for directory in (saved, hub):
        out = directory.with_name(f"{directory.name}-out")
        sources.run(directory, out, export_quant_cfg="mxfp4" if inner == 32 else "fp8")
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert "model.language_model.layers.0.mlp.experts.3.up_proj" in str(sources.tensors(out).keys())


def test_stacks_that_are_square_both_ways_are_refused() -> None:
    config = {
        "model_type": "qwen3_vl_moe",
        "text_config": {"hidden_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 1},
    }
    at = "model.layers.0.mlp"
    shapes = {f"{at}.experts.down_proj": (2, 8, 8), f"{at}.gate.weight": (2, 8)}
    shapes["model.embed_tokens.weight"] = (4, 8)
    with pytest.raises(ArchitectureError, match="do not tell rows from columns"):
        recognise(config, shapes)
