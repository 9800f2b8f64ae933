"""Measure a live quantized Megatron model's perplexity, and its KL from itself unquantized."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core import parallel_state as mpu

from megatron_quant.calib import unquantized
from megatron_quant.dist import Groups, sum_reduce
from megatron_quant.evaluation import NOTHING, Sums, nll_and_kl
from megatron_quant.layers import CachedTensor, QuantLayer
from megatron_quant.mcore.model.schedule import ModelChunks, run_schedule, whole


@torch.no_grad()
def evaluate_model(
    model: ModelChunks,
    layers: Sequence[QuantLayer | CachedTensor],
    windows: Sequence[torch.Tensor],
    vocab_size: int,
    groups: Groups,
    progress: Callable[[int], None],
) -> Sums:
    """Sum the losses over ``windows`` (int64 [T + 1] each), quantized and against unquantized.

    layers: everything that is quantized, cached keys and values too; it is switched off for the
    reference.

    Collective: data-parallel ranks share the windows. All run equally many forwards, as the
    dispatch of experts needs. Each window is one forward; as many as there are pipeline stages run
    at a time. The result is equal on all ranks.
    """
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    counted = mpu.get_tensor_model_parallel_rank() == 0
    own = list(range(rank, -(-len(windows) // size) * size, size))
    stages = mpu.get_pipeline_model_parallel_world_size()
    total = NOTHING
    for few in (own[i : i + stages] for i in range(0, len(own), stages)):
        found = _windows(model, layers, [windows[i % len(windows)] for i in few], vocab_size)
        for index, sums in zip(few, found, strict=False):  # empty before the last stage
            if counted and index < len(windows):
                total += sums
        progress(len(few))
    flat = torch.tensor([total.nll, total.kl, total.tokens], dtype=torch.float64)
    nll, kl, tokens = sum_reduce(flat, groups).tolist()
    return Sums(nll, kl, int(tokens))


def _windows(
    model: ModelChunks,
    layers: Sequence[QuantLayer | CachedTensor],
    windows: Sequence[torch.Tensor],
    vocab_size: int,
) -> list[Sums]:
    """Return the sums of each window on ranks of the last pipeline stage; nothing on others."""
    ids = [window[None, :-1] for window in windows]
    logits = run_schedule(model, ids, partial(whole, vocab_size=vocab_size))
    with unquantized(layers):
        references = run_schedule(model, ids, partial(whole, vocab_size=vocab_size))
    return [
        nll_and_kl(own[0], reference[0], window[1:].to(own.device))
        for own, reference, window in zip(logits, references, windows[: len(logits)], strict=True)
    ]
