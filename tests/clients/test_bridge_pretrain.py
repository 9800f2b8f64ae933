"""Megatron-Bridge's own `pretrain` with quantizers: killed, resumed at other layouts, exported."""

import os
import signal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import megatron_quant as mq
from tests.clients.test_bridge_live import tensors
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.resumed import farthest, ranges

pytestmark = pytest.mark.skipif(not find_spec("megatron.bridge"), reason="make test-clients")
SIZES = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 128}
# ranks, tp, ep, pp, virtual stages. Megatron's optimizer goes on where experts are cut if they were
# cut when it was saved: it is then two in one.
FIRST = (2, 1, 2, 1, None)
LAYOUTS = [(2, 2, 2, 1, None), (4, 1, 2, 2, 2)]
STEPS, KILLED = 6, 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    return checkpoints.save("qwen3_moe", path, **SIZES, norm_topk_prob=True)


def train(source: Path, run: Path, out: Path, layout: tuple, die: bool) -> list[str]:
    """The same script, started for the first time and after a kill; its lines on ranges."""
    from megatron_quant.mcore.training import QuantCallback, Schedule, prepare
    from tests.clients import bridge

    class Killed(QuantCallback):
        def on_train_step_start(self, context: Any) -> None:
            if die and context.state.train_state.step == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            super().on_train_step_start(context)

    _, tp, ep, pp, stages = layout
    virtual = {"virtual_pipeline_model_parallel_size": stages, "overlap_p2p_comm": True}
    virtual |= {"batch_p2p_comm": False}
    provider = bridge.provider(source, tp, ep, pp, **(virtual if stages else {}))
    hook = partial(prepare, recipe="fp8", hf_model=str(source), checkpoint_if_present=run)
    provider.register_pre_wrap_hook(hook)
    lines: list[str] = []
    callback = Killed(Schedule(calibrate_before=1, every=0), lines.append)
    saves = {"save_interval": 2, "dist_ckpt_optim_fully_reshardable": True}
    mq.export(bridge.pretrain(provider, callback, run, STEPS, **saves), out)
    return lines


@pytest.fixture(scope="module")
def killed(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """What a run leaves that is killed after its second save, and the export of one that is not."""
    folder = tmp_path_factory.mktemp("runs")
    errors = ranks.errors(2, train, source, folder / "run", folder / "none", FIRST, True)
    assert [str(e) for e in errors] == ["the process died"] * 2
    assert (folder / "run/latest_checkpointed_iteration.txt").read_text() == "4"
    ranks(2, train, source, folder / "other", folder / "whole", FIRST, False)
    return folder


def test_saved_ranges_are_those_of_the_weights_beside_them(
    source: Path, killed: Path, ranks: Ranks
) -> None:
    """`every` is 0, and this release has no event before a save."""
    found = [ranks(1, ranges, source, killed / f"run/iter_000000{n}")[0] for n in (2, 4)]
    assert all(held == own for held, own in found)
    assert found[0] != found[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_at_another_layout(
    source: Path, killed: Path, tmp_path: Path, ranks: Ranks, layout: tuple
) -> None:
    import shutil

    run = shutil.copytree(killed / "run", tmp_path / "run")
    said = ranks(layout[0], train, source, run, tmp_path / "out", layout, False)
    assert not any("calibrated" in line for line in said[0])
    found, whole = tensors(tmp_path / "out"), tensors(killed / "whole")
    assert found.keys() == whole.keys()
    distance = farthest(found, whole)
    assert distance[0] < 0.1, distance
    held, own = ranks(1, ranges, source, run)[0]
    assert held == own
