"""Input scales of experts are of what engines multiply, not of what enters their layer."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.read import open_stored
from megatron_quant.errors import CheckpointError
from megatron_quant.evaluation import decoded
from megatron_quant.runs.batches import calibration_batches
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.streaming.model import load_model, run_model
from megatron_quant.streaming.skeleton import Skeleton
from tests.dist.checkpoints import tokenizer
from tests.unit import family_models, sources
from tests.unit.family_models import FAMILIES, Tiny

CALIBRATION = {"calib_size": 4, "calib_seq_length": 32, "cold_experts": "layer-max"}


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("nemotron_h", "layers.2.mixer"),  # experts get the latent input
        ("llama4", "layers.1.feed_forward"),  # experts get the input times the router's score
        ("qwen3_vl_moe", "layers.0.mlp"),
    ],
)
def test_the_inputs_of_experts_are_theirs(family: str, layer: str, tmp_path: Path) -> None:
    source, text = family_models.save(family, tmp_path / "source"), tmp_path / "text.txt"
    tokenizer().save_pretrained(source)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    flags = {**CALIBRATION, "calib_dataset": str(text), "export_quant_cfg": "fp8"}
    flags |= {"export_format": "modelopt", "weight_only": False}
    run = sources.run(source, tmp_path / "out", **flags)

    model = load_model(source, torch.bfloat16)
    at = next(n for n, _ in model.named_modules() if n.endswith(layer))
    seen: dict[str, list[float]] = {"layer": [], "experts": []}

    def watch(name: str) -> None:
        module = model.get_submodule(name)
        which = "experts" if name.endswith("experts") else "layer"
        module.register_forward_pre_hook(
            lambda _, inputs: seen[which].append(inputs[0].abs().max().item())
        )

    watch(at)
    watch(f"{at}.experts")
    options = QuantizeOptions.from_flags(
        hf_model_id=str(source), export_dir=tmp_path / "out", **flags
    )
    with torch.no_grad():
        for batch in calibration_batches(options.calibration, source, 258):
            run_model(model, batch)
    assert run.inputs is not None
    first = (".experts.gate_up_proj.", ".experts.up_proj.")
    found = [v for n, v in run.inputs.found.items() if layer in n and any(p in n for p in first)]
    assert max(found) == pytest.approx(max(seen["experts"]), rel=1e-6)
    scaled = max(seen["experts"]) != max(seen["layer"])
    assert scaled is (family != "qwen3_vl_moe")


def silu(x: float, alpha: float = 1.0) -> float:
    return x / (1 + math.exp(-alpha * x))


@pytest.mark.parametrize(
    ("family", "down", "limit", "wanted"),
    [
        ("gpt_oss", ".linear_fc2.", 0.5, (0.5 + 1) * silu(0.5, 1.702)),
        ("deepseek_v4", ".w2.", 2.0, 2.0 * silu(2.0)),
    ],
)
def test_the_clamp_bounds_what_experts_last_linear_sees(
    family: str, down: str, limit: float, wanted: float, tmp_path: Path
) -> None:
    """Gate and up far beyond the limit: the largest product follows from the limit alone."""
    source, text = family_models.save(family, tmp_path / "source"), tmp_path / "text.txt"
    tokenizer().save_pretrained(source)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    sources.config(source, swiglu_limit=limit)
    first = re.compile(r".*\.experts\.(gate_up_proj|\d+\.w[13]\.weight)")
    sources.edit(
        source, lambda found: {n: w * 1000 if first.fullmatch(n) else w for n, w in found.items()}
    )
    flags = {**CALIBRATION, "calib_dataset": str(text), "export_quant_cfg": "fp8"}
    flags |= {"export_format": "modelopt", "weight_only": False}
    run = sources.run(source, tmp_path / "out", **flags)
    assert run.inputs is not None
    found = [v for n, v in run.inputs.found.items() if ".experts." in n and down in n]
    assert max(found) == pytest.approx(wanted, rel=1e-2)  # computed in bf16


def calibrated(tiny: Tiny, folder: Path) -> sources.Tensors:
    """The tensors of an FP8 export of it."""
    source, text = family_models.save(tiny, folder / "source"), folder / "text.txt"
    tokenizer().save_pretrained(source)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    flags = {**CALIBRATION, "calib_dataset": str(text), "export_quant_cfg": "fp8"}
    flags |= {"export_format": "modelopt", "weight_only": False}
    sources.run(source, folder / "out", **flags)
    return sources.tensors(folder / "out")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FAMILIES["step3p5"], family_models.STEP3P7),  # which holds it as its text decoder
        (family_models.KIMI_K2, replace(family_models.KIMI_K2, config={})),  # DeepSeek-V3
    ],
    ids=["step3p5", "kimi_k2"],
)
def test_a_model_runs_as_the_class_that_transformers_has(
    one: Tiny, other: Tiny, tmp_path: Path
) -> None:
    found, expected = calibrated(one, tmp_path / "one"), calibrated(other, tmp_path / "other")
    assert found.keys() == expected.keys()
    scales = [name for name in found if name.endswith("input_scale")]
    assert any(".experts.3." in name for name in scales)
    for name in scales:
        assert found[name] == expected[name] > 0, name


def test_code_of_a_checkpoint_is_not_run_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = family_models.save("bailing_moe_v2", tmp_path / "source")
    sources.config(source, auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (source / "configuration_own.py").write_text("raise SystemExit('it was run')")
    said = r"no class of model_type 'bailing_moe_v2', and code .* never run; pass --weight-only$"
    with pytest.raises(CheckpointError, match=said):
        Skeleton(open_stored(source), torch.bfloat16)
    with pytest.raises(CheckpointError, match=said):
        load_model(source, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"never run; correct config\.json"):
        decoded(source, torch.bfloat16)
    assert not caplog.records
