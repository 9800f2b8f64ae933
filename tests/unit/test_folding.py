"""awq and smoothquant: what is folded changes nothing before quantization, and helps after it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import megatron_quant as mq
from megatron_quant import evaluation
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.errors import CalibrationError, CheckpointError, QuantError, RecipeError
from megatron_quant.folding.factors import _realized
from megatron_quant.folding.fold import DOCUMENT, Fold, parse_fold
from megatron_quant.folding.places import Place
from megatron_quant.models import Box
from megatron_quant.runs.file_to_file import Streamed, plan_stream
from tests.dist import checkpoints
from tests.unit import family_models, hf_models
from tests.unit.test_stream_inputs import options, run
from tests.unit.test_stream_layers import contents

AWQ: dict[str, Any] = {"export_quant_cfg": "int4_awq", "calib_size": 16}
SMOOTHED: dict[str, Any] = {
    "export_quant_cfg": "int8",
    "algorithm": "smoothquant",
    "export_format": "compressed-tensors",
    "calib_size": 16,
}
HUB = ("afmoe", "hunyuan_v1_moe", "hy_v3", "mimo_v2_flash")
"""Families with other names of routers, norms or experts."""
TABLES = ("mixtral", "qwen2_moe", "qwen3", "qwen3_moe")


def outliers(directory: Path) -> Path:
    """Make channels of the residual stream, and of values and experts, large, in fp32."""
    torch.manual_seed(1)
    config = json.loads((directory / "config.json").read_text())
    less_one = "gemma" in config["model_type"] or "qwen3_next" in config["model_type"]
    file = directory / "model.safetensors"
    tensors = {name: t.float() for name, t in load_file(file).items()}
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight") and "post_feed" not in name:
            large = 1 + 20 * (torch.rand_like(tensor) < 0.05)
            tensor.copy_(torch.rand_like(tensor).add_(0.5).mul_(large).sub_(float(less_one)))
        if name.endswith(("up_proj.weight", "w3.weight", "v_proj.weight")):
            tensor[::16] *= 12
    save_file(tensors, file, {"format": "pt"})
    config["dtype"] = "float32"
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def gemma(directory: Path) -> Path:
    config = Gemma3TextConfig(**hf_models.BASE, sliding_window=16)
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(directory)
    checkpoints.tokenizer().save_pretrained(directory)
    return directory


def saved(name: str, directory: Path) -> Path:
    if name == "gemma3":
        return outliers(gemma(directory))
    if name in HUB:
        source = family_models.save(name, directory)
        checkpoints.tokenizer().save_pretrained(source)
        return outliers(source)
    make = checkpoints.save if name in TABLES else hf_models.save
    return outliers(make(name, directory))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def measured(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of awq and what was measured."""
    folder = tmp_path_factory.mktemp("measured")
    run(moe, folder / "out", save_calibration=folder / "kept.safetensors", **AWQ)
    return folder


def folded_source(source: Path, out: Path, into: Path) -> Path:
    """The source with the factors of the export, not quantized."""
    shutil.copytree(source, into)
    fold = parse_fold(json.loads((out / DOCUMENT).read_text()), "")
    tensors = load_file(into / "model.safetensors")
    made = {}
    for name, tensor in tensors.items():
        box = Box((0,) * tensor.dim(), tuple(tensor.shape))
        made[name] = fold.apply(name, box, tensor)
    save_file(made, into / "model.safetensors", {"format": "pt"})
    return into


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(2))
        return model(input_ids=ids).logits.double()


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "mixtral", "qwen2_moe", "gemma3", "qwen3_next", "deepseek_v3", *HUB]
)
def test_logits_are_those_of_before(name: str, tmp_path: Path) -> None:
    """Experts, shared experts, grouped queries, norms stored less 1, latent attention; in fp32."""
    source = saved(name, tmp_path / "source")
    flags = {**AWQ, "dtype": "fp32", "alpha": 0.5, "calib_size": 2}
    streamed = run(source, tmp_path / "out", **flags)
    assert verify(tmp_path / "out", source).problems == ()
    norms = [p for p in streamed.job.places.folded if p.norm]
    assert len(norms) >= 4 and len(streamed.job.places.folded) > len(norms)
    folded = folded_source(source, tmp_path / "out", tmp_path / "folded")
    assert contents(folded)["model.safetensors"] != contents(source)["model.safetensors"]
    before, after = logits(source), logits(folded)
    assert (after - before).norm() < 2e-5 * before.norm()


