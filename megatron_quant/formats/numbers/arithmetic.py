"""The arithmetic of each format over rows: a scale rule, a division and an element each.

Every number of the result depends on one value and the scales of its block alone. So no bit
changes when rows are cut anywhere, or columns between packed elements, once scales are known.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from megatron_quant.formats.backends import loops_for
from megatron_quant.formats.numbers.elements import E2M1, E4M3, INT4, INT8, INT8_WORDS, Element
from megatron_quant.formats.numbers.scales import (
    Fp8Scale,
    IntAsymScale,
    IntScale,
    IntSignedScale,
    Mxfp4Scale,
    Mxfp8Scale,
    Nvfp4Scale,
    ScaleFields,
    ScaleRule,
    TensorScale,
)
from megatron_quant.formats.record import Arithmetic, Format
from megatron_quant.native import CElement as Loop
from megatron_quant.native import Cuts, library


def exact(x: Tensor, step: Tensor) -> Tensor:
    """Return x / step in fp32, like ModelOpt, and like compressed-tensors for fp32 scales."""
    # A product of scales that is 0 in fp32 decodes the block to 0: any divisor will do.
    return x.to(torch.float32, copy=True).div_(step.masked_fill(step == 0, 1.0))


def in_dtype(x: Tensor, step: Tensor) -> Tensor:
    """Return x / step rounded to the dtype of x, as ModelOpt does for a 0-dim scale."""
    return exact(x, step).to(x.dtype)


def by_bf16(x: Tensor, step: Tensor) -> Tensor:
    """Divide by steps that are bf16 numbers: in bf16 for bf16 values, else in fp32.

    compressed-tensors does this on a CPU; its Triton kernel for CUDA divides in fp32.
    """
    return x / step.to(torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """The computation of a format on rows [R, K], whose columns lie in blocks as ``columns`` says.

    Attributes:
        scale: Rule of the scales.
        quotient: Division of values by steps.
        element: Rounding and packing.
        loop: The compiled loop that does all of it; None where there is none.
    """

    scale: ScaleRule
    quotient: Callable[[Tensor, Tensor], Tensor]
    element: Element
    loop: Loop | None

    def elements(
        self, x_RK: Tensor, scales: ScaleFields, dscale_R1: Tensor, columns: Cuts
    ) -> Tensor:
        """Return the stored elements of the rows, given the scale fields of their blocks."""
        steps = step_RB, zero_RB = self.scale.steps(scales, dscale_R1)
        if isinstance(self.scale, IntSignedScale):  # loops take no step below 0
            x_RK = _turned(x_RK, step_RB, columns)
            steps = step_RB, zero_RB = step_RB.abs(), zero_RB
        loops = loops_for(x_RK)
        if self.loop is not None and loops is not None:
            return loops.encode(x_RK, steps, self.loop, columns)
        quotient = self.quotient(columns.split(x_RK), step_RB.unsqueeze(-1))
        if zero_RB is not None:
            quotient += zero_RB.unsqueeze(-1)
        return self.element.store(columns.join(quotient))

    def requantized(
        self, x_RK: Tensor, scales: ScaleFields, dscale_R1: Tensor, columns: Cuts
    ) -> Tensor:
        """Return ``values`` of ``elements``, fp32 or rounded to the dtype of ``x_RK``."""
        loops = loops_for(x_RK)
        if self.loop is not None and loops is not None:
            steps = step_RB, zero_RB = self.scale.steps(scales, dscale_R1)
            if isinstance(self.scale, IntSignedScale):
                turned = _turned(x_RK, step_RB, columns)
                values = loops.fake_quant(turned, (step_RB.abs(), zero_RB), self.loop, columns)
                return _turned(values, step_RB, columns)
            return loops.fake_quant(x_RK, steps, self.loop, columns)
        stored = self.elements(x_RK, scales, dscale_R1, columns)
        return self.values(stored, scales, dscale_R1, columns)

    def values(
        self, stored: Tensor, scales: ScaleFields, dscale_R1: Tensor, columns: Cuts
    ) -> Tensor:
        """Decode stored elements to fp32 [R, K]."""
        steps = step_RB, zero_RB = self.scale.steps(scales, dscale_R1)
        if library.reads(stored):
            return library.decode(stored, steps, self.element.code, columns)
        values = columns.split(self.element.load(stored))
        if zero_RB is not None:
            values -= zero_RB.unsqueeze(-1)
        return columns.join(values.mul_(step_RB.unsqueeze(-1)))

    def lost(
        self, x_RK: Tensor, stored: Tensor, scales: ScaleFields, dscale_R1: Tensor, columns: Cuts
    ) -> tuple[float, float]:
        """Return ``squares`` of bf16 or fp32 rows and of elements that ``library.reads``."""
        steps = self.scale.steps(scales, dscale_R1)
        return library.lost(x_RK, stored, steps, self.element.code, columns)


def _turned(x_RK: Tensor, step_RB: Tensor, columns: Cuts) -> Tensor:
    """Negate the values of blocks with a step below 0: their codes by the opposite step are equal.

    Return a new tensor in the dtype of ``x_RK``.
    """
    sign_RB = torch.where(step_RB < 0, -1.0, 1.0).to(x_RK.dtype)
    return columns.join(columns.split(x_RK) * sign_RB.unsqueeze(-1))


_WIDENED = 1 << 15
"""Elements that are fp64 at a time: so few that the heap need not grow and shrink."""


def squares(x_RK: Tensor, values_RK: Tensor) -> tuple[float, float]:
    """Return (sum of x^2, sum of (x - value)^2) in fp64, with differences in fp32."""
    return _square(x_RK), _square(x_RK - values_RK)


def _square(x_RK: Tensor) -> float:
    parts = (part.double() for part in x_RK.reshape(-1).split(_WIDENED))
    return sum(torch.dot(part, part).item() for part in parts)


_BF16 = torch.bfloat16
_SCALES: dict[str, ScaleRule] = {
    "tensor": TensorScale(),
    "fp8": Fp8Scale(),
    "int8_fp32": IntScale(127.5, torch.float32),
    "int8_bf16": IntScale(127.5, _BF16),
    "int8_zero": IntAsymScale(128),
    "int4_bf16": IntScale(7.5, _BF16),
    "int4_zero": IntAsymScale(8),
    "int4_signed": IntSignedScale(8),
    "nvfp4": Nvfp4Scale(),
    "mxfp8": Mxfp8Scale(),
    "mxfp4": Mxfp4Scale(),
}
_QUOTIENTS = {"in_dtype": in_dtype, "exact": exact, "by_bf16": by_bf16}
_ELEMENTS = {"e4m3": E4M3, "int8": INT8, "e2m1": E2M1, "int4": INT4, "int8_words": INT8_WORDS}


@cache
def _kernel(arithmetic: Arithmetic) -> Kernel:
    return Kernel(
        scale=_SCALES[arithmetic.scale],
        quotient=_QUOTIENTS[arithmetic.divide],
        element=_ELEMENTS[arithmetic.element],
        loop=Loop[arithmetic.loop] if arithmetic.loop else None,
    )


def kernel_of(fmt: Format) -> Kernel:
    """Return the kernel of a format."""
    kernel = _kernel(fmt.arithmetic)
    if kernel.quotient is by_bf16 and fmt.fields[1].dtype in (torch.float16, torch.float32):
        return replace(kernel, quotient=exact, loop=None)  # bf16 does not hold its steps
    return kernel
