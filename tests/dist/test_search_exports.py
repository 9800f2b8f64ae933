"""A found recipe gives the same bytes at every layout, and a killed search goes on."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_quant as mq
from megatron_quant.streaming import stages
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


def killed_and_continued(source: Path, where: Path, at: int) -> tuple[int, list[str], bytes]:
    child = os.fork()
    if child == 0:
        run, left = stages.Call.run, [at]

        def killed(*args: Any) -> torch.Tensor:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return run(*args)

        try:
            stages.Call.run = killed
            search(source, where)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    kept = sorted(p.name for p in (where / "scores").iterdir())
    return status, kept, search(source, where)


def test_a_search_that_is_killed_goes_on_to_the_same_recipe(
    source: Path, tmp_path: Path, ranks: Any
) -> None:
    """In the forward, and in the backward: three batches go through two layers each time."""
    (tmp_path / "whole").mkdir()
    wanted = search(source, tmp_path / "whole")
    for at in (4, 10):
        where = tmp_path / str(at)
        where.mkdir()
        ((status, kept, recipe),) = ranks(1, killed_and_continued, source, where, at)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert kept == ["search.json", "walk"] and recipe == wanted