def divergence(source: Path, out: Path) -> float:
    """KL of the calibration text's next tokens, in nats."""
    text = evaluation.Text(Path(__file__), 32, 1024, evaluation.TokenizerChoice(source, False))
    found = evaluation.evaluate(out, text, source, torch.float32, evaluation.decoded, iter)
    assert found.kl is not None
    return found.kl


def test_awq_loses_less_than_rounding(moe: Path, measured: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "max", export_quant_cfg="int4")
    assert divergence(moe, measured / "out") < 0.6 * divergence(moe, tmp_path / "max")


def test_smoothquant_loses_less_than_rounding(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", **SMOOTHED)
    run(moe, tmp_path / "max", **{**SMOOTHED, "algorithm": "max"})
    assert verify(tmp_path / "out", moe).problems == ()
    assert divergence(moe, tmp_path / "out") < 0.6 * divergence(moe, tmp_path / "max")


@pytest.mark.parametrize("recipe", ["int8_sq", "w4a8_awq"])
def test_input_scales_are_those_of_divided_inputs(recipe: str, tmp_path: Path) -> None:
    source, kept = saved("qwen3", tmp_path / "source"), tmp_path / "kept.safetensors"
    flags = {"export_quant_cfg": recipe, "export_format": "compressed-tensors", "calib_size": 2}
    run(source, tmp_path / "out", save_calibration=kept, **flags)
    largest = {"int8_sq": 127.5, "w4a8_awq": 448.0}[recipe]
    fold = parse_fold(json.loads((tmp_path / "out" / DOCUMENT).read_text()), "")
    found, stored = load_file(kept), QuantizedCheckpoint(tmp_path / "out")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
        peaks = found[f"{module}.input_peaks"]
        assert peaks.max() == found[f"{module}.input_amax"]
        divided = (peaks / fold.inputs(f"{module}.weight")).max().item()
        assert stored.input_scale(module) == pytest.approx(divided / largest, rel=1e-6)
        assert divided < peaks.max().item()


def shared(source: Path, folder: Path) -> None:
    flags = {**AWQ, "load_calibration": folder.parent / "kept.safetensors"}
    run(source, folder / "out", **flags)


def test_ranks_and_what_was_kept_give_the_same_bytes(moe: Path, measured: Path, ranks) -> None:
    ranks(2, shared, moe, measured / "two")
    assert contents(measured / "two" / "out") == contents(measured / "out")


def test_another_dialect_has_the_factors_too(moe: Path, measured: Path, tmp_path: Path) -> None:
    mq.convert(measured / "out", tmp_path / "other", format="compressed-tensors")
    assert verify(tmp_path / "other", moe).problems == ()
    assert contents(tmp_path / "other")[DOCUMENT] == contents(measured / "out")[DOCUMENT]


def test_a_folded_export_as_a_source(measured: Path, tmp_path: Path) -> None:
    run(measured / "out", tmp_path / "out", export_quant_cfg="w4a16_nvfp4")
    assert not (tmp_path / "out" / DOCUMENT).exists()
    assert verify(tmp_path / "out", measured / "out").problems == ()


def changed(out: Path, into: Path, change: Any) -> tuple[str, ...]:
    shutil.copytree(out, into)
    document = json.loads((into / DOCUMENT).read_text())
    change(document)
    (into / DOCUMENT).write_text(json.dumps(document))
    return verify(into, out.parent / "source").problems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["bf16"].clear(), "there is no vector model.layers.0.input_layernorm.val"),
        (lambda d: d["rows"].update(x="y"), "there is no vector y; fetch the file again"),
        (lambda d: d.update(columns=[3]), "columns=.* must be an object"),
        (lambda d: d["bf16"].update(dict.fromkeys(d["bf16"], "?")), "no vector of finite"),
        (lambda d: d["fp32"].update(x="AAA="), "no vector of finite"),
        (lambda d: d["fp32"].update(x="AADAfw=="), "no vector of finite"),
        (
            lambda d: d["bf16"].update(dict.fromkeys(d["bf16"], "gD8=")),
            "cannot have 1 factors; fetch the file again",
        ),
    ],
)
def test_a_spoiled_document_is_one_problem(
    change: Any, message: str, moe: Path, measured: Path, tmp_path: Path
) -> None:
    shutil.copytree(moe, tmp_path / "source")
    shutil.copytree(measured / "out", tmp_path / "out")
    (problem,) = changed(tmp_path / "out", tmp_path / "spoiled", change)
    assert re.search(message, problem) and "\n" not in problem


