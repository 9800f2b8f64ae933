"""Experts measured on more tokens than the router gives them (--calib-experts), by --stream."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from megatron_quant.errors import CalibrationError
from megatron_quant.runs import file_layers
from megatron_quant.runs.batches import calibration_batches
from tests.dist import checkpoints
from tests.unit import hf_models
from tests.unit.test_stream_inputs import options, run

GPTQ = {"export_quant_cfg": "nvfp4", "algorithm": "gptq", "calib_size": 6, "calib_batch_size": 1}
TOKENS = 6 * 32
AT = "model.layers.{}.mlp.experts.{}.gate_proj.input_moment"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


def measured(source: Path, folder: Path, experts: str) -> tuple[dict, dict]:
    """What a run keeps, and its report's tokens."""
    kept = folder / f"{experts}.safetensors"
    flags = {**GPTQ, "calib_experts": experts, "keep_hessians": True, "save_calibration": kept}
    tokens = run(source, folder / f"out-{experts}", **flags).tokens
    return load_file(kept), dict(tokens)


@pytest.fixture(scope="module")
def routed(source: Path, tmp_path_factory) -> tuple[dict, dict]:
    return measured(source, tmp_path_factory.mktemp("routed"), "routed")


def check_the_rest(found: dict, routed: dict) -> None:
    rest = [name for name in routed if ".experts." not in name]
    assert len(rest) > 10
    for name in rest:
        assert torch.equal(found[name], routed[name]), name


def test_all_experts_see_all_tokens(source: Path, routed: tuple, tmp_path: Path) -> None:
    found, tokens = measured(source, tmp_path, "all")
    check_the_rest(found, routed[0])
    assert set(tokens.values()) == {TOKENS} and len(tokens) == 2 * 2 * 8
    for layer in (0, 1):
        first = found[AT.format(layer, 0)]
        for expert in range(1, 8):
            torch.testing.assert_close(found[AT.format(layer, expert)], first)
    assert sum(routed[1].values()) == 2 * 2 * 2 * TOKENS


def test_a_share_of_them_sees_a_token(source: Path, routed: tuple, tmp_path: Path) -> None:
    """0.4 of 8 experts are 4: those of the largest scores, of which the router chose two."""
    found, tokens = measured(source, tmp_path, "0.4")
    check_the_rest(found, routed[0])
    assert all(tokens[name] >= count for name, count in routed[1].items())
    model = AutoModel.from_pretrained(source, dtype=torch.bfloat16, experts_implementation="eager")
    given = [torch.zeros(8, dtype=torch.int64) for _ in model.layers]

    def count(layer: int):
        def hook(router, args, output) -> None:
            best = output[0].float().topk(4, -1).indices
            given[layer].add_(torch.nn.functional.one_hot(best, 8).sum((0, 1)))

        return hook

    for i, layer in enumerate(model.layers):
        layer.mlp.gate.register_forward_hook(count(i))
    chosen = options(source, source, **GPTQ).calibration
    with torch.no_grad():
        for batch in calibration_batches(chosen, source, 1 << 20):
            model(input_ids=batch, use_cache=False)
    for i, of_layer in enumerate(given):
        own = [tokens[f"decoder.layers.{i}.mlp.experts.linear_fc1.weight{e}"] for e in range(8)]
        assert own == of_layer.tolist()


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "gemma4", "qwen3_next"])
def test_other_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, and for max with all of the model loaded, each expert is given as many."""
    source = hf_models.save(name, tmp_path / "source")
    flags = {"export_quant_cfg": "nvfp4", "calib_experts": "0.75"}
    layers = run(source, tmp_path / "out", **flags).tokens
    monkeypatch.setattr(file_layers, "by_layers", lambda *args: None)
    assert run(source, tmp_path / "whole", **flags).tokens == layers
    assert layers and all(layers.values())


def test_models_that_cannot_are_refused(tmp_path: Path) -> None:
    source = hf_models.save("llama4", tmp_path / "source")
    said = r"--calib-experts: .*feed_forward.experts of transformers' model are not called with"
    with pytest.raises(CalibrationError, match=said):
        run(source, tmp_path / "out", **GPTQ, calib_experts="all")
    assert not (tmp_path / "out").exists()
