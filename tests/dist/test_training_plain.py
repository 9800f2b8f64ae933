"""Training that starts from a checkpoint without quantizers, also where the loop loads it again."""

from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_quant as mq
from megatron_quant.models import Pipeline
from tests.dist import checkpoints, plain
from tests.dist.plain import Training
from tests.dist.pool import Ranks
from tests.dist.test_live_models import weights
from tests.dist.test_training import BATCHES

SIZES = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 128}
RECIPE = "w4a16_nvfp4"
# ranks, tp, ep, pipeline
LAYOUTS = [(1, 1, 1, Pipeline()), (2, 2, 2, Pipeline()), (2, 1, 1, Pipeline(2, 2))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("run")
    ranks(2, plain.save_run, source, folder, Training((2, 2, 1), stacked=True, beside=True))
    return folder


@pytest.fixture(scope="module")
def from_files(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    out = tmp_path_factory.mktemp("stream") / "out"
    ranks(1, stream, source, out)
    return out


def stream(source: Path, out: Path) -> None:
    mq.stream(source, RECIPE, out)


def loaded_again(chunks: list[Any], stored: Path) -> None:
    """What Megatron-Bridge and Megatron-LM do after they wrapped the model."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu
    from torch.distributed.checkpoint import CheckpointException

    group = mpu.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "singleton_local_shards": False}
    state = {f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(chunks)}
    try:
        found = dist_checkpointing.load(state, str(stored))
    except CheckpointException as e:  # of a kind that would end the rank without a word
        raise RuntimeError(str(e)) from None
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(found[f"model{number}"], strict=True)


def start(source: Path, run: Path, out: Path, tp: int, ep: int, pipeline: Pipeline) -> set[str]:
    """Start from the run, load it again, export; then train, and return what a save would have."""
    from megatron.core import parallel_state as mpu
    from megatron.core.transformer.module import Float16Module

    from megatron_quant.mcore.training import prepare
    from tests.dist import live, training

    parallelism = live.Parallelism(tp, ep, pipeline=pipeline)
    model = training.build(source, parallelism, torch.bfloat16)
    with torch.no_grad():
        for parameter in (p for chunk in model for p in chunk.parameters()):
            parameter.fill_(3.0)
    model = prepare(model, RECIPE, run, hf_model=str(source))
    script = training.wrap([Float16Module(chunk.config, chunk) for chunk in model])
    wrapped = [chunk.module for chunk in script.model]
    loaded_again(wrapped, run / "iter_0000003")
    script.optimizer.reload_model_params()
    mq.export(script.model, out)
    script.step(BATCHES)
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    return {name for chunk in wrapped for name in chunk.sharded_state_dict(metadata=metadata)}


@pytest.mark.parametrize(("world", "tp", "ep", "pipeline"), LAYOUTS)
def test_it_starts_and_may_be_loaded_again(
    ranks: Ranks,
    source: Path,
    run: Path,
    from_files: Path,
    tmp_path: Path,
    world: int,
    tp: int,
    ep: int,
    pipeline: Pipeline,
) -> None:
    found = ranks(world, start, source, run, tmp_path / "out", tp, ep, pipeline)
    assert weights(tmp_path / "out") == weights(from_files)
    for names in found:
        assert any("_quantizer._amax" in name for name in names)
        assert any("megatron_quant.description" in name for name in names)
