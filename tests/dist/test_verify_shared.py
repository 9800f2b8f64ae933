"""Ranks verify a checkpoint together: each takes a share, and all give the same report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_quant.ckpt.verify import Report, Share, verify, verify_share
from megatron_quant.ckpt.verify import checkpoint as checkpoint_room
from megatron_quant.dist import Groups
from megatron_quant.errors import CheckpointError, VerifyError
from megatron_quant.runs import destination
from megatron_quant.runs.destination import Verification, verify_together
from megatron_quant.runs.phases import Quiet
from tests.dist import checkpoints
from tests.dist.command import Ended, command, quantize_argv, tree
from tests.dist.pool import Ranks
from tests.unit import exported

NAN = torch.tensor(float("nan"))


@pytest.fixture(scope="module")
def weights() -> exported.Tensors:
    return exported.source_weights()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, weights: exported.Tensors) -> Path:
    return exported.write(tmp_path_factory.mktemp("source"), weights)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, weights: exported.Tensors) -> Path:
    out = tmp_path_factory.mktemp("good")
    return exported.export(out, "modelopt", exported.plan("nvfp4"), weights)


def reports(directories: list[Path], source: Path | None) -> list[Report]:
    return [verify_together(directory, source, Groups()) for directory in directories]


def of_one(directories: list[Path], source: Path | None) -> list[Report]:
    return [verify(directory, source) for directory in directories]


@pytest.mark.parametrize("world", [2, 4])
def test_a_fault_is_found_whichever_rank_has_the_tensor(
    world: int, good: Path, source: Path, weights: exported.Tensors, ranks: Ranks, tmp_path: Path
) -> None:
    directories = [good]
    for name in weights:  # one checkpoint for each, of which that tensor is damaged
        damaged = exported.read(good)
        stored = name.removesuffix(".weight") + ".weight_scale_2"
        damaged[stored if stored in damaged else name].view(-1)[-1] = NAN
        config = json.loads((good / "config.json").read_text())
        directories.append(exported.write(tmp_path / name, damaged, config))
        extra = "hf_quant_config.json"
        (directories[-1] / extra).write_bytes((good / extra).read_bytes())
    alone = of_one(directories, source)
    assert not alone[0].problems
    for name, report in zip(weights, alone[1:], strict=True):
        assert [p for p in report.problems if p.startswith(name.removesuffix(".weight"))]
    assert ranks(world, reports, directories, source) == [alone] * world


@pytest.mark.parametrize("world", [2, 4])
def test_many_faults_have_the_order_that_one_process_gives_them(
    world: int, good: Path, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    damaged = exported.read(good)
    for number, name in enumerate(sorted(damaged)):
        if name.endswith("input_scale"):
            damaged[name].fill_(1.0 + number)  # fused ones differ
        elif name.endswith("norm.weight"):
            damaged[name].add_(1)
        elif name.endswith("down_proj.weight_scale_2"):
            damaged[name].fill_(0)
    del damaged["model.layers.0.mlp.gate.weight"]
    damaged["more.weight"] = torch.zeros(1)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    exported.write(tmp_path, damaged, json.loads((good / "config.json").read_text()))
    alone = of_one([tmp_path], source)
    kinds = ("no quantization section", "knows no such", "differs from", "positive", "missing")
    said = "\n".join(alone[0].problems)
    assert all(kind in said for kind in (*kinds, "not equal"))
    assert ranks(world, reports, [tmp_path], source) == [alone] * world
    without = of_one([tmp_path], None)
    assert ranks(world, reports, [tmp_path], None) == [without] * world


def test_every_tensor_is_looked_at_by_one_rank_alone(good: Path, source: Path) -> None:
    shares = [verify_share(good, source, rank, 4) for rank in range(4)]
    names = [{t.name for checks in s.tensors.values() for t in checks} for s in shares]
    assert sum(map(len, names)) == len(set().union(*names)) == len(exported.source_weights())
    for expert in (0, 1):  # engines fuse gate and up, so that one rank compares them
        fused = {f"model.layers.0.mlp.experts.{expert}.{p}_proj.weight" for p in ("gate", "up")}
        assert any(fused <= of_rank for of_rank in names)
    assert all(names)


@pytest.mark.parametrize("world", [1, 3])
def test_what_cannot_be_looked_at(world: int, good: Path, ranks: Ranks, tmp_path: Path) -> None:
    damaged = exported.write(tmp_path, exported.read(good))
    (damaged / exported.INDEX).write_text("{")
    assert ranks(world, reports, [damaged], None) == [of_one([damaged], None)] * world


def by_links(out: Path, real: Path, source: Path) -> None:
    """Every rank sees the files in a folder of its own, as while an export is unfinished."""
    links = out / str(dist.get_rank())
    links.mkdir(parents=True)
    for path in real.iterdir():
        (links / path.name).symlink_to(path)
    Verification(Path("/the/export"), source, Groups(), Quiet())(links)


def test_the_first_problem_is_every_rank_s(
    good: Path, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    config = json.loads((good / "config.json").read_text())
    damaged = exported.read(good)
    damaged["lm_head.weight"].view(-1)[0] = NAN
    exported.write(tmp_path / "bad", damaged, config)
    (tmp_path / "bad" / "hf_quant_config.json").write_text("{")
    errors = ranks.errors(3, by_links, tmp_path / "links", tmp_path / "bad", source)
    assert {type(e) for e in errors} == {VerifyError}
    (said,) = {str(e) for e in errors}
    assert said.startswith("/the/export: /the/export/hf_quant_config.json") and "1 more" in said


def looked_at(argv: list[str]) -> tuple[Ended, int]:
    """How the verb ends, and how many tensors this rank reads to the end."""
    compared: list[str] = []
    real = checkpoint_room._check_values

    def counted(checkpoint: Any, source: Any, against: Any, held: Any) -> Any:
        compared.append(source.name)
        return real(checkpoint, source, against, held)

    checkpoint_room._check_values = counted
    return command(*argv), len(compared)


@pytest.mark.parametrize("flags", [[], ["--digests"]])
def test_the_verb_shares_the_tensors(
    flags: list[str], good: Path, source: Path, ranks: Ranks
) -> None:
    argv = ["verify", str(good), "--against", str(source)]
    alone = command(*argv)
    found = ranks(3, looked_at, [*argv, *flags])
    assert sum(count for _, count in found) == len(exported.source_weights())
    assert all(count for _, count in found)
    if flags:  # made by hand, it has no manifest
        assert {ended.status for ended, _ in found} == {1}
        first = found[0][0].out.splitlines()[0]
        assert first.startswith("problem: megatron_quant_manifest.json is missing")
    else:
        assert [(e.status, e.out) for e, _ in found] == [(0, alone.out), (0, ""), (0, "")]


def one_without_source(good: Path, source: Path) -> None:
    verify_together(good, source if dist.get_rank() != 1 else source / "none", Groups())


def test_a_rank_that_cannot_read_the_source(good: Path, source: Path, ranks: Ranks) -> None:
    errors = ranks.errors(3, one_without_source, good, source)
    assert {type(e) for e in errors} == {CheckpointError}
    assert len({str(e) for e in errors}) == 1


def test_no_verify_leaves_the_same_files_without_looking_at_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.save("qwen3", tmp_path / "source")
    streamed = {"stream": True, "tp": 1, "ep": 1}
    assert command(*quantize_argv(source, tmp_path / "a", **streamed)).status == 0

    def called(*_: object) -> None:
        raise AssertionError("verified")

    monkeypatch.setattr(destination, "verify_share", called)
    ended = command(*quantize_argv(source, tmp_path / "b", **streamed, no_verify=True))
    assert (ended.status, ended.err) == (0, "") and ended.out.startswith("not verified (--no-verify)")
    assert tree(tmp_path / "b") == tree(tmp_path / "a")
    again = ("export", str(tmp_path / "b"), "--export-format", "compressed-tensors")
    refused = command(*again, "--export-dir", str(tmp_path / "c"))
    assert refused.status == 1 and "AssertionError: verified" in refused.err
    assert command(*again, "--export-dir", str(tmp_path / "c"), "--no-verify").status == 0
    assert "config.json" in tree(tmp_path / "c")


@pytest.mark.parametrize("name", ["a", "/b/c", "\\1"])
def test_findings_under_another_name(name: str) -> None:
    lines = ["/a: no config", "x: missing, though /a/x.json lists it", "/ab, b/a and c/a/d: a tensor"]
    share = Share(Path("/a"), ("/a cannot be read",)).called(Path(name))
    assert (share.directory, share.unreadable) == (Path(name), (f"{name} cannot be read",))
    share = Share(Path("/a"), problems={(0, 0): lines}).called(Path(name))
    assert share.problems[0, 0] == [f"{name}: no config", lines[1].replace("/a/x", f"{name}/x"), lines[2]]


def test_a_short_relative_name(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words of a problem stay, although the directory's name is in many of them."""
    bad = Path(shutil.copytree(good, tmp_path / "a"))
    exported.edit_json(bad / "config.json", lambda config: config.pop("num_hidden_layers"))
    (wanted,) = verify_together(bad, None, Groups()).problems
    monkeypatch.chdir(tmp_path)
    (found,) = verify_together(Path("a"), None, Groups(), named=Path("b")).problems
    assert found == wanted.replace(str(bad), "b")
