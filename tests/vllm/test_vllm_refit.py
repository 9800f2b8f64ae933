"""A running vLLM takes ``mq.export_tensors`` through its own ``load_weights``.

The tensors go from two ranks, after a step of training, into a pipe that vLLM reads between two
generations.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_quant as mq
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.vllm.engine import NEEDED, PROMPT, answer, error, finish, start
from tests.vllm.refit import send

pytestmark = NEEDED
CELLS = [("compressed-tensors", "fp8_channel", 0.15), ("gptq", "int4", 0.03)]


def quantized(source: Path, recipe: str) -> Any:
    from tests.dist import live

    chunks = live.load(source, live.Parallelism(tp=2)).chunks
    return mq.quantize(chunks, recipe, hf_model=source)


def export_first(source: Path, recipe: str, out: Path, dialect: str) -> None:
    mq.export(quantized(source, recipe), out, format=dialect)


@torch.no_grad()
def train_and_send(source: Path, recipe: str, out: Path, dialect: str, pipe: Path) -> None:
    handle = quantized(source, recipe)
    for weight in handle.model.module.parameters():
        weight.mul_(1.25).add_(weight.square())
    mq.update(handle)
    mq.export(handle, out, format=dialect)
    tensors = mq.export_tensors(handle, format=dialect, ranks=[0], max_bytes=100_000)
    if torch.distributed.get_rank() == 0:
        with pipe.open("wb") as opened:
            send(tensors, opened)
    else:
        assert list(tensors) == []


@pytest.mark.parametrize(("dialect", "recipe", "bound"), CELLS)
def test_weights_change_between_two_generations(
    dialect: str, recipe: str, bound: float, tmp_path: Path, ranks: Ranks
) -> None:
    source = checkpoints.save("qwen3", tmp_path / "source", hidden_size=256)
    first, second, pipe, out = (tmp_path / n for n in ("first", "second", "pipe", "found.json"))
    ranks(2, export_first, source, recipe, first, dialect)
    os.mkfifo(pipe)
    vllm = start("refit.py", first, json.dumps(PROMPT), out, pipe)
    try:
        ranks(2, train_and_send, source, recipe, second, dialect, pipe)
        finish(vllm)
    finally:
        vllm.kill()
    before, after = (answer(found)[1] for found in json.loads(out.read_text()))
    assert error(before, first) < bound and error(after, second) < bound
    assert error(after, first) > 0.5