def test_a_norm_of_less_than_its_digits_keeps_the_product() -> None:
    """1 + w near 0: bf16 stores w in steps of 2^-8, and the factor makes up for the step."""
    place = Place(name="n", layer=0, cols=4, before=("n.weight",), norm=True, offset=1.0, after={})
    stored = torch.tensor([-0.9, -1.0, 3.0, 0.5]).to(torch.bfloat16)
    found = _realized(place, torch.tensor([4.0, 4.0, 0.25, 1e9]).double(), stored)
    product = found.factors_K.double() * (found.weight_K.double() + 1)
    assert torch.allclose(product, stored.double() + 1, rtol=1e-7, atol=0)
    assert found.factors_K[1] == found.factors_K[3] == 1
    assert found.factors_K[0] != 4


def planned(source: Path, tmp_path: Path, **flags: Any) -> Streamed:
    return plan_stream(options(source, tmp_path / "out", **flags), 1)


def test_places_of_mixed_rules(moe: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    rule = "{{quantize: [{}], weights: {}, algorithm: {}}}"
    rules = [
        rule.format("'*0.self_attn.[qkv]_proj'", "int4", "max"),
        rule.format("'*0.mlp*'", "int4", "awq, alpha: 0.5"),
        rule.format("'*1.mlp*'", "{format: int4, group_size: 32}", "awq"),
        rule.format("'*'", "int8_group", "awq"),
    ]
    recipe.write_text("rules:\n" + "".join(f"  - {r}\n" for r in rules))
    flags = {"export_quant_cfg": str(recipe), "export_format": "compressed-tensors"}
    places = planned(moe, tmp_path, **flags).job.places
    names = [p.name.removeprefix("model.layers.") for p in places.folded]
    assert "0.input_layernorm" not in names and "1.input_layernorm" in names
    assert {"0.self_attn.v_proj", "0.post_attention_layernorm", "1.mlp.experts.7.up_proj"} < set(
        names
    )


@pytest.mark.parametrize(
    ("name", "flags", "error", "message"),
    [
        ("gemma4_text", AWQ, RecipeError, "where a model of type gemma4_text could fold factors"),
        ("moe", {**AWQ, "alpha": 3.0}, RecipeError, "alpha must be from 0 .* to 1, got 3.0"),
        (
            "moe",
            {**AWQ, "keep_scales": True},
            QuantError,
            "--keep-scales keeps the source's codes, and algorithm awq changes weights",
        ),
    ],
)
def test_what_does_not_fit(
    name: str, flags: dict[str, Any], error: type, message: str, moe: Path, tmp_path: Path
) -> None:
    source = moe if name == "moe" else hf_models.save(name, tmp_path / "source")
    with pytest.raises(error, match=message) as raised:
        planned(source, tmp_path, **flags)
    assert "\n" not in str(raised.value)


def test_a_file_without_peaks_is_refused(moe: Path, measured: Path, tmp_path: Path) -> None:
    flags = {**SMOOTHED, "load_calibration": measured / "kept.safetensors"}
    with pytest.raises(CalibrationError, match=r"has no .*_proj.input_peaks: save one"):
        run(moe, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_statistics_that_are_not_finite(moe: Path, measured: Path, tmp_path: Path) -> None:
    kept = load_file(measured / "kept.safetensors")
    kept["model.layers.1.self_attn.o_proj.input_squares"][3] = torch.nan
    save_file(kept, tmp_path / "kept.safetensors")
    with pytest.raises(CalibrationError, match=r"behind .*1.self_attn.v_proj is not finite"):
        run(moe, tmp_path / "out", **AWQ, load_calibration=tmp_path / "kept.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_document_of_nothing() -> None:
    assert parse_fold(Fold().document(), "x") == Fold()
    with pytest.raises(CheckpointError, match="there is no vector b"):
        parse_fold({"rows": {"a": "b"}}, "x")
