"""The inner loops of the codecs on CUDA: those of native/library.py, in Triton.

Every function gives the bits of the torch code that it replaces, and takes and returns what its
namesake in native/library.py does. Triton comes with torch's CUDA builds. Without it, or with
``MEGATRON_QUANT_NATIVE=0`` in the environment, the codecs run in torch alone.
"""

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_quant.native import STORED, CElement, Cuts, Steps, in_byte

_TILE = 2048
"""Elements that a program does: 16 a thread at four warps, two loads of 16 bytes."""
_COLUMNS = 1024


def available() -> bool:
    """Return whether the functions below can run: a GPU that torch uses, and Triton."""
    return (
        os.environ.get("MEGATRON_QUANT_NATIVE") != "0"
        and torch.cuda.is_available()
        and _has_triton()
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _kernels() -> ModuleType:
    """Import the kernels at their first use: Triton takes a second to import."""
    return import_module("megatron_quant.formats.backends.triton_kernels")


def block_amax(x_RK: Tensor, block: int, first: int = 0) -> Tensor:
    """Return max |x| of each block as fp32 [R, B]; NaN and Inf propagate."""
    blocks = _Blocks.of(x_RK, block, first)
    out_RB = x_RK.new_empty(x_RK.shape[0], blocks.per_row, dtype=torch.float32)
    blocks.launch(_kernels().amax_kernel, 1, x_RK, out_RB)
    return out_RB


def block_ends(x_RK: Tensor, block: int, first: int = 0) -> Tensor:
    """Return (max(x, 0), max(-x, 0)) of each block as fp32 [R, B, 2]. A NaN reaches one or both."""
    blocks = _Blocks.of(x_RK, block, first)
    out_RB2 = x_RK.new_empty(x_RK.shape[0], blocks.per_row, 2, dtype=torch.float32)
    blocks.launch(_kernels().ends_kernel, 1, x_RK, out_RB2)
    return out_RB2


def encode(x_RK: Tensor, steps: Steps, element: CElement, columns: Cuts) -> Tensor:
    """Return x / step (+ zero) as stored elements [R, K / packed]."""
    packed = in_byte(element)
    out = x_RK.new_empty(x_RK.shape[0], x_RK.shape[1] // packed, dtype=torch.uint8)
    blocks = _Blocks.of(x_RK, columns.block, columns.first)
    scales = _scales(*steps)
    constants = {"stride": steps[0].stride(0), "ELEMENT": int(element), "PACKED": packed}
    blocks.launch(_kernels().encode_kernel, blocks.shares, x_RK, *scales, out, **constants)
    return out.view(STORED[element])


def fake_quant(x_RK: Tensor, steps: Steps, element: CElement, columns: Cuts) -> Tensor:
    """Return the values that ``encode`` stores, (element - zero) * step, as bf16 [R, K]."""
    out_RK = torch.empty_like(x_RK)
    blocks = _Blocks.of(x_RK, columns.block, columns.first)
    scales = _scales(*steps)
    constants = {"stride": steps[0].stride(0), "ELEMENT": int(element)}
    blocks.launch(_kernels().fake_quant_kernel, blocks.shares, x_RK, *scales, out_RK, **constants)
    return out_RK


def nvfp4_encode(x_RK: Tensor, dscale_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Encode values by their tensors' scales: uint8 [R, K/2], and block scales e4m3 [R, K/16]."""
    rows, cols = x_RK.shape
    out, scale = (x_RK.new_empty(rows, cols // n, dtype=torch.uint8) for n in (2, 16))
    kernel, stride = _kernels().nvfp4_encode_kernel, dscale_R1.stride(0)
    _Blocks.of(x_RK, 16, 0).launch(kernel, 1, x_RK, dscale_R1, scale, out, stride=stride)
    return out, scale.view(torch.float8_e4m3fn)


def nvfp4_fake_quant(x_RK: Tensor, dscale_R1: Tensor) -> Tensor:
    """Return the values that ``nvfp4_encode`` stores, bf16 [R, K]."""
    out_RK = torch.empty_like(x_RK)
    kernel, stride = _kernels().nvfp4_fake_quant_kernel, dscale_R1.stride(0)
    _Blocks.of(x_RK, 16, 0).launch(kernel, 1, x_RK, dscale_R1, out_RK, stride=stride)
    return out_RK


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """The blocks of contiguous rows: ``per_row`` in a row of ``cols``, ``total`` in all."""

    cols: int
    block: int
    first: int
    per_row: int
    total: int

    @classmethod
    def of(cls, x_RK: Tensor, block: int, first: int) -> "_Blocks":
        assert x_RK.is_contiguous() and 0 <= first < block, (x_RK.stride(), block, first)
        rows, cols = x_RK.shape
        per_row = -(-(first + cols) // block)
        total = rows * per_row
        return cls(cols=cols, block=block, first=first, per_row=per_row, total=total)

    @property
    def tile(self) -> tuple[int, int]:
        """Return the blocks of a program and the columns of each, both powers of two."""
        columns = min(1 << (self.block - 1).bit_length(), _COLUMNS)
        return max(_TILE // columns, 1), columns

    @property
    def shares(self) -> int:
        """Count the programs that share one block; each does as many columns as its tile has."""
        return -(-self.block // self.tile[1])

    def launch(self, kernel: Any, shares: int, *tensors: Tensor, **constants: int) -> None:
        """Run ``kernel`` over all blocks; pass bf16 tensors as their bits."""
        bits = [t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in tensors]
        numbers = (self.cols, self.block, self.first, self.per_row, self.total)
        blocks, columns = self.tile
        grid = (-(-self.total // blocks), shares)
        # The tensors' device need not be the current one.
        with torch.cuda.device_of(bits[0]):
            kernel[grid](*bits, *numbers, **constants, T=blocks, C=columns, enable_fp_fusion=False)


def _scales(step_RB: Tensor, zero_RB: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return step and zero point; the step again where there is no zero, which kernels skip."""
    assert step_RB.dtype == torch.float32 and (step_RB.shape[1] < 2 or step_RB.stride(1) == 1)
    assert zero_RB is None or zero_RB.stride() == step_RB.stride()
    return step_RB, step_RB if zero_RB is None else zero_RB
