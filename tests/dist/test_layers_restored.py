"""ModelOpt's own saving and restoring of a model with our grouped linears."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_quant.errors import CoverageError
from tests.dist import checkpoints
from tests.dist.pool import Ranks

IDS = torch.arange(64).view(2, 32)
Found = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    return checkpoints.save("qwen3_moe", path, num_hidden_layers=1, num_experts=4)


def model_of(source: Path, ep: int = 1) -> Any:
    from megatron_quant.layers import register
    from tests.dist import live

    register()
    return live.load(source, live.Parallelism(1, ep)).module


def sharded(model: Any) -> dict[str, Any]:
    from megatron.core import parallel_state as mpu

    group = mpu.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = model.sharded_state_dict(metadata={"dp_cp_group": group})
    return state


def amaxes(model: Any) -> Found:
    return {n: b.float() for n, b in model.named_buffers() if n.endswith("_quantizer._amax")}


def save(source: Path, out: Path, config: str) -> Found:
    import modelopt.torch.quantization as mtq
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins import save_sharded_modelopt_state

    from megatron_quant.mcore.model.schedule import forward

    model = model_of(source)
    mtq.quantize(model, getattr(mtq, config), lambda m: forward(m, IDS))
    out.mkdir()
    dist_checkpointing.save(sharded(model), str(out))
    save_sharded_modelopt_state([model], out, ("torch_dist", 1))
    return amaxes(model)


def restore(source: Path, out: Path, ep: int) -> Found:
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins import restore_sharded_modelopt_state

    model = model_of(source, ep)
    restore_sharded_modelopt_state([model], out)
    model.load_state_dict(dist_checkpointing.load(sharded(model), str(out)))
    return amaxes(model)


@pytest.mark.parametrize("config", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG"])
def test_experts_keep_their_ranges(
    ranks: Ranks, source: Path, tmp_path: Path, config: str
) -> None:
    """At the ranks that saved them, and at others."""
    (saved,) = ranks(1, save, source, tmp_path / "out", config)
    experts = [name for name in saved if ".experts." in name]
    assert len(experts) == (0 if config.startswith("MX") else 4)
    for world in (1, 2):
        for restored in ranks(world, restore, source, tmp_path / "out", world):
            assert restored.keys() == saved.keys()
            assert all(torch.equal(restored[name], amax) for name, amax in saved.items())


def test_ranges_of_one_ranks_blocks_are_refused(
    ranks: Ranks, source: Path, tmp_path: Path
) -> None:
    (error,) = ranks.errors(1, save, source, tmp_path / "out", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
    assert "belongs to one rank's rows or blocks" in str(error)
    assert "a recipe of megatron_quant" in str(error)


def quantized_twice(source: Path, ours: bool) -> None:
    """By ModelOpt, with our classes or its own, then by `prepare`, as a hook is called."""
    import modelopt.torch.quantization as mtq

    from megatron_quant.layers import unregister
    from megatron_quant.mcore.training import prepare

    model = model_of(source)
    if not ours:
        unregister()
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG)
    prepare([model], "fp8", hf_model=str(source))


@pytest.mark.parametrize("ours", [True, False])
def test_a_model_with_modelopts_quantizers_is_refused(
    ranks: Ranks, source: Path, ours: bool
) -> None:
    (error,) = ranks.errors(1, quantized_twice, source, ours)
    assert type(error) is CoverageError
    assert "QuantTERowParallelLinear, which ModelOpt quantized already" in str(error)
