"""A pretraining program like Megatron-LM's: saved, killed, resumed at other layouts, exported."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import megatron_quant as mq
from tests.dist import checkpoints, saved
from tests.dist.pool import Ranks
from tests.dist.resumed import farthest, ranges
from tests.dist.test_layouts import tensors
from tests.dist.test_live_models import weights
from tests.dist.test_training import BATCHES

SIZES = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 128}
# ranks, tp, ep, pp, virtual stages; Megatron's optimizer is in two parts where experts are cut, and
# goes on only in as many.
FIRST = (2, 1, 2, 1, 1)
LAYOUTS = [(2, 2, 2, 1, 1), (4, 1, 2, 2, 2)]
STEPS, KILLED = 5, 4
WEIGHTS = "w4a16_nvfp4"
Layout = tuple[int, int, int, int, int]
Words = tuple[object, ...]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


def words(layout: Layout, *others: object) -> Words:
    _, tp, ep, pp, stages = layout
    sizes = zip(("tensor", "expert", "pipeline"), (tp, ep, pp), strict=True)
    found = [word for kind, size in sizes for word in (f"--{kind}-model-parallel-size", size)]
    return (*found, "--num-virtual-stages-per-pipeline-rank", stages, *others)


def start(source: Path, given: Words, scale: float, **prepared: Any) -> Any:
    """The user's script up to training. scale: of the weights that the program begins with."""
    import torch

    from megatron_quant.mcore.training import wrap_provider
    from megatron_quant.models import Pipeline
    from tests.dist import live, megatron_lm, training

    args = megatron_lm.parse(given)
    stages = args.num_virtual_stages_per_pipeline_rank
    pipeline = Pipeline(args.pipeline_model_parallel_size, stages)
    sizes = (args.tensor_model_parallel_size, args.expert_model_parallel_size)
    chunks = training.build(source, live.Parallelism(*sizes, pipeline=pipeline), torch.bfloat16)
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.mul_(scale)

    def provider(pre_process: bool, post_process: bool, vp_stage: int) -> Any:
        chunk = chunks[vp_stage]
        assert (chunk.pre_process, chunk.post_process) == (pre_process, post_process)
        return chunk

    if prepared:
        provider = wrap_provider(provider, hf_model=str(source), **prepared)
    return megatron_lm.setup(args, provider)


def train(source: Path, given: Words, out: Path, die: bool = False) -> list[str]:
    """The same script, started for the first time and after a kill; its lines on ranges."""
    from megatron_quant.mcore.training import QuantCallback, Schedule
    from tests.dist import megatron_lm

    run = start(source, given, 1.0, recipe="fp8", checkpoint_if_present=given[-1])
    lines: list[str] = []
    callback = QuantCallback(Schedule(calibrate_before=1, every=0), lines.append)
    callback.start(run.script.model)

    def begin(step: int) -> None:
        if die and step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        callback.on_step_begin(step)

    megatron_lm.train(run, BATCHES, megatron_lm.Events(begin, callback.on_step_end))
    callback.finish(run.iteration)
    mq.export(run.script.model, out)
    return lines


def goes_on(layout: Layout, run: Path) -> Words:
    return words(
        layout, "--train-iters", STEPS, "--save-interval", 2, "--load", run, "--save", run
    )


@pytest.fixture(scope="module")
def killed(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """What a run leaves that is killed after its second save, and the export of one that is not."""
    folder = tmp_path_factory.mktemp("runs")
    given = goes_on(FIRST, folder / "run")
    errors = ranks.errors(2, train, source, given, folder / "none", True)
    assert [str(e) for e in errors] == ["the process died"] * 2
    assert (folder / "run/latest_checkpointed_iteration.txt").read_text() == "4"
    ranks(2, train, source, goes_on(FIRST, folder / "other"), folder / "whole")
    return folder


def test_what_a_killed_run_leaves(source: Path, killed: Path, ranks: Ranks) -> None:
    """Ranges are those of the weights beside them, and no list of ModelOpt's modes is there."""
    folders = [killed / f"run/iter_000000{n}" for n in (2, 4)]
    found = [ranks(1, ranges, source, folder)[0] for folder in folders]
    assert all(held == own for held, own in found)
    assert found[0] != found[1]
    assert not any((folder / "modelopt_state").exists() for folder in folders)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_at_another_layout(
    source: Path, killed: Path, tmp_path: Path, ranks: Ranks, layout: Layout
) -> None:
    run = shutil.copytree(killed / "run", tmp_path / "run")
    said = ranks(layout[0], train, source, goes_on(layout, run), tmp_path / "out")
    assert not any("calibrated" in line for line in said[0])
    found, whole = tensors(tmp_path / "out"), tensors(killed / "whole")
    assert found.keys() == whole.keys()
    distance = farthest(found, whole)
    assert distance[0] < 0.1, distance
    held, own = ranks(1, ranges, source, run)[0]
    assert held == own
    assert not list(run.glob("*/modelopt_state"))


def plain(source: Path, given: Words) -> None:
    from tests.dist import megatron_lm

    megatron_lm.train(start(source, given, 1.0), BATCHES)


def begin(source: Path, given: Words, plain_run: Path, run: Path, out: Path) -> bool:
    """A script of ``--load PLAIN --finetune`` or, requeued, of ``--load RUN``."""
    from tests.dist import megatron_lm

    places = {"checkpoint": plain_run, "checkpoint_if_present": run}
    found = start(source, given, 0.5, recipe=WEIGHTS, **places)
    if not out.exists():
        mq.export(found.script.model, out)
    megatron_lm.train(found, BATCHES)
    return bool(mq.quantized(found.script.model).stored)


def quantize(source: Path, run: Path, out: Path) -> None:
    settings = {"export_quant_cfg": WEIGHTS, "weight_only": True, "tp": 1, "ep": 2}
    saved.quantize(hf_model_id=str(source), megatron_load_path=run, export_dir=out, **settings)


def test_finetuning_from_a_plain_run(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    """What it begins with is what `quantize` makes of that run."""
    old, new = tmp_path / "old", tmp_path / "new"
    given = ("--train-iters", 1, "--save-interval", 1, "--save", old)
    ranks(2, plain, source, words((2, 2, 2, 1, 1), *given))
    ranks(2, quantize, source, old, tmp_path / "quantized")
    steps = ("--train-iters", 1, "--save-interval", 1, "--save", new)
    first = words(FIRST, *steps, "--load", old, "--finetune")
    assert ranks(2, begin, source, first, old, new, tmp_path / "first") == [False, False]
    assert weights(tmp_path / "first") == weights(tmp_path / "quantized")
    again = words(LAYOUTS[0], *steps, "--load", new)
    assert ranks(2, begin, source, again, old, new, tmp_path / "again") == [True, True]
    found = weights(tmp_path / "again")
    assert found.keys() == weights(tmp_path / "first").keys()
    assert found != weights(tmp_path / "first"), "the step that was trained is in the save"
