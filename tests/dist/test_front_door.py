"""The library's front door on live models: calibrate, export, save and restore at any layout."""

import json
from pathlib import Path
from typing import Any

import pytest

import megatron_quant as mq
from tests.dist import checkpoints, saved
from tests.dist.command import quantize_argv
from tests.dist.pool import Ranks
from tests.dist.test_layouts import digests

SIZES = {"num_experts": 4, "moe_intermediate_size": 128, "mlp_only_layers": [1]}
RECIPE, TEXT = "nvfp4", mq.Calibration(size=8, seq_length=32, batch_size=2, dataset=__file__)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


@pytest.fixture(scope="module")
def by_command(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """What the command line makes of the same model, recipe and text on one rank."""
    out = tmp_path_factory.mktemp("command") / "out"
    flags = {"export_quant_cfg": RECIPE, "calib_size": 8, "calib_seq_length": 32}
    flags |= {"calib_batch_size": 2, "calib_dataset": __file__, "cold_experts": "error"}
    argv = quantize_argv(source, out, **flags, tp=None, ep=None, weight_only=None)
    (ended,) = ranks(1, saved.commands, [argv])[0]
    assert ended.status == 0, ended.err
    return out


def weights(directory: Path) -> dict[str, str]:
    """Digests of all files but the manifest, which says where they come from."""
    found = {k: v for k, v in digests(directory).items() if "manifest" not in k}
    assert len(found) > 4, found
    return found


def quantize_export_save(source: Path, out: Path, tp: int, ep: int) -> str:
    from tests.dist import bare

    module = bare.filled(bare.built(source, tp, ep), source)
    handle = mq.quantize(module, RECIPE, hf_model=source, calibration=TEXT)
    assert mq.quantized([module]) is handle
    mq.export(handle, out / "live")
    mq.save(module, out / "saved")
    return handle.summary()


def restore_export(source: Path, out: Path, tp: int, ep: int) -> None:
    """Into a model that is wrapped for training already."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from tests.dist import bare

    module = bare.built(source, tp, ep)
    half = Float16Module(module.config, module)
    wrapped = [DistributedDataParallel(module.config, DistributedDataParallelConfig(), half)]
    handle = mq.restore(wrapped, out / "saved", hf_model=source)
    assert mq.quantized(wrapped) is handle
    mq.export(wrapped, out / "restored")
    mq.save(wrapped, out / "saved again")
    mq.update(wrapped)
    assert dict(mq.export_tensors(wrapped))


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 2)])
def test_quantize_export_save_restore(
    tp: int, ep: int, source: Path, by_command: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Live at one layout, restored at another: the same bytes; on one rank the command line's."""
    said = ranks(tp, quantize_export_save, source, tmp_path, tp, ep)
    assert len(set(said)) == 1
    assert "recipe nvfp4" in said[0]
    assert "tokens an expert saw" in said[0]
    ranks(2, restore_export, source, tmp_path, 3 - tp, 3 - ep)
    assert weights(tmp_path / "restored") == weights(tmp_path / "live")
    if tp == ep == 1:  # elsewhere the sums of a forward round otherwise
        assert weights(tmp_path / "live") == weights(by_command)


def save_of_config(source: Path, out: Path) -> None:
    from tests.dist import bare

    config = json.loads((source / "config.json").read_text())
    module = bare.filled(bare.built(source, 1, 1), source)
    saved = mq.quantize(module, "w4a16_nvfp4", hf_model=config)
    mq.save(saved, out)
    restored = mq.restore(bare.built(source, 1, 1), out, hf_model=config)
    assert restored.plan == saved.plan
    assert restored.summary().endswith("\nranges came from a Megatron checkpoint")
    found = [[layer.weight_amax(0) for layer in of.layers] for of in (saved, restored)]
    assert found[0] == found[1] != []


def test_saved_with_the_content_of_config_alone(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    ranks(1, save_of_config, source, tmp_path / "saved")
    beside = [path.name for path in (tmp_path / "saved" / "hf").iterdir()]
    assert beside == ["config.json"]


def forward_loops(source: Path) -> tuple[int, str, Any]:
    """A loop of the caller's own; then a model without data, and one without quantizers."""
    import torch

    from megatron_quant.mcore.model import run_through
    from megatron_quant.mcore.model.schedule import run_schedule
    from tests.dist import bare

    module = bare.filled(bare.built(source, 1, 1), source)
    with pytest.raises(mq.QuantError) as bare_model:
        mq.quantized(module)
    calls = []

    def loop(model: Any) -> None:
        calls.append(model)
        run_through(model, [torch.arange(128).view(2, 64)])

    calibration = mq.Calibration(cold_experts="layer-max")
    handle = mq.quantize(module, RECIPE, loop, hf_model=source, calibration=calibration)
    assert calls == [module]
    before = run_schedule(module, [torch.arange(64).view(1, 64)], torch.Tensor.clone)[0]
    handle.disable()
    plain = run_schedule(module, [torch.arange(64).view(1, 64)], torch.Tensor.clone)[0]
    handle.enable()
    after = run_schedule(module, [torch.arange(64).view(1, 64)], torch.Tensor.clone)[0]
    assert torch.equal(before, after)
    assert not torch.equal(before, plain)
    other = bare.filled(bare.built(source, 1, 1), source)
    config = dict(handle.hf.config)
    with pytest.raises(mq.QuantError) as without_data:
        mq.quantize(other, RECIPE, hf_model=config)
    with pytest.raises(mq.QuantError, match="has quantizers already, of recipe 'nvfp4'"):
        mq.quantize(module, "fp8", hf_model=source)
    return sum(handle.report.tokens.values()), str(bare_model.value), str(without_data.value)


def test_forward_loop(source: Path, ranks: Ranks) -> None:
    ((tokens, bare_model, without_data),) = ranks(1, forward_loops, source)
    assert tokens > 0
    assert "GPTModel has no quantizers: pass it to megatron_quant.quantize" in bare_model
    assert "give a forward_loop" in without_data


def stream_and_convert(source: Path, out: Path) -> int:
    """Without a word on groups, as a script under torchrun does it."""
    mq.stream(source, "w4a16_nvfp4", out / "streamed")
    mq.convert(out / "streamed", out / "converted", format="compressed-tensors")
    return len(mq.verify(out / "converted", against=source).tensors)


def test_all_ranks_share_the_work_on_files(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Two ranks write one export each, equal to that of one."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    (alone,) = ranks(1, stream_and_convert, source, one)
    assert ranks(2, stream_and_convert, source, two) == [alone, alone]
    for name in ("streamed", "converted"):
        assert digests(two / name) == digests(one / name)
