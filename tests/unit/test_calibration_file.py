"""Files of what calibration measured: written whole or not at all, and read with their faults."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_quant.calib import calibration_file
from megatron_quant.calib.calibration_file import (
    AMAX,
    MOMENT,
    SQUARES,
    TOKENS,
    CalibrationWriter,
    loaded_amaxes,
    read_calibration,
    write_calibration,
)
from megatron_quant.errors import CalibrationError, ExportError, QuantError
from megatron_quant.formats import get_format
from megatron_quant.recipes import Decision, Slot
from megatron_quant.runs.settings import Calibration

K = 8
TENSORS = {
    f"a.{AMAX}": torch.tensor(3.0),
    f"a.{TOKENS}": torch.tensor(5),
    f"a.{SQUARES}": torch.arange(K).float(),
    f"a.{MOMENT}": torch.eye(K),
}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    write_calibration(path, TENSORS)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    file = read_calibration(path)
    assert file.amax(("b", "a")) == 3.0 and file.amax(("b",)) is None
    assert file.find(("a",), TOKENS, ()) == 5
    assert torch.equal(file.needed(("a",), MOMENT, (K, K)), torch.eye(K))
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


def test_several_processes_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    path.write_text("older")
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    one, other = CalibrationWriter(path, shapes), CalibrationWriter(path, shapes)
    one.create()
    for i, name in enumerate(TENSORS):
        (one if i % 2 else other).put(name, TENSORS[name])
    assert path.read_text() == "older"
    one.finish()
    assert path.stat().st_size == one.nbytes
    found = load_file(path)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept.safetensors"
    path.write_text("older")

    def full(fd: int, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(calibration_file, "write_at", full)
    words = "No space left on device; free some space or choose another --save-calibration"
    with pytest.raises(ExportError, match=words):
        write_calibration(path, TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]
    assert path.read_text() == "older"


def refused(path: Path, use) -> str:
    with pytest.raises(CalibrationError) as error:
        use(read_calibration(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_faults_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    assert "cannot be read" in refused(path, None)
    path.write_bytes(b"no safetensors file")
    assert "truncated or no safetensors file" in refused(path, None)
    save_file({f"a.{AMAX}": torch.tensor(float("nan")), f"a.{SQUARES}": torch.ones(K)}, path)
    assert "a.input_amax is nan; calibrate again" in refused(path, lambda f: f.amax(("a",)))
    words = (
        "a.input_squares is torch.float32 [8], but torch.float32 [4] is needed; it was saved for"
    )
    assert words in refused(path, lambda f: f.find(("a",), SQUARES, (4,)))
    words = "has no a.input_moment: save one with --keep-hessians of this model and recipe"
    assert words in refused(path, lambda f: f.needed(("a",), MOMENT, (K, K)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert "the file has" in refused(path, lambda f: f.find(("a",), SQUARES, (K,)))


def decision(module: str, expert: int | None = None) -> Decision:
    name = f"{module}.weight"
    slot = Slot(name=name, sources=(module,), shape=(K, K), expert=expert, fused="")
    fmt = get_format("fp8")
    return Decision(slot=slot, rule="", weights=fmt, inputs=fmt)


def test_an_expert_that_saw_no_token_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    write_calibration(path, {f"e.0.{AMAX}": torch.tensor(2.0), f"d.{AMAX}": torch.tensor(1.0)})
    file = read_calibration(path)
    slots = [Slot(name=f"e.weight{i}", sources=(f"e.{i}",), shape=(K, K), expert=i) for i in (0, 1)]
    fmt = get_format("fp8")
    experts = [Decision(slot=s, rule="", weights=fmt, inputs=fmt) for s in slots]
    found = loaded_amaxes(file, [*experts, decision("d")])
    assert found == {"e.weight0": 2.0, "d.weight": 1.0}
    write_calibration(
        path,
        {f"e.{i}.{AMAX}": torch.tensor(2.0) for i in (0, 1)}
        | {f"e.{i}.{TOKENS}": torch.tensor(i) for i in (0, 1)},
    )
    assert loaded_amaxes(read_calibration(path), experts) == {"e.weight1": 2.0}
    with pytest.raises(CalibrationError, match=r"has no x.input_amax: save one of this model"):
        loaded_amaxes(file, [decision("x")])
    with pytest.raises(CalibrationError, match=r"has no e.1.input_amax"):
        loaded_amaxes(file, experts[1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save": Path("x"), "load": Path("y")}, "leave one of them out"),
        ({"keep_hessians": True}, "--keep-hessians goes with --save-calibration FILE"),
        ({"load": Path("x"), "act_percentile": 99.0}, "--act-percentile clips measured inputs"),
    ],
)
def test_settings_that_exclude_one_another(settings: dict[str, object], message: str) -> None:
    with pytest.raises(QuantError, match=message):
        Calibration(**settings)
