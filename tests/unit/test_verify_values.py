"""Verification of values is the same with the compiled loops and without."""

import pytest
import torch

from megatron_quant.ckpt.read import logical_tensors
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.native import library
from tests.unit import exported
from tests.unit.exported import WRITTEN
from tests.unit.test_verify_checkpoint import EXPERT, ROUTER, broken


@pytest.mark.parametrize(("dialect", "choice"), WRITTEN)
def test_errors_are_those_of_the_decoded_weights(tmp_path, weights, source, dialect, choice):
    quant = exported.written_plan(dialect, choice)
    directory = exported.export(tmp_path / "out", dialect, quant, weights)
    checkpoint = QuantizedCheckpoint(directory)
    for tensor in verify(directory, source).tensors:
        if tensor.format:
            w = weights[tensor.name].double()
            lost = w - checkpoint.weight(tensor.name, torch.float32)
            assert tensor.error == pytest.approx((lost.norm() / w.norm()).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_source_of_another_dtype_has_the_same_errors(tmp_path, weights, source, dtype):
    directory = exported.export(tmp_path / "out", "modelopt", exported.plan("nvfp4"), weights)
    other = exported.write(tmp_path / "other", {n: w.to(dtype) for n, w in weights.items()})
    pairs = zip(verify(directory, source).tensors, verify(directory, other).tensors, strict=True)
    assert all(a.error == pytest.approx(b.error, rel=1e-3) for a, b in pairs if a.format)


def test_nan_element_is_what_is_named_against_a_source_too(tmp_path, weights, source):
    directory = exported.export(tmp_path / "out", "modelopt", exported.plan("fp8"), weights)
    name = f"{EXPERT}.down_proj.weight"
    exported.edit(directory, lambda t: t[name].view(torch.uint8)[-1, -1].fill_(0xFF))
    broken(directory, name, "NaN or infinity", against=source)
    checks = {t.name: t.error for t in verify(directory, source).tensors}
    assert checks.pop(name) is None
    assert all(e is not None for n, e in checks.items() if "proj" in n)


def test_nan_element_and_bad_scale(tmp_path, weights, source):
    directory = exported.export(tmp_path / "out", "modelopt", exported.plan("fp8"), weights)
    name = f"{EXPERT}.down_proj.weight"

    def change(tensors):
        tensors[name].view(torch.uint8)[0, 0] = 0x7F
        tensors[f"{name}_scale"].fill_(-1.0)

    exported.edit(directory, change)
    found = verify(directory, source).problems
    assert found == verify(directory).problems
    assert found == (
        f"{name}: holds NaN or infinity",
        f"{name}_scale: holds a scale that is not positive",
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_source_that_is_not_finite(tmp_path, weights, value):
    directory = exported.export(tmp_path / "out", "modelopt", exported.plan("fp8"), weights)
    name = f"{EXPERT}.down_proj.weight"
    changed = {n: w.clone() for n, w in weights.items()}
    changed[name][3, 5] = value
    against = exported.write(tmp_path / "source", changed)
    broken(directory, f"{name}: relative error nan against the source", against=against)


def test_plain_nan_differs_from_itself(tmp_path, weights):
    changed = {n: w.clone() for n, w in weights.items()}
    changed[f"{ROUTER}.weight"][0, 0] = torch.nan
    source = exported.write(tmp_path / "source", changed)
    directory = exported.export(tmp_path / "out", "modelopt", exported.plan("nvfp4"), changed)
    broken(directory, f"{ROUTER}.weight: differs", against=source)


def test_plain_zeros_of_either_sign_are_equal(tmp_path, weights):
    changed = {n: w.clone() for n, w in weights.items()}
    changed[f"{ROUTER}.weight"][0, 0] = 0.0
    directory = exported.export(tmp_path / "out", "modelopt", exported.plan("nvfp4"), changed)
    changed[f"{ROUTER}.weight"][0, 0] = -0.0
    assert verify(directory, exported.write(tmp_path / "source", changed)).problems == ()


@pytest.mark.parametrize("choice", ["fp8", "nvfp4", "int4", "int4_asym"])
def test_without_the_library(tmp_path, weights, source, choice, monkeypatch):
    quant = exported.plan(choice)
    directory = exported.export(tmp_path / "out", "compressed-tensors", quant, weights)
    exported.edit(directory, lambda t: t[f"{ROUTER}.weight"][0, 0].add_(1))
    compiled = verify(directory, source)
    monkeypatch.setenv("MEGATRON_QUANT_NATIVE", "0")
    library._library.cache_clear()
    try:
        in_torch = verify(directory, source)
    finally:
        library._library.cache_clear()
    assert compiled.problems == in_torch.problems != ()
    assert [(t.name, t.format) for t in compiled.tensors] == [
        (t.name, t.format) for t in in_torch.tensors
    ]
    for a, b in zip(compiled.tensors, in_torch.tensors, strict=True):
        assert a.error == (pytest.approx(b.error, rel=1e-12) if b.error else b.error)


@pytest.mark.parametrize(("dialect", "choice"), WRITTEN)
def test_parts_add_up(tmp_path, weights, source, dialect, choice, monkeypatch):
    """Whole blocks and cut ones: the errors are those of the weights at once."""
    quant = exported.written_plan(dialect, choice)
    directory = exported.export(tmp_path / "out", dialect, quant, weights)
    at_once = verify(directory, source)
    monkeypatch.setattr(logical_tensors, "_ELEMENTS", 1)
    monkeypatch.setattr(logical_tensors, "_ROWS", 32)
    in_parts = verify(directory, source)
    assert at_once.problems == in_parts.problems == ()
    for a, b in zip(at_once.tensors, in_parts.tensors, strict=True):
        assert a.error == (pytest.approx(b.error, rel=1e-12) if b.error else b.error)
