"""Choose the compiled loops of a tensor: those in C on a CPU, those in Triton on CUDA, or none."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_quant.formats.backends import gpu
from megatron_quant.native import CElement, Cuts, Steps, library


class Loops(Protocol):
    """The functions of native/library.py and gpu.py. The former says what each one does."""

    def block_amax(self, x_RK: Tensor, block: int, first: int = 0) -> Tensor: ...  # noqa: D102

    def block_ends(self, x_RK: Tensor, block: int, first: int = 0) -> Tensor: ...  # noqa: D102

    def encode(self, x_RK: Tensor, steps: Steps, element: CElement, columns: Cuts) -> Tensor: ...  # noqa: D102

    def fake_quant(  # noqa: D102
        self, x_RK: Tensor, steps: Steps, element: CElement, columns: Cuts
    ) -> Tensor: ...

    def nvfp4_encode(self, x_RK: Tensor, dscale_R1: Tensor) -> tuple[Tensor, Tensor]: ...  # noqa: D102

    def nvfp4_fake_quant(self, x_RK: Tensor, dscale_R1: Tensor) -> Tensor: ...  # noqa: D102


def loops_for(x: Tensor) -> Loops | None:
    """Return the loops that take ``x``: bf16, not empty, on a device that has some; else None."""
    if x.dtype != torch.bfloat16 or x.numel() == 0:
        return None
    if x.device.type == "cpu":
        return library if library.available() else None
    if x.device.type == "cuda":
        return gpu if gpu.available() else None
    return None
