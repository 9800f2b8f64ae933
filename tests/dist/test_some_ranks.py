"""A job of which some ranks alone hold the model, as where others generate for a trainer."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import megatron_quant as mq
from megatron_quant.errors import ExportError
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_live_models import weights
from tests.dist.test_training import BATCHES

SIZES = {"num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 128}
TRAINERS = 2
WEIGHTS = "w4a16_nvfp4"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


def trainers(tp: int) -> Any:
    """The groups of the first ranks, with Megatron's among them; None on the others."""
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from megatron_quant.dist import Groups

    size = dist.get_world_size
    trained = mock.patch.object(dist, "get_world_size", lambda g=None: size(g) if g else TRAINERS)
    with trained:  # newer releases take it as an argument
        mpu.initialize_model_parallel(tp, expert_model_parallel_size=tp, expert_tensor_parallel_size=1)
    group = dist.new_group(list(range(TRAINERS)))
    return Groups(group) if dist.get_rank() < TRAINERS else None


def built(source: Path, groups: Any, tp: int) -> list[Any]:
    """This rank's share of the model."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_quant.ckpt.plan import Layout
    from megatron_quant.ckpt.read import open_source
    from megatron_quant.mcore.model import load_model
    from megatron_quant.models import lookup, num_experts

    checkpoint = open_source(source)
    architecture = lookup(checkpoint.config)
    experts = num_experts(architecture.params(checkpoint.config))
    layout = Layout.simulate(TRAINERS, tp, tp, 1, experts)
    model_parallel_cuda_manual_seed(0)
    live = load_model(checkpoint, architecture, layout, groups, torch.bfloat16, lambda steps: None)
    return [chunk.train() for chunk in live.chunks]


def work(source: Path, out: Path, recipe: str, tp: int) -> str:
    """What a trainer does but for its own optimizer; what is said of a save."""
    from megatron_quant.mcore.model import run_through
    from megatron_quant.mcore.training import QuantCallback, Schedule, prepare

    groups = trainers(tp)
    if groups is None:
        return ""
    model = prepare(built(source, groups, tp), recipe, hf_model=str(source), groups=groups)
    callback = QuantCallback(Schedule(calibrate_before=0), log=lambda line: None)
    callback.start(model)
    callback.calibrate([partial(run_through, model, BATCHES)])
    with torch.no_grad():
        for parameter in (p for chunk in model for p in chunk.parameters()):
            parameter.mul_(1.5)
    mq.update(model)
    mq.export(model, out)
    names = [name for name, _ in mq.export_tensors(model)]
    assert sum(".weight_scale" in name for name in names) > 8
    try:
        mq.save(model, out.with_suffix(".saved"))
    except ExportError as e:
        return str(e)
    return ""


def begin(source: Path, stored: Path, out: Path, recipe: str, tp: int) -> None:
    """From a quantized checkpoint, through `prepare` and `mq.restore`, and from a plain one."""
    from megatron_quant.mcore.training import prepare

    groups = trainers(tp)
    if groups is None:
        return
    empty = partial(built, source, groups, tp)
    for name, kept in (("quantized", stored / "quantized"), ("plain", stored / "plain")):
        model = prepare(empty(), recipe, kept, hf_model=str(source), groups=groups)
        mq.export(model, out / name)
    mq.restore(model := empty(), stored / "quantized", hf_model=source, groups=groups)
    mq.export(model, out / "restored")


def both(source: Path, out: Path) -> None:
    """A checkpoint with quantizers and one without, by all ranks."""
    from tests.dist import plain
    from tests.dist.live import Parallelism, load

    plain.save_run(source, out / "plain", plain.Training((2, 1, 1), stacked=True))
    model = load(source, Parallelism(1, 2)).chunks
    mq.quantize(model, WEIGHTS, hf_model=source)
    mq.save(model, out / "quantized")


def test_quantized_followed_and_exported(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    """The bytes are those of a job without the other rank, which takes part in nothing."""
    said = ranks(TRAINERS + 1, work, source, tmp_path / "some", "fp8", 2, timeout=90)
    assert ranks(TRAINERS, work, source, tmp_path / "all", "fp8", 2) == ["", ""]
    assert weights(tmp_path / "some") == weights(tmp_path / "all")
    for line in said[:TRAINERS]:
        assert "the model is on 2 of the job's 3 ranks" in line and "export it" in line
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["all", "all.saved", "some"]


def test_checkpoints_are_read(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    ranks(2, both, source, tmp_path)
    ranks(TRAINERS + 1, begin, source, tmp_path, tmp_path / "out", WEIGHTS, 2, timeout=90)
    found = [weights(tmp_path / "out" / name) for name in ("quantized", "plain", "restored")]
    assert found[0] == found[1] == found[2]
