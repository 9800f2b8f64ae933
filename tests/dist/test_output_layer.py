"""The output layer is quantized by a rule that names it, at any layout as by --stream."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_quant as mq
from megatron_quant.dist import Groups
from megatron_quant.errors import LayoutError, RecipeError
from tests.dist import checkpoints
from tests.dist.pool import Ranks

DATA = mq.Calibration(
    dataset=__file__, size=2, seq_length=16, batch_size=1, cold_experts="layer-max"
)
WRITE = mq.Write(fsync=False)
VOCABULARY = 358  # which four ranks share unequally, in the middle of blocks
LAYOUTS = [(1, {}), (4, {"tp": 4}), (4, {"tp": 2, "pp": 2}), (2, {"cp": 2})]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"), vocab_size=VOCABULARY)


def recipe(folder: Path, **head: Any) -> str:
    rules = [
        {"quantize": ["lm_head"], "allow_output": True, **head},
        {"quantize": ["*"], "weights": "nvfp4"},
    ]
    path = folder / "head.yaml"
    path.write_text(json.dumps({"rules": rules}))
    return str(path)


def export(source: Path, recipe: str, out: Path, sizes: dict[str, int], data: Any) -> None:
    parallel = mq.Parallel(**sizes)
    mq.quantize_checkpoint(source, recipe, out, parallel=parallel, calibration=data, write=WRITE)


HEADS = {
    "gptq": {"weights": "nvfp4", "inputs": "nvfp4", "algorithm": "gptq"},
    "blocks": {"weights": "fp8_block"},
}


@pytest.mark.parametrize("head", HEADS)
def test_the_bytes_are_those_of_a_stream_at_every_layout(
    source: Path, tmp_path: Path, ranks: Ranks, head: str
) -> None:
    chosen = recipe(tmp_path, **HEADS[head])
    saving = loading = DATA
    if head != "blocks":  # what needs data is measured once
        measured = tmp_path / "measured.safetensors"
        saving = replace(DATA, save=measured, keep_hessians=True)
        loading = replace(DATA, load=measured)
    for number, (world, sizes) in enumerate(LAYOUTS):
        data = loading if number else saving
        ranks(world, export, source, chosen, tmp_path / str(number), sizes, data)
    mq.stream(
        source, chosen, tmp_path / "s", calibration=loading, write=WRITE, groups=Groups()
    )
    streamed = (tmp_path / "s" / "model.safetensors").read_bytes()
    for number, (_, sizes) in enumerate(LAYOUTS):
        assert (tmp_path / str(number) / "model.safetensors").read_bytes() == streamed, sizes
    stored = load_file(tmp_path / "s" / "model.safetensors")
    assert ("lm_head.input_scale" in stored) == (head != "blocks")
    config = json.loads((tmp_path / "s" / "hf_quant_config.json").read_text())
    assert "lm_head" not in config["quantization"]["exclude_modules"]
    assert mq.verify(tmp_path / "0", against=source).problems == ()


def test_its_inputs_are_what_the_last_norm_gives(
    source: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer, on two ranks, and where the model runs as a whole."""
    from transformers import AutoModelForCausalLM

    from megatron_quant.runs import file_layers
    from megatron_quant.runs.batches import calibration_batches

    chosen = recipe(tmp_path, weights="fp8", inputs="fp8")
    ranks(2, export_fp32, source, chosen, tmp_path / "out")
    model, seen = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    for ids in calibration_batches(DATA, source, VOCABULARY):
        model(ids)
    ranks(2, stream_fp32, source, chosen, tmp_path / "streamed")
    monkeypatch.setattr(file_layers, "by_layers", lambda *args: None)
    stream_fp32(source, chosen, tmp_path / "whole")
    for out in ("out", "streamed", "whole"):
        scale = load_file(tmp_path / out / "model.safetensors")["lm_head.input_scale"]
        assert scale.item() == pytest.approx(max(seen).item() / 448, rel=1e-5), out


def export_fp32(source: Path, recipe: str, out: Path) -> None:
    mq.quantize_checkpoint(
        source, recipe, out, parallel=mq.Parallel(tp=2), calibration=DATA, dtype="fp32", write=WRITE
    )


def stream_fp32(source: Path, recipe: str, out: Path) -> None:
    data = replace(DATA, save=out.with_suffix(".safetensors"))
    mq.stream(source, recipe, out, calibration=data, dtype="fp32", write=WRITE)


def kept(source: Path, recipe: str, out: Path) -> None:
    from megatron_quant.mcore.training.hooks import prepare
    from tests.dist.live import Parallelism, load

    with pytest.raises(RecipeError, match="of which a Megatron checkpoint keeps no scales"):
        prepare([load(source, Parallelism()).module], recipe, hf_model=source)
    handle = mq.quantize(load(source, Parallelism()).module, recipe, hf_model=source)
    with pytest.raises(RecipeError, match="of which a Megatron checkpoint keeps no scales"):
        mq.save(handle, out)


def small(source: Path, recipe: str, out: Path) -> None:
    mq.quantize_checkpoint(source, recipe, out, parallel=mq.Parallel(tp=4), write=WRITE)


def test_what_is_refused(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    chosen = recipe(tmp_path, weights="nvfp4")
    ranks(1, kept, source, chosen, tmp_path / "out")
    tiny = checkpoints.save("qwen3_moe", tmp_path / "tiny", vocab_size=5)
    for error in ranks.errors(4, small, tiny, chosen, tmp_path / "out"):
        assert isinstance(error, LayoutError) and "nothing but padding" in str(error)
    assert not (tmp_path / "out").exists()
