"""Checkpoints and disks that fail: the same line on every rank, no hang, and no trace of an export.

If only one rank meets the fault (it alone holds the slice, or its disk is full), all ranks say so.
"""

import resource
from pathlib import Path

import pytest
import torch

from tests.dist import checkpoints
from tests.dist.command import (
    WEIGHTS,
    Ended,
    command,
    copy,
    message,
    quantize_argv,
    refused,
    spoiled,
    tree,
)
from tests.dist.pool import Ranks

LAYER = "model.layers.1."
EXPERT = LAYER + "mlp.experts.7.down_proj.weight"  # at ep 2 the second rank's
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (EXPERT, float("nan")),
        (LAYER + "self_attn.o_proj.weight", float("inf")),  # the second rank's columns
        (LAYER + "self_attn.v_proj.weight", float("nan")),
        (LAYER + "mlp.gate.weight", float("nan")),
        ("model.norm.weight", float("-inf")),
        ("model.embed_tokens.weight", float("nan")),
        ("lm_head.weight", float("nan")),
    ],
)
def test_a_weight_that_is_not_finite(
    name: str, value: float, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    bad = spoiled(source, tmp_path / "bad", name, value)
    said = refused(ranks, tmp_path, quantize_argv(bad, tmp_path / "out"))
    assert said == f"{bad}: {name} has NaN or Inf; repair the checkpoint or fetch it again"


def test_it_is_found_before_calibration(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    bad = spoiled(source, tmp_path / "bad", EXPERT, float("nan"))
    argv = quantize_argv(bad, tmp_path / "out", weight_only=None, calib_size=4, calib_seq_length=16)
    assert f"{EXPERT} has NaN or Inf" in refused(ranks, tmp_path, argv)


def test_a_weight_beyond_the_dtype(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    bad = spoiled(source, tmp_path / "bad", EXPERT, 1e6)
    said = refused(ranks, tmp_path, quantize_argv(bad, tmp_path / "out", dtype="fp16"))
    assert said == f"{bad}: {EXPERT} has values beyond torch.float16; choose a wider --dtype"


@pytest.mark.parametrize("lost", [1, 100_000, None])
def test_a_truncated_file(lost: int | None, source: Path, ranks: Ranks, tmp_path: Path) -> None:
    bad = copy(source, tmp_path / "bad")
    content = (bad / WEIGHTS).read_bytes()
    (bad / WEIGHTS).write_bytes(b"" if lost is None else content[:-lost])
    said = refused(ranks, tmp_path, quantize_argv(bad, tmp_path / "out"))
    assert said.startswith(f"{bad / WEIGHTS} is truncated or no safetensors file (")
    assert said.endswith("); fetch it again")


def test_pickled_weights(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    bad = copy(source, tmp_path / "bad")
    (bad / WEIGHTS).rename(bad / "pytorch_model.bin")
    said = refused(ranks, tmp_path, quantize_argv(bad, tmp_path / "out"))
    assert f"{bad} has only pickled weights (pytorch_model.bin), which can run code" in said
    assert "save_pretrained(directory, safe_serialization=True)" in said


def test_a_missing_tensor(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    bad = copy(source, tmp_path / "bad", **{EXPERT: None})
    said = refused(ranks, tmp_path, quantize_argv(bad, tmp_path / "out"))
    assert said.startswith(f"{bad}: tensor {EXPERT} is missing; fetch the checkpoint again")


def test_a_tensor_that_no_one_uses(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    bad = copy(source, tmp_path / "bad", **{"model.extra.weight": torch.zeros(2)})
    said = refused(ranks, tmp_path, quantize_argv(bad, tmp_path / "out"))
    assert "model.extra.weight (1 such) is no tensor of the architecture" in said
    assert "correct config.json or remove the tensor" in said


def with_small_files(full: tuple[int, ...], nbytes: int, argv: list[str]) -> Ended:
    """The ranks ``full`` can write no byte at or beyond ``nbytes`` of a file."""
    import torch.distributed as dist

    if dist.get_rank() in full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))  # of this fork
    return command(*argv)


@pytest.mark.parametrize("nbytes", [20_000, 300_000])
@pytest.mark.parametrize("full", [(0,), (1,), (0, 1)])
def test_a_full_disk(
    full: tuple[int, ...], nbytes: int, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    argv = quantize_argv(source, tmp_path / "new" / "out")
    said = message(ranks(2, with_small_files, full, nbytes, argv, timeout=60))
    doing = "cannot take 1264248 bytes" if 0 in full else "cannot be written"
    assert f"out/.model.safetensors.partial: {doing}: File too large; choose a smaller" in said
    assert tree(tmp_path) == {}


def test_a_full_disk_leaves_other_files_and_no_index(
    source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    argv = quantize_argv(source, tmp_path, overwrite=True)
    assert [e.status for e in ranks(2, command, *argv)] == [0, 0]
    (tmp_path / "mine.txt").write_text("x")
    said = message(ranks(2, with_small_files, (1,), 300_000, argv, timeout=60))
    assert "cannot be written: File too large" in said
    left = tree(tmp_path)
    assert left["mine.txt"] == b"x"
    assert not [name for name in left if name == INDEX or "safetensors" in name]
