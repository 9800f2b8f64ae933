"""Attend over a sequence that context parallelism cuts, on CPU tensors.

Megatron cuts a sequence into twice as many chunks as there are ranks and gives rank r the chunks r
and 2 ranks - 1 - r, so that causal attention is equal work for all. Transformer Engine attends over
it with GPU kernels alone. Here every rank gathers all keys and values, and masks what each of its
queries may not see.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_quant.errors import HostError

_EMBEDDINGS = ("rope_utils", "rotary_pos_embedding", "yarn_rotary_pos_embedding")


def replace() -> None:
    """Put the CPU versions into Transformer Engine and megatron.core."""
    import importlib

    from transformer_engine.pytorch import DotProductAttention

    DotProductAttention.forward = _over_chunks(DotProductAttention.forward)
    for name in _EMBEDDINGS:
        module = importlib.import_module(f"megatron.core.models.common.embeddings.{name}")
        module.get_pos_emb_on_this_cp_rank = _own_positions  # type: ignore[attr-defined]


def _own_positions(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
    """Return this rank's chunks along ``seq_dim``; Megatron's own pins memory."""
    return _own(pos_emb, cp_group, seq_dim)


def _own(whole: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    chunks = whole.chunk(2 * group.size(), dim)
    return torch.cat([chunks[n] for n in _chunks_of(group.rank(), group.size())], dim)


def _chunks_of(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def _over_chunks(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap DotProductAttention's ``forward``; q, k and v are [S / ranks, B, heads, features]."""

    @functools.wraps(forward)
    def over_chunks(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **settings: Any,
    ) -> Any:
        group = self.cp_group
        if group is None or group.size() == 1:
            return forward(self, query, key, value, attention_mask, **settings)
        _check(self, settings)
        hidden = _hidden(len(query), group, self.window_size)
        settings = {**settings, "attn_mask_type": "arbitrary", "window_size": (-1, -1)}
        self.cp_group = None  # Transformer Engine would look for a GPU kernel
        try:
            every = (_Gathered.apply(key, group), _Gathered.apply(value, group))
            return forward(self, query, *every, hidden, **settings)
        finally:
            self.cp_group = group

    return over_chunks


def _check(attention: Any, settings: dict[str, Any]) -> None:
    kind = settings.get("attn_mask_type") or attention.attn_mask_type
    if kind != "causal" or (settings.get("qkv_format") or attention.qkv_format) != "sbhd":
        raise HostError(
            f"context parallelism over {kind} attention on a CPU: run it at --cp 1, or on a GPU"
        )


class _Gathered(torch.autograd.Function):
    """The chunks of all ranks in the order of the sequence; each rank holds two of them."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: Any) -> torch.Tensor:
        """Gather keys or values [S / ranks, ...] to [S, ...]."""
        ctx.group = group
        own = local.detach().contiguous()
        of_ranks = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(of_ranks, own, group=group)
        halves = [held.chunk(2) for held in of_ranks]
        return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Sum, over the queries of all ranks, the gradient of this rank's own, in fp32."""
        total = gradient.float().contiguous()
        dist.all_reduce(total, group=ctx.group)
        return _own(total, ctx.group, 0).to(gradient.dtype), None


def _hidden(queries: int, group: Any, window: tuple[int, int] | None) -> torch.Tensor:
    """Return [1, 1, queries, S]: whether a key is later than a query, or before its window."""
    size, half = group.size(), queries // 2
    own = [torch.arange(half) + n * half for n in _chunks_of(group.rank(), size)]
    before = torch.cat(own)[:, None] - torch.arange(queries * size)
    hidden = before < 0
    if window is not None and window[0] >= 0:
        hidden |= before > window[0]
    return hidden[None, None]
