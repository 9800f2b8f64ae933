"""A found recipe gives the same bytes at every layout, and a killed search goes on."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_quant as mq
from megatron_quant.search import scoring
from tests.dist import checkpoints
from tests.unit.test_search_scores import search


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


def exported(source: Path, recipe: Path, out: Path, sizes: dict[str, int]) -> None:
    mq.quantize_checkpoint(
        source,
        str(recipe),
        out,
        parallel=mq.Parallel(**sizes),
        format="compressed-tensors",
        write=mq.Write(fsync=False),
    )


LAYOUTS = [(1, {}), (4, {"tp": 2, "ep": 2}), (2, {"pp": 2}), (4, {"tp": 2, "pp": 2})]


def test_a_found_recipe_gives_the_same_bytes_at_every_layout(
    source: Path, tmp_path: Path, ranks: Any
) -> None:
    search(source, tmp_path, bits=6.0)
    streamed = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert b"weight_packed" in streamed[:100_000] and b"weight_scale" in streamed[:100_000]
    for number, (world, sizes) in enumerate(LAYOUTS):
        out = tmp_path / f"out{number}"
        ranks(world, exported, source, tmp_path / "found.yaml", out, sizes)
        assert (out / "model.safetensors").read_bytes() == streamed, sizes


def killed_and_continued(source: Path, where: Path) -> tuple[int, list[str], bytes]:
    own, done = scoring.gradient_scores, []

    def killed(model: Any, places: Any, ids: torch.Tensor, loss: Any) -> torch.Tensor:
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return own(model, places, ids, loss)

    child = os.fork()
    if child == 0:
        try:
            scoring.SCORERS["gradient"] = killed
            search(source, where)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    kept = sorted(p.name for p in (where / "scores").iterdir())
    return status, kept, search(source, where)


def test_a_search_that_is_killed_goes_on_to_the_same_recipe(
    source: Path, tmp_path: Path, ranks: Any
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    ((status, kept, recipe),) = ranks(1, killed_and_continued, source, tmp_path / "killed")
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert kept == ["batch-0.safetensors", "batch-1.safetensors", "search.json"]
    assert recipe == search(source, tmp_path / "whole")
