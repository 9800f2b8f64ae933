"""The CPU room may be activated only in time, and changes nothing before."""

import subprocess
import sys
import types
from importlib import metadata

import pytest
import torch

from megatron_quant.cpu import activation as cpu
from megatron_quant.cpu import binary
from megatron_quant.errors import HostError

_IMPORT_ALONE = """
import sys, torch
cuda = dict(vars(torch.cuda))
import megatron_quant, megatron_quant.cpu
assert dict(vars(torch.cuda)) == cuda
assert not {"transformer_engine", "megatron", "modelopt"} & set(sys.modules)
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The room as in a process that imported nothing yet."""
    monkeypatch.setattr(cpu, "_active", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in cpu._EARLIER:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return monkeypatch


def test_importing_changes_nothing() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", _IMPORT_ALONE], check=True)


def test_a_host_with_cuda_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(HostError, match="on a host with CUDA: leave it out"):
        cpu.activate()


@pytest.mark.parametrize("name", ["transformer_engine", "megatron.core", "modelopt.torch"])
def test_a_library_that_was_imported_before_is_refused(
    fresh: pytest.MonkeyPatch, name: str
) -> None:
    fresh.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(HostError, match=f"activate first, then import {name}"):
        cpu.activate()


def test_a_missing_library_is_named_with_its_requirement(fresh: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    fresh.setattr(metadata, "version", missing)
    with pytest.raises(HostError, match=r"pip install transformer-engine==2\.20\.2"):
        cpu.activate()


def test_what_transformer_engine_cannot_import_is_named(fresh: pytest.MonkeyPatch) -> None:
    def import_common(paths: list[str]) -> types.ModuleType:
        raise ModuleNotFoundError("No module named 'einops'")

    fresh.setitem(sys.modules, binary._STAND_IN, types.ModuleType(binary._STAND_IN))
    fresh.setattr(binary, "_import_common", import_common)
    with pytest.raises(HostError, match=r"No module named 'einops'\): pip install megatron-quant"):
        cpu.activate()


@pytest.mark.parametrize(
    ("te", "core", "warning"),
    [
        ("2.9.0", "0.16.1", "tested with Transformer Engine 2.10.0 to 2.20.2, not 2.9.0"),
        ("2.21.0", "0.16.1", "tested with Transformer Engine 2.10.0 to 2.20.2, not 2.21.0"),
        ("2.20.2", "0.15.0", "tested with Megatron-Core 0.16.1 to 0.19.2, not 0.15.0"),
        ("2.20.2", "0.20.0rc1", "tested with Megatron-Core 0.16.1 to 0.19.2, not 0.20.0rc1"),
    ],
)
def test_an_untested_version_warns(
    fresh: pytest.MonkeyPatch, te: str, core: str, warning: str
) -> None:
    versions = {"transformer_engine": te, "megatron-core": core}
    fresh.setattr(metadata, "version", versions.__getitem__)
    with pytest.warns(UserWarning, match=warning):
        cpu._check_versions()
