"""From the statistic of blocks to the scales that a format stores of them, and back to steps.

A rule maps ``stat_RBP`` (rows of B blocks, see ``block_stat``) to the format's scale fields, each
[R, B], and those to ``step_RB``, fp32: the value of one unit of an element. Every scale is finite
and positive for finite statistics, also of blocks that are all zero.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from megatron_quant.formats.numbers.absmax import true_div
from megatron_quant.formats.numbers.elements import E2M1_MAX, E4M3_MAX, E4M3_MIN, e4m3_values
from megatron_quant.native import WHOLE, Cuts, library

ScaleFields = tuple[Tensor, ...]
_E8M0_BIAS = 127
_BF16_MAX = torch.finfo(torch.bfloat16).max
_TINY = torch.finfo(torch.float32).tiny


class ScaleRule(Protocol):
    """How a format scales its blocks. ``dscale_R1``: the tensor's scale for each row."""

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Stored scales; ``dtype`` is that of the values."""

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """(step_RB, zero_RB): fp32; value = (element - zero) * step, no zero where None."""


class TensorScale:
    """No scale but the tensor's."""

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Nothing."""
        return ()

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tensor's scale."""
        return dscale_R1, None


class Fp8Scale:
    """amax / 448 in fp32; 1.0 for a block of zeros, and no less than 2^-126 / 448.

    As ModelOpt's ``TensorQuantizer.export_amax`` and ``get_scaling_factor``.
    """

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """-> (scale fp32,)."""
        amax_RB = stat_RBP[..., 0]
        amax_RB = amax_RB.clamp(min=_TINY).masked_fill_(amax_RB == 0, E4M3_MAX)
        return (true_div(amax_RB, E4M3_MAX),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale in fp32."""
        return fields[0].float(), None


@dataclass(frozen=True)
class IntScale:
    """amax / (half of the range), rounded to ``dtype``; 0 becomes the epsilon of that dtype.

    As compressed-tensors' ``calculate_qparams``: half the range of b bits is (2^b - 1) / 2.
    """

    half_range: float
    dtype: torch.dtype

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """-> (scale,)."""
        return (positive(true_div(stat_RBP[..., 0], self.half_range).to(self.dtype)),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale in fp32."""
        return fields[0].float(), None


def positive(scale: Tensor) -> Tensor:
    """``scale`` (overwritten) with its zeros replaced by the epsilon of its dtype."""
    return scale.masked_fill_(scale == 0, torch.finfo(scale.dtype).eps)


@dataclass(frozen=True)
class IntAsymScale:
    """scale = bf16((max - min) / 15), zero = clamp(round(-8 - min / scale), -8, 7) + 8.

    Of 4 bits; of others with 2^b - 1 for 15 and ``half`` = 2^(b-1) for 8.

    As compressed-tensors' ``calculate_qparams``, which keeps to the dtype of the values: every
    step is rounded to bf16 where those are bf16. The zero point follows from the scale before
    its last rounding; the scale is no more than bf16's largest. A block of zeros has zero point 8
    and bf16's epsilon as its scale.
    """

    half: int

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """-> (scale bf16, zero uint8)."""
        high, low = stat_RBP.to(grid_dtype(dtype)).unbind(-1)
        scale = true_div(high + low, 2.0 * self.half - 1)
        zero = (low / scale - self.half).clamp_(-self.half, self.half - 1)
        zero = zero.nan_to_num_(0.0).round_()
        scale = positive(scale.clamp(max=_BF16_MAX).to(torch.bfloat16))
        return scale, (zero + self.half).to(torch.uint8)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Elements count from -half, so the zero point does."""
        return fields[0].float(), fields[1].float().sub_(self.half)


def grid_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a quotient of values in ``dtype`` and a bf16 scale, by torch's promotion."""
    return torch.promote_types(dtype, torch.bfloat16)


class Nvfp4Scale:
    """e4m3(amax / (6 * dscale)), 0 becoming 1 and others clamped to [2^-9, 448].

    As ModelOpt's ``NVFP4QTensor.get_weights_scaling_factor``.
    """

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """-> (block_scale e4m3,)."""
        scale_RB = stat_RBP[..., 0] / (E2M1_MAX * dscale_R1)
        scale_RB = scale_RB.masked_fill_(scale_RB == 0, 1.0).clamp_(E4M3_MIN, E4M3_MAX)
        return (scale_RB.to(torch.float8_e4m3fn),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """block_scale * dscale."""
        scale_RB = fields[0]
        if library.reads(scale_RB):
            whole = Cuts.of(scale_RB.shape[1], WHOLE, 0)
            return library.decode(scale_RB, (dscale_R1, None), library.Code.E4M3, whole), None
        return e4m3_values(scale_RB).mul_(dscale_R1), None


@cache
def _e8m0_table(device: torch.device) -> Tensor:
    powers = [2.0 ** (code - _E8M0_BIAS) for code in range(255)]
    return torch.tensor([*powers, torch.nan], device=device)


def e8m0_values(codes: Tensor) -> Tensor:
    """E8M0 codes uint8 [...] -> 2^(code - 127) in fp32, NaN for 255."""
    table = _e8m0_table(codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


class Mxfp8Scale:
    """2^ceil(log2(amax / 448)) as E8M0; code 0 for a block of zeros.

    As ModelOpt's ``MXFP8QTensor``, but for the logarithm, which is exact here on every device:
    an fp32 amax less than 1e-6 above 448 * 2^n can differ.
    """

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """-> (scale uint8,)."""
        fraction, exponent = torch.frexp(true_div(stat_RBP[..., 0], E4M3_MAX))
        code = exponent - (fraction == 0.5).int() + _E8M0_BIAS
        return (code.masked_fill_(fraction == 0, 0).clamp_(0, 254).to(torch.uint8),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """The power of two."""
        return e8m0_values(fields[0]), None


class Mxfp4Scale:
    """2^(floor(log2(amax')) - 2) as E8M0, amax' = amax, next power of two from 1.75 * 2^n on.

    As compressed-tensors' ``generate_mx_scales``, but no more than 2^125, so that 6 units are
    finite (compressed-tensors writes NaN there). Code 0 for a block of zeros.
    """

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """-> (scale uint8,)."""
        bits = stat_RBP[..., 0].contiguous().view(torch.int32)
        code = ((bits + (1 << 21)) >> 23) - 2
        return (code.clamp_(0, _E8M0_BIAS + 125).to(torch.uint8),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """The power of two."""
        return e8m0_values(fields[0]), None
