"""Weights, correlated inputs, and GPTQ written down plainly, for the tests of rounding."""

import torch

from megatron_quant.formats import decode, encode
from megatron_quant.formats.grid import encode_on
from tests.unit.formats_world import scale_of, weights

COLS = 256


def inputs(tokens, cols=COLS, seed=0, spread=1.0):
    """Correlated values whose columns differ in size (log-normal with ``spread``), fp32."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.eye(cols) + torch.randn(cols, cols, generator=gen) / cols**0.5
    sizes = (spread * torch.randn(cols, generator=gen)).exp()
    return torch.randn(tokens, cols, generator=gen) @ mix * sizes


def moment(seed=0, tokens=1000, cols=COLS, spread=1.0):
    x = inputs(tokens, cols, seed, spread)
    return x.T @ x


def rtn(w, fmt, stat=None):
    """(values, scale fields) of rounding to nearest."""
    fields = encode(w, fmt, dscale_of(w, fmt), stat)
    return decode(fields, fmt, torch.float32), scales_of(fields, fmt)


def dscale_of(w, fmt):
    """The scale of a matrix, or of each one of a stack."""
    return (
        scale_of(w, fmt)
        if w.dim() == 3
        else scale_of(w[None], fmt).view(())
        if fmt.tensor_scale
        else None
    )


def scales_of(fields, fmt):
    return {name: value for name, value in fields.items() if name != fmt.fields[0].name}


def loss(w, rounded, h):
    """tr((W - Q) H (W - Q)^T), fp64, of each matrix."""
    error = w.double() - rounded.double()
    return ((error @ h.double()) * error).sum((-2, -1))


def plain(w_NK, fmt, scales, h, damp):
    """GPTQ as Frantar et al. write it, with the inverse of H, a column at a time, in fp64."""
    h, w = h.double().clone(), w_NK.double().clone()
    diagonal = h.diagonal()
    mean = diagonal.mean().clone()
    diagonal[diagonal == 0] = mean
    order = diagonal.argsort(descending=True, stable=True)
    diagonal += damp * mean
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    result = torch.empty(w.shape)
    for at, column in enumerate(order.tolist()):
        q = decode(encode_on(w.float(), fmt, scales), fmt, torch.float32)[:, column]
        result[:, column] = q
        error = (w[:, column] - q) / upper[at, at]
        w[:, order[at + 1 :]] -= error[:, None] * upper[at, at + 1 :]
    return result


def stack(experts=2, rows=24, cols=COLS, dtype=torch.bfloat16, seed=0):
    return weights(experts, rows, cols, dtype=dtype, seed=seed)
