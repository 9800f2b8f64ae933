"""SIGKILL of any rank at any time, then --resume: the bytes of a run that nobody disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_quant.ckpt.write import exporter
from megatron_quant.ckpt.storage.safetensors_header import INDEX
from megatron_quant.ckpt.plan.parts import RankPart
from megatron_quant.ckpt.write.encode_part import Produced
from megatron_quant.ckpt.write.directory import Existing
from megatron_quant.ckpt.write.exporter import Destination, export
from tests.dist import checkpoints, saved
from tests.dist.command import command, message, quantize_argv, tree
from tests.dist.pool import Ranks
from tests.dist.test_ckpt_export import joining
from tests.unit import ckpt_world as world
from tests.unit.test_ckpt_writer import BESIDE, contents, producer

CALLS = ("pwrite", "write", "fsync", "rename", "ftruncate", "unlink")
"""What an export does to the disk; a kill comes before one of them, or within a write."""
LAYOUT = "tp2-ep2"
OTHER = "tp2"
RANKS = world.LAYOUTS[LAYOUT][0]
ROOT = Path(__file__).parents[2]
KILLS = 20


def count_calls(on_call: Callable[[str, tuple[Any, ...]], None]) -> None:
    """Have ``on_call`` see every one of ``CALLS`` in this process, which is a test's own fork."""

    def seen(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            on_call(name, args)
            return real(*args)

        return call

    for name in CALLS:
        setattr(os, name, seen(name))


def die_at(number: int) -> None:
    """SIGKILL this process at its ``number``-th call; half of a write has happened then."""
    pwrite, left = os.pwrite, number

    def on_call(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            if name == "pwrite":
                pwrite(args[0], args[1][: len(args[1]) // 2], args[2])
            os.kill(os.getpid(), signal.SIGKILL)

    count_calls(on_call)


def counted_export(directory: Path) -> int:
    calls: list[str] = []
    count_calls(lambda name, args: calls.append(name))
    _export(LAYOUT, directory, Existing.REFUSE)
    return len(calls)


def _export(layout: str, directory: Path, existing: Existing) -> None:
    plan = world.plan("nvfp4", layout, max_shard=20_000)
    made = producer(layout, dist.get_rank())
    export(plan, joining(layout), made, Destination(directory=directory, companions=BESIDE, existing=existing))


def _killed(victim: int, number: int, directory: Path) -> None:
    if dist.get_rank() == victim:
        die_at(number)
    _export(LAYOUT, directory, Existing.RESUME)


def _resumed(layout: str, directory: Path) -> list[str]:
    """Names of what is encoded again."""
    plan = world.plan("nvfp4", layout, max_shard=20_000)
    encoded: list[str] = []

    def made(part: RankPart) -> Iterator[Produced]:
        encoded.append(part.target.source.name)
        yield from producer(layout, dist.get_rank())(part)

    export(plan, joining(layout), made, Destination(directory=directory, companions=BESIDE, existing=Existing.RESUME))
    return encoded


@pytest.fixture(scope="module")
def undisturbed(
    ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], list[int]]:
    """Its files, and how many calls each rank made."""
    directory = tmp_path_factory.mktemp("undisturbed") / "out"
    return (ranks(RANKS, counted_export, directory), contents(directory))[::-1]


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_kill_at_a_random_moment(
    seed: int, undisturbed: tuple[dict[str, bytes], list[int]], ranks: Ranks, tmp_path: Path
) -> None:
    wanted, calls = undisturbed
    rng, out = random.Random(seed), tmp_path / "out"
    victim = rng.randrange(RANKS)
    died = ranks.errors(RANKS, _killed, victim, rng.randrange(calls[victim]), out, timeout=60)
    assert str(died[victim]) == "the process died"
    if out.exists() and (out / INDEX).exists():  # the kill came when all was done
        assert wanted.items() <= contents(out).items()
    layout = OTHER if seed % 4 == 3 else LAYOUT
    ranks(world.LAYOUTS[layout][0], _resumed, layout, out)
    assert contents(out) == wanted


def _killed_when_written(directory: Path) -> None:
    """All ranks have written and noted their parts; then the last one dies."""
    if dist.get_rank() == RANKS - 1:
        exporter.read_digests = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    _export(LAYOUT, directory, Existing.REFUSE)


def test_what_is_complete_and_intact_is_not_written_again(
    undisturbed: tuple[dict[str, bytes], list[int]], ranks: Ranks, tmp_path: Path
) -> None:
    died = ranks.errors(RANKS, _killed_when_written, tmp_path, timeout=60)
    assert all(died) and not (tmp_path / INDEX).exists()
    assert ranks(RANKS, _resumed, LAYOUT, tmp_path) == [[]] * RANKS
    assert contents(tmp_path) == undisturbed[0]


def test_another_layout_writes_what_it_cuts_otherwise(
    undisturbed: tuple[dict[str, bytes], list[int]], ranks: Ranks, tmp_path: Path
) -> None:
    ranks.errors(RANKS, _killed_when_written, tmp_path, timeout=60)
    encoded = {name for of_rank in ranks(4, _resumed, "tp4", tmp_path) for name in of_rank}
    cut = {p.target.source.name for p in world.plan("nvfp4", "tp4").parts if p.region.size != p.region.whole}
    assert encoded == cut
    assert contents(tmp_path) == undisturbed[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"))


def killed_command(victim: int, number: int, argv: list[str]) -> object:
    if dist.get_rank() == victim:
        die_at(number)
    return command(*argv)


CALIBRATED: dict[str, Any] = {
    "export_quant_cfg": "fp8",
    "weight_only": None,
    "calib_dataset": __file__,
    "calib_size": 8,
    "calib_seq_length": 64,
    "cold_experts": "layer-max",
    "max_shard_size": "300KB",
}


def test_quantize_resumes_and_refuses_another_calibration(
    source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert ranks(4, command, *quantize_argv(source, whole, **CALIBRATED))[0].status == 0
    argv = quantize_argv(source, out, **CALIBRATED)
    died = ranks.errors(4, killed_command, 1, 60, argv, timeout=120)
    assert str(died[1]) == "the process died"
    left = tree(out)
    assert left and all(name.endswith(".partial") for name in left)
    other = quantize_argv(source, out, **{**CALIBRATED, "calib_size": 24}, resume=True)
    assert "holds an export with other calibrated scales" in message(ranks(4, command, *other))
    assert tree(out) == left
    assert [e.status for e in ranks(4, command, *argv, "--resume")] == [0] * 4
    assert tree(out) == tree(whole)
    verified = command("verify", str(out), "--digests")
    assert verified.status == 0, verified.err


def test_export_resumes(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    quantized, out, whole = tmp_path / "quantized", tmp_path / "out", tmp_path / "whole"
    assert ranks(1, command, *quantize_argv(source, quantized, tp=1, ep=1))[0].status == 0
    flags = ["--export-format", "compressed-tensors", "--max-shard-size", "300KB"]
    argv = ["export", str(quantized), *flags, "--export-dir"]
    assert ranks(2, command, *argv, str(whole))[0].status == 0
    ranks.errors(2, killed_command, 1, 70, [*argv, str(out)], timeout=60)
    said = message(ranks(2, command, *argv, str(out)))
    assert said.startswith(f"{out} holds an unfinished export; continue it with --resume, start")
    assert [e.status for e in ranks(2, command, *argv, str(out), "--resume")] == [0, 0]
    assert tree(out) == tree(whole)


def saving_argv(source: Path, folder: Path) -> list[str]:
    """For two ranks: a Megatron checkpoint and an export."""
    flags: dict[str, Any] = {"max_shard_size": "300KB", "megatron_save_path": folder / "saved"}
    return quantize_argv(source, folder / "out", **flags)


@pytest.fixture(scope="module")
def both(source: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run writes that nobody disturbed."""
    folder = tmp_path_factory.mktemp("both")
    assert [e.status for e in ranks(2, command, *saving_argv(source, folder))] == [0] * 2
    return folder


def same_tensors(stored: Path, wanted: Path, ranks: Ranks) -> None:
    found, of_both = (ranks(1, saved.tensors, each)[0] for each in (stored, wanted))
    assert found.keys() == of_both.keys()
    assert all(torch.equal(found[key], of_both[key]) for key in of_both)


@pytest.mark.parametrize(("victim", "number", "was_saved"), [(0, 3, False), (1, 60, True)])
def test_a_save_and_an_export_resume(  # noqa: PLR0913
    victim: int,
    number: int,
    was_saved: bool,
    source: Path,
    both: Path,
    ranks: Ranks,
    tmp_path: Path,
) -> None:
    """Killed in the one, or in the other: what is finished stays, the rest is equal."""
    argv, stored = saving_argv(source, tmp_path), tmp_path / "saved"
    died = ranks.errors(2, killed_command, victim, number, argv, timeout=120)
    assert str(died[victim]) == "the process died"
    assert stored.exists() == was_saved and not (tmp_path / "out" / INDEX).exists()
    before = {path: path.stat().st_mtime_ns for path in stored.rglob("*")}
    assert [e.status for e in ranks(2, command, *argv, "--resume")] == [0] * 2
    assert tree(tmp_path / "out") == tree(both / "out")
    assert before.items() <= {path: path.stat().st_mtime_ns for path in stored.rglob("*")}.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved"]
    same_tensors(stored, both / "saved", ranks)


def ended_by(number: signal.Signals, argv: list[str], folder: Path, begun: Callable[[], bool]) -> None:
    """Send a signal to the torchrun of two ranks, whose disk is slow, as soon as it has ``begun``.

    Ctrl-C reaches torchrun alone: its ranks have sessions of their own.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (folder.parent / "said").open("w") as said:
        started = subprocess.Popen(
            [*run, "-m", "tests.dist.slow_disk", *argv], stdout=said, stderr=said, cwd=ROOT
        )
        end = time.monotonic() + 120
        while not begun():
            text = (folder.parent / "said").read_text()
            assert started.poll() is None and time.monotonic() < end, text
            time.sleep(0.002)
        started.send_signal(number)
        assert started.wait(60) != 0


def resumed_when_free(argv: list[str], ranks: Ranks) -> None:
    """Ranks may live on as orphans: while one holds the directory a resume is refused."""
    end = time.monotonic() + 120
    while (ended := ranks(2, command, *argv, "--resume"))[0].status != 0:
        assert "is being written by another run" in message(ended)
        assert time.monotonic() < end
        time.sleep(0.5)


def has_begun(out: Path) -> Callable[[], bool]:
    return lambda: any(out.glob(".model-*.partial"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_torchrun_is_killed_or_interrupted(
    number: signal.Signals, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    flags: dict[str, Any] = {"stream": True, "tp": None, "ep": None, "max_shard_size": "100KB"}
    assert ranks(1, command, *quantize_argv(source, whole, **flags))[0].status == 0
    argv = quantize_argv(source, out, **flags)
    ended_by(number, argv, out, has_begun(out))
    assert number == signal.SIGKILL or not (out / INDEX).exists()
    resumed_when_free(argv, ranks)
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("in_save", [True, False])
def test_an_interrupted_save_and_export(
    in_save: bool, source: Path, both: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Ctrl-C in the live path, while a Megatron checkpoint is written, or an export alone."""
    out, stored, incomplete = (tmp_path / name for name in ("out", "saved", "saved.incomplete"))
    argv = saving_argv(source, tmp_path)
    if not in_save:
        at = argv.index("--megatron-save-path")
        del argv[at : at + 2]
    begun = (incomplete / "checkpoint").is_dir if in_save else has_begun(out)
    ended_by(signal.SIGINT, argv, out, begun)
    assert not stored.exists() and not (out / INDEX).exists()
    resumed_when_free(argv, ranks)
    assert tree(out) == tree(both / "out")
    if in_save:
        same_tensors(stored, both / "saved", ranks)
    wanted = {"out", "said", *(["saved"] if in_save else [])}
    assert {path.name for path in tmp_path.iterdir()} == wanted


def test_an_interrupted_export(both: Path, ranks: Ranks, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    flags = ["--export-format", "compressed-tensors", "--max-shard-size", "100KB"]
    argv = ["export", str(both / "out"), *flags, "--export-dir"]
    assert ranks(1, command, *argv, str(whole))[0].status == 0
    ended_by(signal.SIGINT, [*argv, str(out)], out, has_begun(out))
    assert not (out / INDEX).exists()
    resumed_when_free([*argv, str(out)], ranks)
    assert tree(out) == tree(whole)
