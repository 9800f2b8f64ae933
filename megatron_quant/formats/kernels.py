"""The arithmetic of each format, over rows.

A kernel encodes ``x_RK`` (rows of K values, contiguous, bf16, fp16 or fp32) into the format's
fields without the tensor's scale, and decodes those to fp32 [R, K]. ``dscale_R1`` is the tensor's
scale for each row, fp32, ignored by formats without one. No row looks at another, so cutting rows
anywhere, or columns between groups, changes no bit.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_quant.formats.amax import last_dim_amax, true_div
from megatron_quant.formats.elements import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_MIN,
    INT4_VALUES,
    e2m1_codes,
    e4m3,
    e4m3_values,
    int4_codes,
)
from megatron_quant.formats.pack import nibble_values, pack_nibbles
from megatron_quant.formats.spec import Format

_INT4_RANGE = 7.5  # half of the 15 steps between -8 and 7, as compressed-tensors has it
_INT4_ZERO_SCALE = torch.finfo(torch.bfloat16).eps


class Kernel(Protocol):
    """What a format does to rows."""

    def encode(self, x_RK: Tensor, dscale_R1: Tensor) -> tuple[Tensor, ...]:
        """Fields of the rows, in the format's order."""

    def decode(self, fields: tuple[Tensor, ...], dscale_R1: Tensor) -> Tensor:
        """fp32 [R, K]."""


class Fp8:
    """elements = e4m3(x / dscale).

    The quotient is rounded to x's own dtype before the cast: ModelOpt divides a bf16 weight by a
    0-dim scale (``to_quantized_weight``), which torch does in bf16, and 2% of the codes show it.
    """

    def encode(self, x_RK: Tensor, dscale_R1: Tensor) -> tuple[Tensor, ...]:
        """-> (elements e4m3 [R, K],)."""
        quotient = x_RK.to(torch.float32, copy=True).div_(dscale_R1)
        return (e4m3(quotient, through=x_RK.dtype),)

    def decode(self, fields: tuple[Tensor, ...], dscale_R1: Tensor) -> Tensor:
        """Elements * dscale."""
        return e4m3_values(fields[0]).mul_(dscale_R1)


class Nvfp4:
    """block_scale = e4m3(amax_block / (6 * dscale)), code = e2m1(x / (block_scale * dscale)).

    As ModelOpt's ``NVFP4QTensor.quantize``: a block scale of 0 becomes 1, others are clamped to
    [2^-9, 448].
    """

    def encode(self, x_RK: Tensor, dscale_R1: Tensor) -> tuple[Tensor, ...]:
        """-> (elements uint8 [R, K/2], block_scale e4m3 [R, K/16])."""
        rows, cols = x_RK.shape
        x_RBb = x_RK.view(rows, cols // 16, 16)
        scale_RB = last_dim_amax(x_RBb).float() / (E2M1_MAX * dscale_R1)
        scale_RB = scale_RB.masked_fill_(scale_RB == 0, 1.0).clamp_(E4M3_MIN, E4M3_MAX)
        block_scale = scale_RB.to(torch.float8_e4m3fn)
        step_RB = e4m3_values(block_scale).mul_(dscale_R1)
        # Where the product is too small for fp32 the block decodes to 0: any divisor but 0 will do.
        step_RB.masked_fill_(step_RB == 0, 1.0)
        codes = e2m1_codes(x_RBb.to(torch.float32, copy=True).div_(step_RB.unsqueeze(-1)))
        return pack_nibbles(codes.view(rows, cols)), block_scale

    def decode(self, fields: tuple[Tensor, ...], dscale_R1: Tensor) -> Tensor:
        """e2m1 * (block_scale * dscale)."""
        packed, block_scale = fields
        step_RB = e4m3_values(block_scale).mul_(dscale_R1)
        values = nibble_values(packed, E2M1_VALUES)
        return values.view(*step_RB.shape, 16).mul_(step_RB.unsqueeze(-1)).view(values.shape)


def _grouped(x_RK: Tensor, size: int) -> Tensor:
    """[R, K] -> [R, ceil(K / size), size], the last group filled up with zeros."""
    missing = -x_RK.shape[1] % size
    if missing:
        x_RK = torch.nn.functional.pad(x_RK, (0, missing))
    return x_RK.view(x_RK.shape[0], -(-x_RK.shape[1] // size), size)


@dataclass(frozen=True)
class Int4:
    """scale = bf16(amax_group / 7.5), code = clamp(round(x / scale), -8, 7) + 8.

    As compressed-tensors: the quotient of a bf16 weight is itself rounded to bf16, and a scale of
    0 becomes bf16's epsilon.
    """

    group_size: int

    def encode(self, x_RK: Tensor, dscale_R1: Tensor) -> tuple[Tensor, ...]:
        """-> (elements int32 [R, K/8], scale bf16 [R, ceil(K / group)])."""
        cols = x_RK.shape[1]
        x_RGg = _grouped(x_RK, self.group_size)
        scale_RG = true_div(last_dim_amax(x_RGg).float(), _INT4_RANGE).to(torch.bfloat16)
        scale_RG.masked_fill_(scale_RG == 0, _INT4_ZERO_SCALE)
        codes = int4_codes((x_RGg / scale_RG.unsqueeze(-1)).float())
        packed = pack_nibbles(codes.flatten(1))[:, : cols // 2]
        return packed.contiguous().view(torch.int32), scale_RG

    def decode(self, fields: tuple[Tensor, ...], dscale_R1: Tensor) -> Tensor:
        """(code - 8) * scale."""
        words, scale_RG = fields
        values = nibble_values(words.view(torch.uint8), INT4_VALUES)
        x_RGg = _grouped(values, self.group_size).mul_(scale_RG.float().unsqueeze(-1))
        return x_RGg.flatten(1)[:, : values.shape[1]]


def kernel_of(fmt: Format) -> Kernel:
    """The kernel of a format."""
    if fmt.name == "fp8":
        return Fp8()
    if fmt.name == "nvfp4":
        return Nvfp4()
    assert fmt.name == "int4", fmt
    return Int4(fmt.group_size)
