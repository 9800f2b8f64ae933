"""Continuing an unfinished export: what is kept, what is written again, what is refused."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_quant.ckpt.plan.export_plan import ExportPlan
from megatron_quant.ckpt.plan.parts import RankPart
from megatron_quant.ckpt.plan.provenance import Origin, recipe_digest, source_digest
from megatron_quant.ckpt.storage.safetensors_header import INDEX
from megatron_quant.ckpt.write.directory import Existing
from megatron_quant.ckpt.write.encode_part import Produced
from megatron_quant.ckpt.write.exporter import Destination, export
from megatron_quant.ckpt.write.manifest import MANIFEST
from megatron_quant.ckpt.write.pipeline import WriteOptions
from megatron_quant.dist import Groups
from megatron_quant.errors import CheckpointError, ExportError, FormatError
from megatron_quant.recipes.load import load_recipe
from megatron_quant.recipes.schema import weight_only
from tests.dist.command import command
from tests.unit import ckpt_world as world
from tests.unit.test_ckpt_writer import BESIDE, contents, producer
from tests.unit.test_digests import tree

ORIGIN = Origin("recipe", "source", "statistics")
NAMED = replace(BESIDE, origin=ORIGIN)


def plan(max_shard: int = 20_000) -> ExportPlan:
    return world.plan("nvfp4", "tp1", max_shard=max_shard)


def write(
    directory: Path,
    existing: Existing = Existing.RESUME,
    origin: Origin = ORIGIN,
    produce: Callable[[RankPart], Iterator[Produced]] | None = None,
) -> list[str]:
    """Export to ``directory``; the tensors that were encoded."""
    encoded: list[str] = []

    def made(part: RankPart) -> Iterator[Produced]:
        encoded.append(part.target.source.name)
        return (produce or producer())(part)

    export(
        plan(),
        Groups(),
        made,
        Destination(
            directory=directory, companions=replace(BESIDE, origin=origin), existing=existing
        ),
    )
    return encoded


class Stop(BaseException):
    """As a kill: nothing cleans up after it."""


def stop_after(count: int) -> Callable[[RankPart], Iterator[Produced]]:
    """Produce ``count`` parts and stop."""
    left = iter(range(count))

    def made(part: RankPart) -> Iterator[Produced]:
        if next(left, None) is None:
            raise Stop
        return producer()(part)

    return made


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """An export that was stopped before its last parts."""
    out = tmp_path / "out"
    with pytest.raises(Stop):
        write(out, Existing.REFUSE, produce=stop_after(len(plan().parts) - 2))
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    write(out, Existing.REFUSE)
    return contents(out)


def test_an_absent_or_empty_target_is_started(tmp_path: Path, whole: dict[str, bytes]) -> None:
    everything = [part.target.source.name for part in plan().parts]
    assert write(tmp_path / "absent") == everything
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty") == everything
    assert contents(tmp_path / "absent") == contents(tmp_path / "empty") == whole


def test_a_part_is_done_only_if_its_bytes_are_intact(
    unfinished: Path, whole: dict[str, bytes]
) -> None:
    first = plan().parts[0]
    entry = first.target.entries[0]
    with (unfinished / f".{entry.file}.partial").open("r+b") as stream:
        stream.seek(entry.offset + entry.nbytes - 1)
        last = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([last ^ 1]))
    encoded = write(unfinished)
    assert first.target.source.name in encoded and len(encoded) < len(plan().parts) / 2
    assert contents(unfinished) == whole


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone", "no header"])
def test_files_that_are_not_as_they_were(
    damage: str, unfinished: Path, whole: dict[str, bytes]
) -> None:
    file = unfinished / f".{plan().files[0].name}.partial"
    held = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        changed = {"shorter": held[:-40], "longer": held + b"x", "no header": bytes(9) + held[9:]}
        file.write_bytes(changed[damage])
    write(unfinished)
    assert contents(unfinished) == whole


def test_a_torn_line_of_the_journal_says_nothing(unfinished: Path, whole: dict[str, bytes]) -> None:
    (journal,) = unfinished.glob(".*journal*")
    lines = journal.read_bytes().rstrip().splitlines()
    journal.write_bytes(b"\n".join(lines)[:-30])
    again = write(unfinished)
    assert json.loads(lines[-1])[0].rpartition(".")[0] in [n.rpartition(".")[0] for n in again]
    assert contents(unfinished) == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": "other"}, "holds an export with another recipe; --resume with what it was"),
        ({"source": "other"}, "holds an export with another source checkpoint; --resume with"),
        ({"statistics": "other"}, "holds an export with other calibrated scales (the calibration"),
    ],
)
def test_another_origin_is_refused(change: dict[str, str], words: str, unfinished: Path) -> None:
    before = contents(unfinished)
    with pytest.raises(ExportError) as caught:
        write(unfinished, origin=replace(ORIGIN, **change))
    assert words in str(caught.value)
    assert contents(unfinished) == before


def test_other_files_are_refused(unfinished: Path) -> None:
    before = contents(unfinished)
    with pytest.raises(ExportError, match=r"other tensors or files \(--export-format, --max-sh"):
        export(
            plan(30_000),
            Groups(),
            producer(),
            Destination(directory=unfinished, companions=NAMED, existing=Existing.RESUME),
        )
    assert contents(unfinished) == before


def test_without_the_flag_it_is_refused_and_named(unfinished: Path) -> None:
    with pytest.raises(ExportError, match="holds an unfinished export; continue it with --resume"):
        write(unfinished, Existing.REFUSE)


def test_overwrite_starts_anew(unfinished: Path, whole: dict[str, bytes]) -> None:
    assert len(write(unfinished, Existing.REPLACE)) == len(plan().parts)
    assert contents(unfinished) == whole


def test_what_is_finished_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / ".megatron_quant_journal_0.partial").write_text("left by a kill at the very end")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name[0] != "."}
    assert write(tmp_path) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(ExportError, match="holds an export with another recipe"):
        write(tmp_path, origin=replace(ORIGIN, recipe="other"))


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ExportError, match="is not empty and holds no unfinished export that --re"):
        write(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ExportError, match="is not empty and holds no unfinished"):
        write(tmp_path)


def test_a_kill_before_the_export_had_a_name(tmp_path: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / ".megatron_quant_unfinished.json.new.partial").write_text('{"rec')
    write(tmp_path)
    assert contents(tmp_path) == whole


def test_a_failure_keeps_what_was_written_with_the_flag_alone(tmp_path: Path) -> None:
    def failing(part: RankPart) -> Iterator[Produced]:
        if part is plan_parts[-1]:
            raise FormatError("bad")
        return producer()(part)

    plan_parts = plan().parts
    for existing, count in ((Existing.REFUSE, 0), (Existing.RESUME, len(plan().files) + 2)):
        made = plan()
        plan_parts = made.parts
        with pytest.raises(FormatError):
            export(
                made,
                Groups(),
                failing,
                Destination(directory=tmp_path, companions=NAMED, existing=existing),
            )
        assert len(list(tmp_path.iterdir())) == count
    assert len(write(tmp_path)) == 1


def test_an_error_in_a_thread_is_the_ranks_error(tmp_path: Path) -> None:
    def torn(part: RankPart) -> Iterator[Produced]:
        for path in tmp_path.glob(".model-*"):
            if not path.is_symlink():
                path.unlink()
                path.symlink_to("/dev/full")
        return producer()(part)

    with pytest.raises(ExportError, match=r"partial: cannot be written: No space left on device"):
        write(tmp_path, Existing.REFUSE, produce=torn)
    assert contents(tmp_path) == {}


def test_no_threads_are_refused() -> None:
    with pytest.raises(ExportError, match="--io-threads is 0: give at least 1"):
        WriteOptions(0)


@pytest.mark.parametrize("options", [WriteOptions(1, False), WriteOptions(4)])
def test_how_it_is_written_changes_no_byte(
    options: WriteOptions, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    progressed: list[int] = []
    to = Destination(directory=tmp_path, companions=NAMED, options=options)
    export(plan(), Groups(), producer(), to, progressed.append)
    assert contents(tmp_path) == whole
    assert sum(progressed) == plan().bytes_after


def test_the_manifest_digests_every_tensor_and_no_statistics(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["recipe"] == "recipe" and manifest["source"] == "source"
    assert "statistics" not in manifest
    assert list(manifest["tensors"]) == [entry.name for entry in plan().entries]
    for entry in plan().entries:
        data = (tmp_path / entry.file).read_bytes()[entry.offset : entry.offset + entry.nbytes]
        assert manifest["tensors"][entry.name] == tree(data)


def test_digests_of_recipes_and_sources(tmp_path: Path) -> None:
    nvfp4 = load_recipe("nvfp4")
    assert recipe_digest(nvfp4) == recipe_digest(replace(nvfp4, name="mine", description="x"))
    assert recipe_digest(nvfp4) != recipe_digest(weight_only(nvfp4))
    assert recipe_digest(nvfp4) != recipe_digest(replace(nvfp4, kv_cache="fp8"))
    write(tmp_path / "a")
    first = source_digest(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert source_digest(tmp_path / "b") == first
    (tmp_path / "b" / "config.json").write_text('{"hidden_size": 1}')
    assert source_digest(tmp_path / "b") != first
    (tmp_path / "b" / "model.safetensors").write_bytes(b"\xff" * 8)
    with pytest.raises(CheckpointError, match="is truncated or no safetensors file; fetch it"):
        source_digest(tmp_path / "b")


def verify_digests(directory: Path) -> list[str]:
    """The problems that ``verify --digests`` prints."""
    ended = command("verify", str(directory), "--digests")
    assert ended.status == 1
    lines = " ".join(ended.out.split()).split("problem: ")[1:]
    assert ended.err.count("\n") == 1 and lines[0].strip() in ended.err
    return [line.strip() for line in lines]


def test_verify_names_the_first_damaged_tensor(tmp_path: Path) -> None:
    write(tmp_path)
    second = plan().entries[1]
    for entry in (second, plan().entries[-1]):
        data = bytearray((tmp_path / entry.file).read_bytes())
        data[entry.offset] ^= 1
        (tmp_path / entry.file).write_bytes(data)
    problems = verify_digests(tmp_path)
    expected = f"{second.name}: damaged: its bytes in {second.file} are not those that were"
    assert problems[0].startswith(expected)
    assert [p for p in problems if "damaged" in p] == problems[:2]


def test_verify_of_headers_and_manifests(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(manifest.replace('"version": 2', '"version": 9'))
    assert "does not have version 2; verify with the release that" in verify_digests(tmp_path)[0]
    (tmp_path / MANIFEST).unlink()
    assert f"{MANIFEST} is missing; verify without --digests" in verify_digests(tmp_path)[0]
    (tmp_path / MANIFEST).write_text(manifest)
    file = tmp_path / plan().files[0].name
    data = file.read_bytes()
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    file.write_bytes(data.replace(b'"pt"', b'"np"', 1))
    assert "names or headers of the files are not those of" in verify_digests(tmp_path)[0]
