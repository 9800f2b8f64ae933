"""Largest magnitudes, and the scale of a whole tensor that follows from one."""

from math import gcd

import torch
from torch import Tensor

from megatron_quant.errors import FormatError
from megatron_quant.formats.backends import loops_for
from megatron_quant.formats.blocks import as_rows, chunks_to_read
from megatron_quant.formats.spec import Format

_BITS = {
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFFFFFF),
}
_MANY = 1 << 16
"""Elements from which on the C loops gain more than their call costs."""
_SHARES = 64
"""Rows into which a flat tensor is cut, for threads to share."""
_SMALLEST = torch.finfo(torch.float32).tiny


def check_dtype(x: Tensor) -> None:
    """Raise FormatError unless ``x`` is bf16, fp16 or fp32."""
    if x.dtype not in _BITS:
        raise FormatError(
            f"cannot quantize {x.dtype} values; cast them to bfloat16, float16 or float32 first"
        )


def true_div(x: Tensor, divisor: float) -> Tensor:
    """Return ``x / divisor`` rounded once, on every device.

    For a plain number, CUDA multiplies with its rounded inverse and is an ulp off at times.
    """
    return x / torch.full_like(x, divisor)


@torch.no_grad()
def amax(x: Tensor) -> Tensor:
    """Return max |x| of a bf16, fp16 or fp32 tensor of any shape as fp32 []; NaN and Inf propagate.

    Return 0 for an empty tensor (an expert that saw no token).
    """
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    if _is_for_c(x):
        return last_dim_amax(x.view(gcd(x.numel(), _SHARES), -1)).amax()
    low, high = torch.aminmax(x)
    return torch.maximum(low.abs(), high.abs()).float()


def _is_for_c(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.numel() >= _MANY
        and x.is_contiguous()
        and loops_for(x) is not None
    )


def last_dim_amax(x: Tensor) -> Tensor:
    """Return max |x| over the last dim, [..., B] -> fp32 [...]; NaN and Inf propagate."""
    loops = loops_for(x)
    if loops is not None:
        return loops.block_amax(x.view(x.shape[0], -1), x.shape[-1]).view(x.shape[:-1])
    # Magnitudes order like their bit patterns, and torch reduces integers 2-10x faster.
    integer, mask = _BITS[x.dtype]
    return (x.view(integer) & mask).amax(-1).view(x.dtype).float()


@torch.no_grad()
def stack_amax(w_ENK: Tensor) -> Tensor:
    """Return max |w| of each matrix of a stack [E, N, K]: fp32 [E, 1, 1].

    NaN and Inf propagate.
    """
    experts, rows, _ = w_ENK.shape
    if w_ENK.numel() == 0:
        return torch.zeros(experts, 1, 1, device=w_ENK.device)
    w_RK = as_rows(w_ENK)
    amax_R = torch.cat([last_dim_amax(w_RK[chunk]) for chunk in chunks_to_read(w_RK)])
    return last_dim_amax(amax_R.view(experts, 1, rows)).unsqueeze(-1)


def tensor_scale(amax: Tensor, fmt: Format) -> Tensor:
    """Turn the amax of whole tensors into their dscale (multiply to decode), fp32, same shape.

    fp8 has amax / 448 and nvfp4 has amax / (6 * 448), like ModelOpt's exporters; int8_tensor has
    amax / 127.5, like compressed-tensors. An amax of 0 gives 1.0: every element is zero then, and
    any positive scale decodes it exactly. Subnormal quotients become 2^-126, fp32's smallest
    normal, which kernels that flush subnormals still read. NaN and Inf propagate.

    Args:
        amax: Largest magnitudes, any shape.
        fmt: A format with ``tensor_scale``.
    """
    assert fmt.largest is not None, f"{fmt.name} has no scale per tensor"
    scale = true_div(amax.float(), fmt.largest).clamp(min=_SMALLEST)
    return torch.where(amax == 0, torch.ones_like(scale), scale)
