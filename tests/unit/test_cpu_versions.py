"""The CPU room's differences between versions, and the refusals of its plugin."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from megatron_quant.cpu import binary, plugin, versions
from megatron_quant.errors import HostError


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.20.2", (2, 20, 2)), ("2.8.0a0+nv25.8", (2, 8)), ("0.20.0rc1", (0, 20))],
)
def test_numbers_of_a_version(version: str, numbers: tuple[int, ...]) -> None:
    assert versions.numbers(version) == numbers


def test_members_are_there_until_they_were_removed() -> None:
    formats, backends = "Float8BlockScaleTensorFormat", "NVTE_Fused_Attn_Backend"
    for version, enums in (
        ("2.11.0", {formats, backends}),
        ("2.12.0", {backends}),
        ("2.15.0", {backends}),
        ("2.16.0", set()),
    ):
        assert versions.removed_members(version).keys() == enums, version
        assert hasattr(binary._stand_in(version), backends)
        has = hasattr(getattr(binary._stand_in(version), backends), "NVTE_F16_max512_seqlen")
        assert has == (backends in enums)


def test_answers_have_the_shape_of_their_version() -> None:
    assert versions.fused_attention_answer("2.19.0", -1) == -1
    assert versions.fused_attention_answer("2.20.0", -1)[0] == -1
    assert versions.context_managers("2.11.0") == {"TransformerEngineBaseModule.prepare_forward"}
    assert versions.context_managers("2.12.0") == set()


def test_the_plugin_needs_the_hook() -> None:
    with pytest.raises(HostError, match=r"NVTE_PLUGIN needs Transformer Engine 2\.20, this"):
        plugin.load("2.19.0")


def test_a_plugin_that_was_dropped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(plugin, "REPLACED", {})
    with pytest.raises(HostError, match=r"dropped the plugin megatron_quant\.cpu\.plugin"):
        plugin.load("2.20.2")


def test_the_plugin_refuses_a_host_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(HostError, match="on a host with CUDA: unset it"):
        plugin.load_plugins()


@pytest.mark.skipif(plugin.wanted(), reason="this Transformer Engine is compiled")
def test_the_plugin_needs_a_compiled_transformer_engine() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "from megatron_quant import cpu; cpu.activate()"],
        env={**os.environ, plugin.VARIABLE: plugin.NAME},
        capture_output=True,
        text=True,
    )
    assert "HostError: NVTE_PLUGIN=megatron_quant.cpu.plugin needs a compiled" in result.stderr
