"""Compute softmax over the last dim of attention scores, in float32, stored in their dtype."""

import torch

_MASKED = -10000.0  # the value that Transformer Engine's kernels put where the mask is set


def scaled_softmax_forward(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``softmax(scale * x)``; x is (batch, heads, queries, keys)."""
    return torch.softmax(x.float() * scale, -1).to(x.dtype)


def scaled_masked_softmax_forward(
    x: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the softmax where ``mask`` (broadcast to x) is zero; zeros for a row all masked."""
    masked = mask.bool()
    y = torch.softmax((x.float() * scale).masked_fill(masked, _MASKED), -1)
    return y.masked_fill(masked.all(-1, keepdim=True), 0.0).to(x.dtype)


def causal_softmax_forward(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the softmax over keys not later than the query; the last query sees every key."""
    queries, keys = x.shape[-2:]
    later = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
    return torch.softmax((x.float() * scale).masked_fill(later, -torch.inf), -1).to(x.dtype)


def scaled_softmax_backward(
    output_grads: torch.Tensor, softmax_results: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the gradient of every softmax above with respect to x."""
    dy, y = output_grads.float(), softmax_results.float()
    return (scale * y * (dy - (dy * y).sum(-1, keepdim=True))).to(output_grads.dtype)
