"""Input scales of experts are of what engines multiply, not of what enters their layer."""

from pathlib import Path

import pytest
import torch

from megatron_quant.runs.batches import calibration_batches
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.streaming.model import load_model, run_model
from tests.dist.checkpoints import tokenizer
from tests.unit import family_models, sources

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
