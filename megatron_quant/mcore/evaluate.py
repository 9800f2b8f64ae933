"""Perplexity of a live Megatron model, quantized as it is, and its divergence from unquantized."""

from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel

from megatron_quant.calib.observe import unquantized
from megatron_quant.dist import Groups, sum_reduce
from megatron_quant.evaluate.metrics import NOTHING, Sums, nll_and_kl
from megatron_quant.layers.install import QuantLayer
from megatron_quant.layers.kv_cache import CachedTensor
from megatron_quant.mcore.run import full_logits


@torch.no_grad()
def evaluate_model(
    model: GPTModel,
    layers: Sequence[QuantLayer | CachedTensor],
    windows: Sequence[torch.Tensor],
    vocab_size: int,
    groups: Groups,
    progress: Callable[[int], None],
) -> Sums:
    """Sums over ``windows`` (int64 [T + 1] each) of the quantized model against its own bf16 self.

    layers: all that is quantized, and so is off for the latter; cached keys and values too.

    Collective: data-parallel ranks share the windows, and each runs equally many forwards, as the
    dispatch of experts needs. The result is equal on all ranks.
    """
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    counted = mpu.get_tensor_model_parallel_rank() == 0
    total = NOTHING
    for first in range(0, len(windows), size):
        window = windows[(first + rank) % len(windows)]
        sums = _window(model, layers, window, vocab_size)
        if counted and first + rank < len(windows):
            total += sums
        progress(1)
    flat = torch.tensor([total.nll, total.kl, total.tokens], dtype=torch.float64)
    nll, kl, tokens = sum_reduce(flat, groups).tolist()
    return Sums(nll, kl, int(tokens))


def _window(
    model: GPTModel,
    layers: Sequence[QuantLayer | CachedTensor],
    window: torch.Tensor,
    vocab_size: int,
) -> Sums:
    ids, labels = window[None, :-1], window[1:]
    logits = full_logits(model, ids, vocab_size)[0]
    with unquantized(layers):
        reference = full_logits(model, ids, vocab_size)[0]
    return nll_and_kl(logits, reference, labels.to(logits.device))
