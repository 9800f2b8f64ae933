"""Ready recipes of families, and the output layer that only a rule by its name quantizes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.plan.quantizable import slots
from megatron_quant.ckpt.verify import verify
from megatron_quant.errors import FormatError, RecipeError
from megatron_quant.models.structure import recognise
from megatron_quant.recipes.document import to_document
from megatron_quant.recipes.load import family_recipe_names, load_recipe
from megatron_quant.recipes.parse import parse_recipe
from megatron_quant.recipes.plan import QuantPlan, Slot
from megatron_quant.recipes.resolution import refuse_output, resolve
from tests.dist.checkpoints import tokenizer
from tests.unit import family_models, sources
from tests.unit.hf_models import BASE

HEAD = {"quantize": ["*.lm_head", "lm_head"], "weights": "nvfp4", "allow_output": True}
REST = {"quantize": ["*"], "weights": "nvfp4"}
OF = {
    "qwen3_5_nvfp4": ("qwen3_5_moe", {"nvfp4": "experts shared_expert lm_head", "fp8": "attn"}),
    "nemotron3": ("nemotron_h", {"nvfp4": "experts", "fp8": "shared_experts in_proj out_proj"}),
    "glm5": ("glm_moe_dsa", {"fp8_block": "experts self_attn shared_experts"}),
    "deepseek_v4": ("deepseek_v4", {"nvfp4": "experts"}),
    "kimi_k2": ("kimi_k25", {"int4": "experts"}),
    "gpt_oss": ("gpt_oss", {"mxfp4": "experts"}),
    "gemma4": ("gemma4", {"nvfp4": "experts self_attn mlp"}),
    "llama4": ("llama4", {"nvfp4": "experts feed_forward"}),
    "minimax_m2": ("minimax_m2", {"int4": "experts"}),
}
"""Recipe -> its family, and parts of the names of what has each format."""


def plan_of(family: str, recipe: str, tmp_path: Path) -> QuantPlan:
    source = family_models.save(family, tmp_path / "source")
    config = sources.config(source)
    shapes = {n: tuple(w.shape) for n, w in sources.tensors(source).items()}
    if recipe == "glm5":  # which leaves the first three layers as they are
        config["num_hidden_layers"] = 4
        again = {n: s for n, s in shapes.items() if ".layers.1." in n}
        shapes |= {n.replace(".1.", f".{i}.", 1): s for n, s in again.items() for i in (2, 3)}
    return resolve(load_recipe(recipe), slots(recognise(config, shapes).params))


@pytest.mark.parametrize("recipe", family_recipe_names())
def test_a_familys_recipe_gives_each_part_its_format(recipe: str, tmp_path: Path) -> None:
    family, parts = OF[recipe]
    plan = plan_of(family, recipe, tmp_path)
    found: dict[str, set[str]] = {}
    for decision in plan.quantized:
        assert decision.weights is not None
        found.setdefault(decision.weights.name, set()).update(decision.slot.sources)
    assert found.keys() == parts.keys()
    for fmt, names in found.items():
        assert all(any(part in name for part in parts[fmt].split()) for name in names), names
        assert all(any(part in name for name in names) for part in parts[fmt].split()), fmt
    if recipe == "glm5":
        assert all(".layers.3." in name for name in found["fp8_block"])


RUNS = {
    "nemotron3": ("modelopt", "sglang"),
    "glm5": ("fp8", None),  # whose blocks of 128 are larger than these weights
    "kimi_k2": ("compressed-tensors", "vllm"),
    "gemma4": ("modelopt", "vllm"),
    "llama4": ("modelopt", "vllm"),
    "minimax_m2": ("compressed-tensors", "vllm"),
}
"""Recipe -> its dialect and an engine; the others have tests of their own (qwen3_5_nvfp4 below)."""


LARGER = {
    "glm5": family_models.causal(
        "GlmMoeDsa",
        family_models.SPARSE
        | {"num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    ),
    "minimax_m2": family_models.causal(  # for groups of 128
        "MiniMaxM2",
        BASE
        | {"num_local_experts": 4, "num_experts_per_tok": 2}
        | {"hidden_size": 128, "intermediate_size": 128},
    ),
}


@pytest.mark.parametrize("recipe", RUNS)
def test_a_familys_recipe_runs_on_it(recipe: str, tmp_path: Path) -> None:
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    tiny = family_models.FAMILIES[OF[recipe][0]]
    family_models.save(replace(tiny, make=LARGER.get(recipe, tiny.make)), source)
    tokenizer().save_pretrained(source)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    dialect, engine = RUNS[recipe]
    flags = {"weight_only": False, "calib_size": 4, "calib_seq_length": 32}
    flags |= {"calib_dataset": str(text), "cold_experts": "layer-max", "serve_engine": engine}
    sources.run(source, out, export_quant_cfg=recipe, export_format=dialect, **flags)
    report = verify(out, source)
    assert not report.problems
    assert {check.format for check in report.tensors} == {"", *OF[recipe][1]}


def test_every_recipe_says_whose_choices_it_takes() -> None:
    folder = Path(__file__).parents[2] / "megatron_quant" / "configs" / "families"
    assert {p.stem for p in folder.iterdir()} == set(OF) == set(family_recipe_names())
    for path in folder.iterdir():
        assert "# Source: " in path.read_text() and load_recipe(path.stem).description


def head(name: str = "lm_head") -> Slot:
    return Slot(name=f"{name}.weight", sources=(name,), shape=(64, 64), fixed="output")


LINEAR = Slot(name="layers.0.o_proj.weight", sources=("layers.0.o_proj",), shape=(64, 64))


def resolved(*rules: dict, slot: Slot | None = None) -> QuantPlan:
    return resolve(parse_recipe("mine", {"rules": list(rules)}), (LINEAR, slot or head()))


def test_no_wildcard_quantizes_the_output_layer() -> None:
    assert len(resolved(REST).quantized) == 1
    star = {**HEAD, "quantize": ["*head", "*"]}
    assert [d.slot.name for d in resolved(star).quantized] == [LINEAR.name]
    named = {**HEAD, "allow_output": False}
    with pytest.raises(RecipeError, match=r"matches only weights that are never quantized"):
        resolved(REST, named)


@pytest.mark.parametrize("name", ["lm_head", "language_model.lm_head"])
def test_a_rule_that_names_it_does(name: str) -> None:
    plan = resolved(REST, HEAD, slot=head(name))
    assert [d.slot.name for d in plan.quantized] == [LINEAR.name, f"{name}.weight"]
    document = to_document(parse_recipe("mine", {"rules": [REST, HEAD]}), plan)
    assert document["rules"][1]["allow_output"] is True
    with pytest.raises(RecipeError, match="of which a Megatron checkpoint keeps no scales"):
        refuse_output(plan)


def test_no_rule_quantizes_an_embedding() -> None:
    """No engine is known that loads one, so naming it is not enough."""
    slot = Slot(
        name="embed.weight", sources=("model.embed_tokens",), shape=(64, 64), fixed="embedding"
    )
    rule = {**HEAD, "quantize": ["model.embed_tokens"]}
    with pytest.raises(RecipeError, match=r"never quantized \(embedding\)"):
        resolved(REST, rule, slot=slot)


def test_an_exclusion_before_it_wins() -> None:
    plan = resolved({"exclude": ["lm_head"]}, {**HEAD, "quantize": ["lm_head", "*o_proj"]})
    assert [d.slot.name for d in plan.quantized] == [LINEAR.name]


def test_allow_output_is_true_or_false() -> None:
    with pytest.raises(RecipeError, match=r"rule 1: allow_output must be true or false, got 'yes'"):
        parse_recipe("mine", {"rules": [{**HEAD, "allow_output": "yes"}]})
    with pytest.raises(RecipeError, match="allow_output and allow_mtp belong to quantize"):
        parse_recipe("mine", {"rules": [{"exclude": ["*"], "allow_output": True}]})


def test_qwen3_5_as_it_is_downloaded_most(tmp_path: Path) -> None:
    source = family_models.save("qwen3_5_moe", tmp_path / "source")
    tokenizer().save_pretrained(source)
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    flags = {"weight_only": False, "calib_size": 4, "calib_seq_length": 32}
    flags |= {"export_quant_cfg": "qwen3_5_nvfp4", "calib_dataset": str(text)}
    sources.run(source, out, export_format="modelopt", serve_engine="vllm", **flags)
    assert not verify(out, source).problems
    said = sources.config(out)["quantization_config"]
    layers = {name: layer["quant_algo"] for name, layer in said["quantized_layers"].items()}
    assert said["quant_algo"] == "MIXED_PRECISION" and said["kv_cache_scheme"]["num_bits"] == 8
    assert layers["lm_head"] == layers["model.layers.0.mlp.experts.3.up_proj"] == "W4A16_NVFP4"
    assert layers["model.layers.0.linear_attn.in_proj_qkv"] == "FP8"
    assert layers["model.layers.1.self_attn.o_proj"] == "FP8" and "lm_head" not in said["ignore"]
    found = sources.tensors(out)
    assert found["lm_head.weight"].dtype == torch.uint8 and "lm_head.weight_scale_2" in found
    assert "lm_head.input_scale" not in found


@pytest.mark.parametrize(
    ("family", "dialect", "engine", "said"),
    [
        ("qwen3_next", "modelopt", "vllm", "vLLM builds its output layer without"),
        ("qwen3_5_moe", "compressed-tensors", None, "which vllm reads in ModelOpt's dialect alone"),
    ],
)
def test_engines_that_load_no_quantized_output_layer(
    family: str, dialect: str, engine: str | None, said: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "head.yaml"
    recipe.write_text(str({"rules": [HEAD, REST]}).replace("True", "true"))
    source = family_models.save(family, tmp_path / "source")
    flags = {"export_quant_cfg": str(recipe), "export_format": dialect}
    with pytest.raises(FormatError, match=said):
        sources.run(source, tmp_path / "out", serve_engine=engine, **flags)


def test_vllm_finds_no_exclusion_of_trinitys_output_layer(tmp_path: Path) -> None:
    source = family_models.save("afmoe", tmp_path / "source")
    flags = {"export_quant_cfg": "w4a16_nvfp4", "serve_engine": "vllm"}
    with pytest.raises(FormatError, match=r"gives its output layer no name.*compressed-tensors"):
        sources.run(source, tmp_path / "out", export_format="modelopt", **flags)
    sources.run(source, tmp_path / "out", export_format="compressed-tensors", **flags)


@pytest.mark.parametrize("family", ["nemotron_h", "granitemoehybrid"])
def test_no_block_joins_the_parts_of_a_mamba_projection(family: str, tmp_path: Path) -> None:
    source = family_models.save(family, tmp_path / "source")
    flags = {"export_format": "compressed-tensors", "serve_engine": "vllm"}
    with pytest.raises(FormatError, match=r"in_proj has parts of \d+ rows, which blocks of 128"):
        sources.run(source, tmp_path / "out", export_quant_cfg="fp8_block", **flags)
    sources.run(
        source, tmp_path / "out", export_quant_cfg="fp8_channel", weight_only=False, **flags
    )


def test_vllm_takes_no_scale_of_a_whole_linear_of_minimax_m3s_attention(tmp_path: Path) -> None:
    source = family_models.save("minimax_m3_vl_text", tmp_path / "source")
    flags = {"export_format": "modelopt", "serve_engine": "vllm"}
    with pytest.raises(FormatError, match=r"index_q_proj has a scale of the whole linear: vLLM"):
        sources.run(source, tmp_path / "out", export_quant_cfg="w4a16_nvfp4", **flags)
    sources.run(source, tmp_path / "out", export_quant_cfg="nvfp4_experts_only", **flags)


def test_vllm_reads_deepseek_v4_in_its_own_form_alone(tmp_path: Path) -> None:
    source = family_models.save("deepseek_v4", tmp_path / "source")
    flags = {"export_quant_cfg": "deepseek_v4", "export_format": "modelopt"}
    with pytest.raises(FormatError, match="in the form of its release alone"):
        sources.run(source, tmp_path / "out", serve_engine="vllm", **flags)
    sources.run(source, tmp_path / "out", **flags)
