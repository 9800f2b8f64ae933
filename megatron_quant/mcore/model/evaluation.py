"""Measure a live quantized Megatron model's perplexity, and its KL from itself unquantized."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from megatron.core import parallel_state as mpu

from megatron_quant.calib import unquantized
from megatron_quant.dist import Groups, sum_reduce
from megatron_quant.evaluation import NOTHING, Sums, nll_and_kl
from megatron_quant.layers import CachedTensor, QuantLayer
from megatron_quant.mcore.model.schedule import ModelChunks, run_schedule, whole


class Reference:
    """A quantized live model as it was before: quantizers off, and the weights that gptq replaced.

    Make it before calibration. Copies of those weights are held on the host.
    """

    def __init__(self, layers: Sequence[QuantLayer]) -> None:
        self._layers = layers
        rounded = [weight for layer in layers if layer.rounds for weight in layer.weights()]
        self._held = [(weight, weight.detach().to("cpu", copy=True)) for weight in rounded]

    @contextmanager
    def in_place(self, cached: Sequence[CachedTensor]) -> Iterator[None]:
        """Have the model compute as before while the context lasts, ``cached`` unquantized too."""
        now = [weight.detach().clone() for weight, _ in self._held]
        for weight, before in self._held:
            weight.detach().copy_(before)
        try:
            with unquantized([*self._layers, *cached]):
                yield
        finally:
            for (weight, _), data in zip(self._held, now, strict=True):
                weight.detach().copy_(data)


@torch.no_grad()
def evaluate_model(
    model: ModelChunks,
    reference: Callable[[], AbstractContextManager[None]],
    windows: Sequence[torch.Tensor],
    vocab_size: int,
    groups: Groups,
    progress: Callable[[int], None],
) -> Sums:
    """Sum the losses over ``windows`` (int64 [T + 1] each), quantized and against unquantized.

    reference: makes contexts in which the model computes unquantized.

    Collective: data-parallel ranks share the windows. All run equally many forwards, as the
    dispatch of experts needs. Each window is one forward; as many as there are pipeline stages run
    at a time. The result is equal on all ranks.
    """
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    counted = mpu.get_tensor_model_parallel_rank() == mpu.get_context_parallel_rank() == 0
    own = list(range(rank, -(-len(windows) // size) * size, size))
    stages = mpu.get_pipeline_model_parallel_world_size()
    total = NOTHING
    for few in (own[i : i + stages] for i in range(0, len(own), stages)):
        found = _windows(model, reference, [windows[i % len(windows)] for i in few], vocab_size)
        for index, sums in zip(few, found, strict=False):  # empty before the last stage
            if counted and index < len(windows):
                total += sums
        progress(len(few))
    flat = torch.tensor([total.nll, total.kl, total.tokens], dtype=torch.float64)
    nll, kl, tokens = sum_reduce(flat, groups).tolist()
    return Sums(nll, kl, int(tokens))


def _windows(
    model: ModelChunks,
    reference: Callable[[], AbstractContextManager[None]],
    windows: Sequence[torch.Tensor],
    vocab_size: int,
) -> list[Sums]:
    """Return the sums of each window on ranks of the last pipeline stage; nothing on others."""
    ids = [window[None, :-1] for window in windows]
    logits = run_schedule(model, ids, partial(whole, vocab_size=vocab_size))
    with reference():
        references = run_schedule(model, ids, partial(whole, vocab_size=vocab_size))
    return [
        nll_and_kl(own[0], other[0], window[1:].to(own.device))
        for own, other, window in zip(logits, references, windows[: len(logits)], strict=True)
    ]
