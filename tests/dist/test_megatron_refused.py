"""Megatron checkpoints that are refused: on every rank, with one line that names what is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist import checkpoints, saved
from tests.dist.command import command, message, quantize_argv, refused
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


@pytest.mark.parametrize(
    ("drop", "add", "words"),
    [
        (FC1, "", f"has no {FC1} (1 missing in all)"),
        ("decoder.final_layernorm.weight", "", "has no decoder.final_layernorm.weight"),
        ("", FC1.replace("weight_q", "input_q"), f"has {FC1.replace('weight_q', 'input_q')} (1 in"),
        ("", "other.linear.weight_quantizer._amax", "has other.linear.weight_quantizer._amax (1"),
        (FC1, FC1, f"{FC1} is (7,), the model's is (1,)"),
    ],
)
def test_keys(drop: str, add: str, words: str, stored: Path, tmp_path: Path, ranks: Ranks) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(stored, changed)
    ranks(1, saved.change_keys, stored, changed, drop, add)
    said = refused(ranks, tmp_path, export_argv(changed, tmp_path / "out", "--tp", "2"))
    assert words in said and str(changed) in said


def test_an_optimizer_beside_the_model_is_none_of_ours(
    stored: Path, tmp_path: Path, ranks: Ranks
) -> None:
    shutil.copytree(stored, tmp_path / "changed")
    ranks(1, saved.change_keys, stored, tmp_path / "changed", "", "optimizer.state.exp_avg.decoder")
    (ended,) = ranks(1, command, *export_argv(tmp_path / "changed", tmp_path / "out"))
    assert ended.status == 0, ended.err


def truncated(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])


def without_files(path: Path) -> None:
    shutil.rmtree(path / "hf")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, "cannot be read: "),
        (without_files, "has no hf folder with config.json and the tokenizer: say where"),
        (shutil.rmtree, "holds no distributed checkpoint"),
    ],
)
def test_files(
    spoil: Callable[[Path], None], words: str, stored: Path, tmp_path: Path, ranks: Ranks
) -> None:
    shutil.copytree(stored, tmp_path / "changed")
    spoil(tmp_path / "changed")
    assert words in refused(ranks, tmp_path, export_argv(tmp_path / "changed", tmp_path / "out"))


def test_another_recipe(source: Path, stored: Path, tmp_path: Path, ranks: Ranks) -> None:
    flags = {"megatron_load_path": stored, "export_quant_cfg": "fp8", "ep": 1}
    argv = quantize_argv(source, tmp_path / "out", **flags, export_format="compressed-tensors")
    said = refused(ranks, tmp_path, argv)
    assert "was saved with recipe 'nvfp4', which treats decoder.layers.0.self_attention" in said


def test_places_that_are_taken(source: Path, stored: Path, tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path, words in ((stored, "holds a checkpoint; choose"), (tmp_path, "is not empty; choose")):
        argv = quantize_argv(source, tmp_path / "out", megatron_save_path=path, ep=1)
        assert words in refused(ranks, path, argv)


def test_overwriting_a_checkpoint(source: Path, stored: Path, tmp_path: Path, ranks: Ranks) -> None:
    shutil.copytree(stored, tmp_path / "old")
    (tmp_path / "old" / "mark").touch()
    flags = {"export_dir": None, "megatron_save_path": tmp_path / "old", "overwrite": True}
    (ended,) = ranks(1, command, *quantize_argv(source, stored, **flags, tp=1, ep=1))
    assert ended.status == 0, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert not (tmp_path / "old" / "mark").exists()


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
