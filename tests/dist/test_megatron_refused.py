"""Megatron checkpoints that are refused: on every rank, with one line that names what is wrong."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_quant.errors import CheckpointError
from tests.dist import checkpoints, saved
from megatron_quant.mcore.checkpoint.folder import WRITTEN
from tests.dist.command import command, message, quantize_argv, refused, tree
from tests.dist.pool import Ranks

SIZES = {"num_hidden_layers": 1, "num_experts": 4}
FC1 = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight_quantizer._amax"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


@pytest.fixture(scope="module")
def stored(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """Saved alone, without an export."""
    path = tmp_path_factory.mktemp("stored") / "saved"
    argv = quantize_argv(source, path, export_dir=None, megatron_save_path=path, ep=1)
    for ended in ranks(2, command, *argv):
        assert ended.status == 0, ended.err
        assert not (path.parent / "saved.incomplete").exists()
    return path


def export_argv(stored: Path, out: Path, *more: str) -> list[str]:
    argv = ["export", "--megatron-load-path", str(stored), "--export-dir", str(out)]
    return [*argv, "--export-format", "modelopt", *more]


INPUT = FC1.replace("weight_q", "input_q")
OTHER = "other.linear.weight_quantizer._amax"
# (dropped, added, what is said of it)
KEYS = [
    (FC1, "", f"has no {FC1} (1 missing in all)"),
    ("decoder.final_layernorm.weight", "", "has no decoder.final_layernorm.weight"),
    ("", INPUT, f"has {INPUT} (1 in all), which the model lacks"),
    ("", OTHER, f"has {OTHER} (1 in all)"),
    (FC1, FC1, f"{FC1} is (7,), but (1,) in the model"),
    ("", "optimizer.state.exp_avg.decoder", ""),  # none of ours
]


def test_keys(stored: Path, tmp_path: Path, ranks: Ranks) -> None:
    changed = [tmp_path / str(i) for i in range(len(KEYS))]
    ranks(1, saved.change_keys, stored, changed, [(drop, add) for drop, add, _ in KEYS])
    argvs = [export_argv(path, path.with_suffix(".out"), "--tp", "2") for path in changed]
    runs = ranks(2, saved.commands, argvs)
    for path, (_, _, words), ended in zip(changed, KEYS, zip(*runs, strict=True), strict=True):
        if words:
            said = message(ended)
            assert words in said and str(path) in said
            assert not path.with_suffix(".out").exists()
        else:
            assert [e.status for e in ended] == [0, 0], ended


def truncated(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])


def without_files(path: Path) -> None:
    shutil.rmtree(path / "hf")


def test_files(stored: Path, tmp_path: Path, ranks: Ranks) -> None:
    cases = [
        (truncated, "cannot be read: "),
        (without_files, "has no hf folder with config.json and the tokenizer, and no run_config.yaml: s"),
        (shutil.rmtree, "holds no distributed checkpoint"),
    ]
    for at, (spoil, _) in enumerate(cases):
        shutil.copytree(stored, tmp_path / str(at))
        spoil(tmp_path / str(at))
    argvs = [export_argv(tmp_path / str(i), tmp_path / "out") for i in range(len(cases))]
    for (_, words), ended in zip(cases, zip(*ranks(2, saved.commands, argvs), strict=True), strict=True):
        assert words in message(ended)
    assert not (tmp_path / "out").exists()


def test_another_recipe(source: Path, stored: Path, tmp_path: Path, ranks: Ranks) -> None:
    flags = {"megatron_load_path": stored, "export_quant_cfg": "fp8", "ep": 1}
    argv = quantize_argv(source, tmp_path / "out", **flags, export_format="compressed-tensors")
    said = refused(ranks, tmp_path, argv)
    assert "was saved with recipe 'nvfp4', which treats decoder.layers.0.self_attention" in said


def test_places_that_are_taken(source: Path, stored: Path, tmp_path: Path, ranks: Ranks) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    places = (stored, taken)
    argvs = [
        quantize_argv(source, tmp_path / "out", megatron_save_path=path, ep=1) for path in places
    ]
    first, second = zip(*ranks(2, saved.commands, argvs), strict=True)
    assert "holds a checkpoint; choose" in message(first)
    assert "is not empty; choose" in message(second)
    assert tree(tmp_path) == {"taken": b"", "taken/notes.txt": b"mine"}


def test_checkpoints_that_are_there(
    source: Path, stored: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """--resume leaves what is finished; --overwrite replaces what the checkpoint itself lists."""
    old, others, unlisted = (tmp_path / name for name in ("old", "others", "unlisted"))
    for path in (old, others, unlisted):
        shutil.copytree(stored, path)
    (others / "adapter.safetensors").write_text("mine")
    (unlisted / WRITTEN).unlink()
    alone: dict[str, Any] = {"export_dir": None, "tp": 1, "ep": 1}

    def argv(path: Path, **flags: object) -> list[str]:
        return quantize_argv(source, path, **{**alone, "megatron_save_path": path, **flags})

    before = tree(tmp_path)
    refusals = {
        "adapter.safetensors is in the way, and this library did": argv(others, overwrite=True),
        ".metadata is in the way, and this library did not list": argv(unlisted, overwrite=True),
        "that was not made with this run's recipe": argv(old, resume=True, export_quant_cfg="fp8"),
        "that was not made with this run's dtype": argv(old, resume=True, dtype="fp32"),
    }
    resumed = argv(old, resume=True)
    (ended,) = ranks(1, saved.commands, [*refusals.values(), resumed])
    for words, end in zip(refusals, ended, strict=False):
        assert words in message([end])
    assert ended[-1].status == 0, ended[-1].err
    assert tree(tmp_path) == before
    (ended,) = ranks(1, saved.commands, [argv(old, overwrite=True)])
    assert ended[0].status == 0, ended[0].err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "others", "unlisted"]
    assert (old / "metadata.json").stat().st_mtime_ns > (stored / "metadata.json").stat().st_mtime_ns


def name_saves(folder: Path) -> list[str]:
    """Three saves, of which another program made the second; what is left of them."""
    from megatron_quant.mcore.training.train_state import _name_latest
    from tests.unit.test_megatron_folder import saved as save, unlisted

    for step in range(1, 4):
        path = folder / f"iter_000000{step}"
        save(path)
        if step == 2:
            unlisted(path)
        _name_latest(path, step)
    return sorted(path.name for path in folder.iterdir())


def test_a_run_removes_its_own_saves_alone(tmp_path: Path, ranks: Ranks) -> None:
    (left,) = ranks(1, name_saves, tmp_path)
    assert left == ["iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt"]


def test_places_that_meet(source: Path, stored: Path, tmp_path: Path, ranks: Ranks) -> None:
    out, save = "--export-dir", "--megatron-save-path"
    cases: list[tuple[Path, Path, Path | None, str]] = [
        (tmp_path / "a", tmp_path / "a", None, f"{save} {tmp_path / 'a'} and {out} "),
        (tmp_path / "a", tmp_path / "a" / "b", None, "or one lies in the other"),
        (tmp_path / "a" / "b", tmp_path / "a", None, "or one lies in the other"),
        (Path(), tmp_path / "a", None, f"{out} . is the directory that the command runs in"),
        (tmp_path / "a", Path(), None, f"{save} . is the directory that the command runs in"),
        (tmp_path / "a", source, None, f"{save} {source} is the source checkpoint"),
        (tmp_path / "a", source / "b", None, f"{save} {source / 'b'} lies in the source"),
        (stored / "b", tmp_path / "a", stored, f"{out} {stored / 'b'} lies in the source"),
        (tmp_path / "a", stored, stored, f"{save} {stored} is the source checkpoint"),
    ]
    argvs = [
        quantize_argv(
            source, one, megatron_save_path=other, megatron_load_path=load, tp=1, ep=1, overwrite=True
        )
        for one, other, load, _ in cases
    ]
    before = tree(stored)
    (runs,) = ranks(1, saved.commands, argvs)
    for (_, _, _, words), ended in zip(cases, runs, strict=True):
        assert words in message([ended])
    assert tree(stored) == before and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["quantize"], "needs --hf-model-id and --export-quant-cfg, or --megatron-load-path"),
        (
            ["quantize", "--megatron-load-path", "x", "--dry-run"],
            "leave out --megatron-load-path",
        ),
        (
            ["export", "--export-dir", "x", "--export-format", "fp8"],
            "either the directory of a quantized checkpoint or --megatron-load-path",
        ),
    ],
)
def test_flags(argv: list[str], words: str, ranks: Ranks) -> None:
    assert words in message(ranks(1, command, *argv))


def read_descriptions() -> list[str]:
    """What is said of documents that are none, or larger than one may be."""
    from megatron_quant.mcore.checkpoint.state import DESCRIBED, decode, encode

    assert decode(encode({"a": [1, None]})) == {"a": [1, None]}
    said = []
    for stored in (b"", b"{", b"\xff", b"[" * 100 + b"]" * 100, b"[]" * DESCRIBED.nbytes):
        try:
            decode(torch.frombuffer(bytearray(stored + b"\0 "), dtype=torch.uint8))
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_a_description_that_is_none_or_too_large(ranks: Ranks) -> None:
    (said,) = ranks(1, read_descriptions)
    assert len(said) == 5 and all("cannot be read as JSON" in one for one in said)
