"""``--quantize-mtp``: which layers for speculation it takes, and what it refuses."""

from pathlib import Path

import pytest
import torch

import megatron_quant as mq
from megatron_quant.ckpt.verify import verify
from megatron_quant.errors import CheckpointError, RecipeError
from megatron_quant.recipes.document import to_document
from megatron_quant.recipes.load import load_recipe
from megatron_quant.recipes.parse import parse_recipe
from megatron_quant.recipes.schema import Recipe
from megatron_quant.runs.job import planned
from megatron_quant.runs.options import QuantizeOptions
from tests.dist import checkpoints, drafts
from tests.dist.test_family_exports import SIZES
from tests.unit import sources

DOWN = "model.layers.2.mlp.experts.1.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = checkpoints.save("deepseek_v3", tmp_path_factory.mktemp("source"), **SIZES["kimi_k25"])
    return drafts.add(made)


def of_rules(*rules: dict) -> Recipe:
    return parse_recipe("mine", {"rules": list(rules)})


NVFP4 = {"quantize": ["*"], "weights": "nvfp4"}
INT4 = {"format": "int4", "group_size": 64}
DENSE = {"exclude": ["*self_attn*", "*mtp.*.self_attention*"]}


def test_the_default_leaves_them(source: Path, tmp_path: Path) -> None:
    sources.run(source, tmp_path / "out")
    found, own = sources.tensors(tmp_path / "out"), sources.tensors(source)
    names = [name for name in own if "layers.2." in name]
    assert len(names) > 20 and all(torch.equal(found[name], own[name]) for name in names)
    config = sources.config(tmp_path / "out")
    assert DOWN in config["quantization_config"]["ignore"]


def test_rules_decide_on_their_linears(source: Path, tmp_path: Path) -> None:
    """The projection of both inputs, norms, the router and copies stay, whatever the rules say."""
    recipe = of_rules(DENSE, {**NVFP4, "allow_mtp": True})
    done = sources.run(source, tmp_path / "out", export_quant_cfg=recipe)
    assert not verify(tmp_path / "out", source).problems
    found = sources.tensors(tmp_path / "out")
    scaled = {n.removesuffix(".weight_scale") for n in found if n.endswith("weight_scale")}
    of_draft = {n.removeprefix("model.layers.2.") for n in scaled if "layers.2." in n}
    experts = {f"mlp.experts.{e}" for e in range(4)} | {"mlp.shared_experts"}
    linears = ("gate_proj", "up_proj", "down_proj")
    assert of_draft == {f"{mlp}.{linear}" for mlp in experts for linear in linears}
    document = to_document(recipe, done.job.quant)
    assert document["rules"][1]["allow_mtp"] is True
    assert parse_recipe("mine", document) == recipe
    ignored = sources.config(tmp_path / "out")["quantization_config"]["ignore"]
    assert {"model.layers.2.eh_proj", "model.layers.2.shared_head.head"} <= set(ignored)
    mq.convert(tmp_path / "out", tmp_path / "other", format="modelopt")
    assert not verify(tmp_path / "other", source).problems
    found = sources.tensors(tmp_path / "other")
    assert f"{DOWN}.weight_scale" in found


def test_config_json_alone_plans_them(source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    flags = {"hf_model_id": str(tmp_path), "export_quant_cfg": "nvfp4"}
    names = {}
    for chosen in (False, True):
        job = planned(QuantizeOptions.from_flags(**flags, quantize_mtp=chosen))
        names[chosen] = {s for d in job.quant.quantized for s in d.slot.sources}
    assert len(names[True] - names[False]) > 12 and DOWN in names[True] - names[False]


# (recipe, flags, what it says)
REFUSED = [
    ("nvfp4", {"weight_only": False}, r"calibrated on data, and --stream runs transformers, which"),
    (
        of_rules({"exclude": ["mtp.*", "model.layers.2.*"]}, NVFP4),
        {},
        r"takes no linear .*\(model.layers.2.*\): rule 1: exclude mtp.\*, model.layers.2.\* comes",
    ),
    (
        of_rules(NVFP4 | {"quantize": ["model.layers.[01].*"]}),
        {},
        r"takes no linear of layers for speculation .*: no rule matches them",
    ),
    (
        of_rules({**NVFP4, "quantize": ["*experts.[0-2].*"]}, {"exclude": ["*"]}),
        {},
        r"are experts of one layer but differ",
    ),
]


@pytest.mark.parametrize(("recipe", "flags", "said"), REFUSED)
def test_refused(
    recipe: Recipe | str, flags: dict, said: str, source: Path, tmp_path: Path
) -> None:
    flags = {"export_format": "modelopt", "quantize_mtp": True, **flags}
    with pytest.raises(Exception, match=said) as caught:
        sources.run(source, tmp_path / "out", export_quant_cfg=recipe, **flags)
    assert isinstance(caught.value, mq.QuantError) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_rule_for_them_alone_must_say_so(source: Path, tmp_path: Path) -> None:
    rule = {**NVFP4, "quantize": ["model.layers.2.mlp.experts.*"]}
    with pytest.raises(RecipeError, match="only layers for speculation: give it allow_mtp: true"):
        sources.run(source, tmp_path / "out", export_quant_cfg=of_rules(rule, NVFP4))


def test_a_model_without_them(tmp_path: Path) -> None:
    source = checkpoints.save("qwen3_moe", tmp_path / "source")
    with pytest.raises(RecipeError, match="the model has no layers for speculation here"):
        sources.run(source, tmp_path / "out", quantize_mtp=True)


def test_a_part_that_is_missing(source: Path, tmp_path: Path) -> None:
    """Carried, it is nothing to wonder at; a quantized layer without an expert is no layer."""
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    sources.write(lacking, {n: t for n, t in sources.tensors(source).items() if DOWN not in n})
    for name in ("config.json",):
        (lacking / name).write_bytes((source / name).read_bytes())
    sources.run(lacking, tmp_path / "carried")
    with pytest.raises(CheckpointError, match=rf"has no {DOWN}.weight of shape \[64, \d+\], which"):
        sources.run(lacking, tmp_path / "out", quantize_mtp=True)


def test_an_engine_that_builds_them_plain(tmp_path: Path) -> None:
    made = checkpoints.save("qwen3_5_moe", tmp_path / "source", **SIZES["qwen3_5_moe"])
    source = drafts.add(made, "mtp_num_hidden_layers", copies=False)
    recipe = of_rules({"quantize": ["*experts*"], "weights": INT4}, {"exclude": ["*"]})
    flags = {"export_quant_cfg": recipe, "export_format": "gptq", "serve_engine": "vllm"}
    sources.run(source, tmp_path / "dense", **flags)
    said = r"mtp.layers.0.mlp.experts.0.\w+ is quantized, and vLLM builds layers for speculation pl"
    with pytest.raises(mq.QuantError, match=said):
        sources.run(source, tmp_path / "out", **flags, quantize_mtp=True)
    sources.run(source, tmp_path / "out", **{**flags, "serve_engine": None}, quantize_mtp=True)


def test_what_allows_them() -> None:
    assert not load_recipe("nvfp4").allows_mtp
    with pytest.raises(RecipeError, match="allow_mtp must be true or false, got 1"):
        of_rules({**NVFP4, "allow_mtp": 1})
    flags = {"hf_model_id": "x", "auto_quantize_bits": 5.0, "quantize_mtp": True}
    with pytest.raises(mq.QuantError, match="bits leaves layers for speculation as they are"):
        QuantizeOptions.from_flags(**flags)
