"""The loops for CUDA, as far as a host without a GPU can tell: results, and machine code.

tests/gpu compares them with the CPU where there is a GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_quant.formats.backends import gpu
from megatron_quant.formats.backends.choose import loops_for
from megatron_quant.native.elements import CElement

triton = pytest.importorskip("triton", reason="no Triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_quant.formats.backends import triton_kernels as kernels  # noqa: E402

ARITHMETIC = "div|add|sub|mul|fma|mad|rcp|sqrt|ex2|cvt|min|max"
BITS, FP32, BYTES = "*i16", "*fp32", "*u8"


def test_bits_in_the_interpreter() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.interpreted_loops"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert int(re.match(r"0 wrong of (\d+)", done.stdout)[1]) > 200


ENCODE = {"x": BITS, "step": FP32, "zero": FP32, "out": BYTES}
FAKE_QUANT = ENCODE | {"out": BITS}
NVFP4 = {"x": BITS, "dscale": FP32, "scale": BYTES, "out": BYTES}
NVFP4_FAKE = {"x": BITS, "dscale": FP32, "out": BITS}
STATISTIC = {"x": BITS, "out": FP32}
FP8 = {"ELEMENT": int(CElement.E4M3_BY_BF16), "PACKED": 1}
INT4 = {"ELEMENT": int(CElement.INT4_ZERO_BY_BF16), "PACKED": 2}
# Kernel, its tensors, its constants, and columns of a block.
LAUNCHES = {
    "fp8": (kernels.encode_kernel, ENCODE, FP8, 1024),
    "int4": (kernels.encode_kernel, ENCODE, INT4, 32),
    "fake mxfp4": (kernels.fake_quant_kernel, FAKE_QUANT, {"ELEMENT": int(CElement.E2M1)}, 32),
    "fake int8": (kernels.fake_quant_kernel, FAKE_QUANT, {"ELEMENT": int(CElement.INT8)}, 1024),
    "nvfp4": (kernels.nvfp4_encode_kernel, NVFP4, {}, 16),
    "fake nvfp4": (kernels.nvfp4_fake_quant_kernel, NVFP4_FAKE, {}, 16),
    "amax": (kernels.amax_kernel, STATISTIC, {}, 1024),
    "ends": (kernels.ends_kernel, STATISTIC, {}, 32),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_machine_code_rounds_as_the_cpu(name: str) -> None:
    """Compiled for an H100: no approximation, no contraction, no flushing, wide loads."""
    kernel, pointers, constants, columns = LAUNCHES[name]
    tiles = constants | {"T": gpu._TILE // columns, "C": columns}
    found = compiled(kernel, pointers, tiles)
    assert len(found.asm["cubin"]) > 0
    floats = set(re.findall(rf"\b(?:{ARITHMETIC})\.[\w.]*f32\b", found.asm["ptx"]))
    assert floats <= {"div.rn.f32", "add.rn.f32", "sub.rn.f32", "mul.rn.f32"}, floats
    assert ("div.rn.f32" in floats) == (name not in ("amax", "ends"))
    assert "ld.global.v4.b32" in found.asm["ptx"]


def compiled(kernel, pointers, constants):  # type: ignore[no-untyped-def]
    """As a launch with sizes that 16 divides compiles it."""
    names = list(kernel.arg_names)
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = [i for i, n in enumerate(names) if n not in constants and n != "per_row"]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_other_devices_and_values_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loops_for(torch.empty(4, 16, dtype=torch.bfloat16, device="meta")) is None
    monkeypatch.setenv("MEGATRON_QUANT_NATIVE", "0")
    assert not gpu.available()
