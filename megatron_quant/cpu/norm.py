"""Compute RMSNorm and LayerNorm over the last dim of (M, H), both directions, in float32."""

from typing import Any

import torch

from megatron_quant.cpu.gemm import torch_dtype
from megatron_quant.errors import HostError


def rmsnorm_fwd(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    ln_out: torch.Tensor | None,
    quantizer: object,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[torch.Tensor | None]:
    """Return [y (M, H), None, rsigma (M,) float32]."""
    _refuse_quantizer("rmsnorm_fwd", quantizer)
    x = input.float()
    rsigma = torch.rsqrt(x.square().mean(-1) + eps)
    y = x * rsigma[:, None] * _scale(weight, zero_centered_gamma)
    return [_store(y, ln_out, otype), None, rsigma]


def rmsnorm_bwd(
    dz: torch.Tensor,
    x: torch.Tensor,
    rsigma: torch.Tensor,
    gamma: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[torch.Tensor]:
    """Return [dx (M, H), dgamma (H,)]."""
    dy = dz.float()
    r = rsigma.reshape(-1, 1)
    normal = x.float() * r
    dnormal = dy * _scale(gamma, zero_centered_gamma)
    dx = r * (dnormal - normal * (dnormal * normal).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (dy * normal).sum(0).to(gamma.dtype)]


def layernorm_fwd(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    ln_out: torch.Tensor | None,
    quantizer: object,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[torch.Tensor]:
    """Return [y (M, H), mu (M,) float32, rsigma (M,) float32]."""
    _refuse_quantizer("layernorm_fwd", quantizer)
    x = input.float()
    mu = x.mean(-1)
    rsigma = torch.rsqrt(x.var(-1, unbiased=False) + eps)
    normal = (x - mu[:, None]) * rsigma[:, None]
    y = normal * _scale(weight, zero_centered_gamma) + bias.float()
    return [_store(y, ln_out, otype), mu, rsigma]


def layernorm_bwd(
    dz: torch.Tensor,
    x: torch.Tensor,
    mu: torch.Tensor,
    rsigma: torch.Tensor,
    gamma: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[torch.Tensor]:
    """Return [dx (M, H), dgamma (H,), dbeta (H,)]."""
    dy = dz.float()
    r = rsigma.reshape(-1, 1)
    normal = (x.float() - mu.reshape(-1, 1)) * r
    dnormal = dy * _scale(gamma, zero_centered_gamma)
    mean = dnormal.mean(-1, keepdim=True)
    dx = r * (dnormal - mean - normal * (dnormal * normal).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (dy * normal).sum(0).to(gamma.dtype), dy.sum(0).to(gamma.dtype)]


def _scale(gamma: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return gamma.float() + 1.0 if zero_centered else gamma.float()


def _store(y: torch.Tensor, out: torch.Tensor | None, otype: Any) -> torch.Tensor:
    return y.to(torch_dtype(otype)) if out is None else out.copy_(y)


def _refuse_quantizer(kernel: str, quantizer: object) -> None:
    if quantizer is not None:
        raise HostError(f"{kernel} with a quantized output on a CPU: switch off fp8")
