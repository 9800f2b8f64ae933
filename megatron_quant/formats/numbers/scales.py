"""Turn the statistic of blocks into the scales that a format stores, and those into steps.

A rule maps ``stat_RBP`` (rows of B blocks, see ``block_stat``) to the format's scale fields, each
[R, B]. It maps those to ``step_RB``, fp32: the value of one unit of an element. Finite statistics
give finite scales, also for blocks that are all zero; all are positive but ``IntSignedScale``'s.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from megatron_quant.formats.numbers.absmax import true_div
from megatron_quant.formats.numbers.elements import E2M1_MAX, E4M3_MAX, E4M3_MIN, e4m3_values
from megatron_quant.native import WHOLE, Code, Cuts, library

ScaleFields = tuple[Tensor, ...]
_E8M0_BIAS = 127
_BF16_MAX = torch.finfo(torch.bfloat16).max
_TINY = torch.finfo(torch.float32).tiny


class ScaleRule(Protocol):
    """How a format scales its blocks. ``dscale_R1``: the tensor's scale for each row."""

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Return the stored scales; ``dtype`` is that of the values."""

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (step_RB, zero_RB), fp32: value = (element - zero) * step, no zero where None."""


class TensorScale:
    """The rule of a format whose only scale is the tensor's."""

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Return no field."""
        return ()

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the tensor's scale."""
        return dscale_R1, None


class Fp8Scale:
    """amax / 448 in fp32; 1.0 for a block of zeros, and no less than 2^-126 / 448.

    It agrees with ModelOpt's ``TensorQuantizer.export_amax`` and ``get_scaling_factor``.
    """

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Return (scale fp32,)."""
        amax_RB = stat_RBP[..., 0]
        amax_RB = amax_RB.clamp(min=_TINY).masked_fill_(amax_RB == 0, E4M3_MAX)
        return (true_div(amax_RB, E4M3_MAX),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scale in fp32."""
        return fields[0].float(), None


@dataclass(frozen=True)
class IntScale:
    """amax / (half of the range), rounded to ``dtype``; 0 becomes the epsilon of that dtype.

    It agrees with compressed-tensors' ``calculate_qparams``: b bits have half the range
    (2^b - 1) / 2.
    """

    half_range: float
    dtype: torch.dtype

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Return (scale,)."""
        return (positive(true_div(stat_RBP[..., 0], self.half_range).to(self.dtype)),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scale in fp32."""
        return fields[0].float(), None


@dataclass(frozen=True)
class IntSignedScale:
    """amax / ``half`` as bf16, below 0 where a block's largest magnitude is a positive value's.

    So that value takes the code -``half``, and is not cut at ``half`` - 1. Where both ends are
    as large, the scale is positive. A block of zeros has bf16's epsilon. AutoRound's
    ``quant_tensor_sym`` does this too, but for blocks with two such ends.
    """

    half: int

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Return (scale bf16,)."""
        high, low = stat_RBP.unbind(-1)
        amax = torch.maximum(high, low)
        scale = positive(true_div(amax, float(self.half)).to(torch.bfloat16))
        return (torch.where(high > low, -scale, scale),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scale in fp32."""
        return fields[0].float(), None


def positive(scale: Tensor) -> Tensor:
    """Replace the zeros of ``scale`` (overwritten) by the epsilon of its dtype."""
    return scale.masked_fill_(scale == 0, torch.finfo(scale.dtype).eps)


@dataclass(frozen=True)
class IntAsymScale:
    """scale = bf16((max - min) / 15), zero = clamp(round(-8 - min / scale), -8, 7) + 8.

    These are the numbers of 4 bits. Other widths have 2^b - 1 for 15 and ``half`` = 2^(b-1) for 8.

    It agrees with compressed-tensors' ``calculate_qparams``, which keeps to the dtype of the
    values: every step is rounded to bf16 where those are bf16. The zero point follows from the
    scale before its last rounding. The scale is no more than bf16's largest. A block of zeros has
    zero point 8 and bf16's epsilon as its scale.
    """

    half: int

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Return (scale bf16, zero uint8)."""
        high, low = stat_RBP.to(grid_dtype(dtype)).unbind(-1)
        scale = true_div(high + low, 2.0 * self.half - 1)
        zero = (low / scale - self.half).clamp_(-self.half, self.half - 1)
        zero = zero.nan_to_num_(0.0).round_()
        scale = positive(scale.clamp(max=_BF16_MAX).to(torch.bfloat16))
        return scale, (zero + self.half).to(torch.uint8)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point, both counted from -half like the elements."""
        return fields[0].float(), fields[1].float().sub_(self.half)


def grid_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return torch's promoted dtype of values in ``dtype`` divided by a bf16 scale."""
    return torch.promote_types(dtype, torch.bfloat16)


class Nvfp4Scale:
    """e4m3(amax / (6 * dscale)), 0 becoming 1 and others clamped to [2^-9, 448].

    It agrees with ModelOpt's ``NVFP4QTensor.get_weights_scaling_factor``.
    """

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Return (block_scale e4m3,)."""
        scale_RB = stat_RBP[..., 0] / (E2M1_MAX * dscale_R1)
        scale_RB = scale_RB.masked_fill_(scale_RB == 0, 1.0).clamp_(E4M3_MIN, E4M3_MAX)
        return (scale_RB.to(torch.float8_e4m3fn),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return block_scale * dscale."""
        scale_RB = fields[0]
        if library.reads(scale_RB):
            whole = Cuts.of(scale_RB.shape[1], WHOLE, 0)
            return library.decode(scale_RB, (dscale_R1, None), Code.E4M3, whole), None
        return e4m3_values(scale_RB).mul_(dscale_R1), None


@cache
def _e8m0_table(device: torch.device) -> Tensor:
    powers = [2.0 ** (code - _E8M0_BIAS) for code in range(255)]
    return torch.tensor([*powers, torch.nan], device=device)


def e8m0_values(codes: Tensor) -> Tensor:
    """Return 2^(code - 127) in fp32 for E8M0 codes uint8 [...]; NaN for 255."""
    table = _e8m0_table(codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


class Mxfp8Scale:
    """2^ceil(log2(amax / 448)) as E8M0; code 0 for a block of zeros.

    It agrees with ModelOpt's ``MXFP8QTensor`` but for the logarithm, which is exact here on every
    device: an fp32 amax less than 1e-6 above 448 * 2^n can differ.
    """

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Return (scale uint8,)."""
        fraction, exponent = torch.frexp(true_div(stat_RBP[..., 0], E4M3_MAX))
        code = exponent - (fraction == 0.5).int() + _E8M0_BIAS
        return (code.masked_fill_(fraction == 0, 0).clamp_(0, 254).to(torch.uint8),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the power of two."""
        return e8m0_values(fields[0]), None


class Mxfp4Scale:
    """2^(floor(log2(amax')) - 2) as E8M0, where amax' is amax, rounded up from 1.75 * 2^n on.

    It agrees with compressed-tensors' ``generate_mx_scales``, but goes no higher than 2^125, so
    that 6 units are finite (compressed-tensors writes NaN there). Code 0 for a block of zeros.
    """

    def fields(self, stat_RBP: Tensor, dscale_R1: Tensor, dtype: torch.dtype) -> ScaleFields:
        """Return (scale uint8,)."""
        bits = stat_RBP[..., 0].contiguous().view(torch.int32)
        code = ((bits + (1 << 21)) >> 23) - 2
        return (code.clamp_(0, _E8M0_BIAS + 125).to(torch.uint8),)

    def steps(self, fields: ScaleFields, dscale_R1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the power of two."""
        return e8m0_values(fields[0]), None
