"""Run forwards of a Megatron model through all stages of its pipeline."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_quant.calib import share
from megatron_quant.errors import CalibrationError
from megatron_quant.mcore.model.drafts import logits_alone

T = TypeVar("T")
ModelChunks: TypeAlias = GPTModel | Sequence[GPTModel]
"""A rank's part of a model, as Megatron's schedules take it: one chunk or several."""


def run_schedule(
    model: ModelChunks,
    batches: Sequence[torch.Tensor],
    collect: Callable[[torch.Tensor], T],
    progress: Callable[[int], None] = lambda steps: None,
) -> list[T]:
    """Run batches of token ids [B, S]; ``collect`` gets this rank's logits [B, S, V / tp] of each.

    Context-parallel ranks run a share of each sequence, and get the logits of all of it.

    Returns the results of ``collect``, in order, on ranks of the last pipeline stage; nothing
    elsewhere, because there are no logits. progress: called with 1 when a batch enters this rank's
    last chunk.

    Collective over the ranks that hold the model; data-parallel ranks give equally many batches.
    Each batch is one microbatch of Megatron's own schedule. With virtual stages that needs at least
    as many batches as the pipeline has stages; if there are fewer, the first ones run again.
    Without ``variable_seq_lengths`` in its config, a pipeline takes batches of one shape only.
    """

    def collected(ids: torch.Tensor, microbatches: int) -> Callable[..., T]:
        def of_whole(logits: torch.Tensor, non_loss_data: bool) -> T:
            return collect(logits if collect is _unseen else _joined(logits)[:, : ids.shape[1]])

        return of_whole

    found: list[T] = _run(model, batches, _Mode(collected, forward_only=True), progress)
    return found


def run_backward(
    model: ModelChunks,
    batches: Sequence[torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[float]:
    """Run a forward and a backward of each batch; return the losses as :func:`run_schedule` does.

    loss: of logits [B, S, V / tp] and ids [B, S] of whole sequences, the same on all tensor- and
    context-parallel ranks. Its gradient is neither scaled nor averaged. Collective, as
    :func:`run_schedule`.
    """
    cp_size = mpu.get_context_parallel_world_size()

    def trained(ids: torch.Tensor, microbatches: int) -> Callable[..., tuple[torch.Tensor, float]]:
        def scaled(logits: torch.Tensor) -> tuple[torch.Tensor, float]:
            value = loss(_joined(logits)[:, : ids.shape[1]], ids)
            # The schedule divides by the number of microbatches, and multiplies by that of ranks.
            return value * microbatches / cp_size, value.item()

        return scaled

    found: list[float] = _run(
        model, batches, _Mode(trained, forward_only=False), lambda steps: None
    )
    return found


@dataclass(frozen=True)
class _Mode:
    """Say what a schedule does with logits: a function of a batch's ids and the microbatches."""

    of_logits: Callable[[torch.Tensor, int], Callable[..., Any]]
    forward_only: bool


def _run(
    model: ModelChunks,
    batches: Sequence[torch.Tensor],
    mode: _Mode,
    progress: Callable[[int], None],
) -> list[Any]:
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    if not batches:
        return []
    fed = _enough(batches, chunks)
    rest = fed[len(batches) :]
    feeds = [iter(fed) for _ in chunks[1:]] + [chain(_counted(batches, progress), rest)]
    found: list[Any] = get_forward_backward_func()(
        forward_step_func=partial(_step, of_logits=_of_logits(mode, len(fed))),
        data_iterator=feeds if len(chunks) > 1 else feeds[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(fed),
        seq_length=fed[0].shape[1] + _padding(fed[0]),
        micro_batch_size=fed[0].shape[0],
        forward_only=mode.forward_only,
        collect_non_loss_data=mode.forward_only,
    )
    return found[: len(batches)]


def _of_logits(mode: _Mode, microbatches: int) -> Callable[[torch.Tensor], Callable[..., Any]]:
    return lambda ids: mode.of_logits(ids, microbatches)


def own_share(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the batches of this data-parallel rank; each has equally many."""
    if not batches:
        return []
    return share(batches, mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size())


def check_shares(batches: Sequence[torch.Tensor]) -> None:
    """Raise CalibrationError if some data-parallel rank has no sample of its own."""
    samples, size = sum(map(len, batches)), mpu.get_data_parallel_world_size()
    if samples < size:
        raise CalibrationError(
            f"{samples} samples for {size} data-parallel ranks: imatrix and gptq need one for each "
            "at least, as none may count twice; raise --calib-size"
        )


def run_through(
    model: ModelChunks,
    batches: Sequence[torch.Tensor],
    progress: Callable[[int], None] = lambda steps: None,
) -> None:
    """Run token ids as :func:`run_schedule` does, for those who watch the layers. Collective."""
    run_schedule(model, batches, _unseen, progress)


def _unseen(logits: torch.Tensor) -> None:
    """Collect nothing; context-parallel ranks need not exchange their logits then."""


def _enough(batches: Sequence[torch.Tensor], chunks: Sequence[GPTModel]) -> list[torch.Tensor]:
    """Return as many batches as the schedule of virtual stages needs, and set its group size."""
    if len(chunks) == 1:
        return list(batches)
    stages = mpu.get_pipeline_model_parallel_world_size()
    count = max(len(batches), stages)
    sizes = range(stages, count + 1)
    fit = next(n for n in sizes if count % n == 0 or count % n >= stages)
    chunks[0].config.microbatch_group_size_per_vp_stage = fit
    return [batches[i % len(batches)] for i in range(count)]


def _counted(
    batches: Sequence[torch.Tensor], progress: Callable[[int], None]
) -> Iterator[torch.Tensor]:
    for batch in batches:
        progress(1)
        yield batch


def _step(
    batches: Iterator[torch.Tensor],
    chunk: GPTModel,
    of_logits: Callable[[torch.Tensor], Callable[..., Any]],
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Run one microbatch through one chunk, as the schedules call it.

    Sequences are padded at the end to a multiple of the tensor-parallel size, because sequence
    parallelism splits them, and so does context parallelism. Causal attention keeps earlier tokens
    from seeing the padding.
    """
    ids_BS = next(batches)
    padded = torch.nn.functional.pad(ids_BS, (0, _padding(ids_BS)))
    ids = padded.to(next(chunk.parameters()).device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    mask = None if _cuts() > 1 else _later(ids)

    with logits_alone(chunk):
        return chunk(_own_chunks(ids), _own_chunks(positions), mask), of_logits(ids_BS)


def _later(ids_BS: torch.Tensor) -> torch.Tensor:
    """Return [1, 1, S, S]: whether a key is later than a query."""
    length = ids_BS.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids_BS.device)
    return mask.triu(1)


def _cuts() -> int:
    """Return the chunks that context parallelism makes of a sequence: two a rank, or one in all."""
    size: int = mpu.get_context_parallel_world_size()
    return 2 * size if size > 1 else 1


def _own_chunks(tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return this context-parallel rank's tokens: the n-th chunk from either end."""
    chunks, rank = tokens_BS.chunk(_cuts(), 1), mpu.get_context_parallel_rank()
    return torch.cat([chunks[rank], chunks[-1 - rank]], 1) if len(chunks) > 1 else tokens_BS


def _joined(logits_BSV: torch.Tensor) -> torch.Tensor:
    """Return the logits of the whole sequence, from those of all context-parallel ranks."""
    if _cuts() == 1:
        return logits_BSV
    joined: torch.Tensor = _Joined.apply(logits_BSV)
    return joined


class _Joined(torch.autograd.Function):
    """All ranks compute the same of the whole, so each takes its own part of the gradient."""

    @staticmethod
    def forward(ctx: Any, logits_BSV: torch.Tensor) -> torch.Tensor:
        """Gather [B, S / cp, V] to [B, S, V]."""
        local = logits_BSV.contiguous()
        of_ranks = [torch.empty_like(local) for _ in range(mpu.get_context_parallel_world_size())]
        dist.all_gather(of_ranks, local, group=mpu.get_context_parallel_group())
        halves = [held.chunk(2, 1) for held in of_ranks]
        return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)], 1)

    @staticmethod
    def backward(ctx: Any, gradient_BSV: torch.Tensor) -> torch.Tensor:
        """Return the part of this rank's tokens."""
        return _own_chunks(gradient_BSV)


def _padding(ids_BS: torch.Tensor) -> int:
    tp_size: int = mpu.get_tensor_model_parallel_world_size()
    return -ids_BS.shape[1] % (tp_size * _cuts())


def forward(model: ModelChunks, ids_BS: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's logits [B, S, V / tp] of ids [B, S]; None before the last stage."""
    return next(iter(run_schedule(model, [ids_BS], _as_they_are)), None)


def _as_they_are(logits: torch.Tensor) -> torch.Tensor:
    return logits


def full_logits(model: ModelChunks, ids_BS: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """Return logits [B, S, vocab_size] in fp32, equal on all ranks of the last pipeline stage.

    Returns None on ranks of earlier stages.
    """
    return next(iter(run_schedule(model, [ids_BS], partial(whole, vocab_size=vocab_size))), None)


def whole(logits_BSV: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gather [B, S, V / tp] to [B, S, vocab_size] in fp32 on all tensor-parallel ranks."""
    local = logits_BSV.float().contiguous()
    size = mpu.get_tensor_model_parallel_world_size()
    shards = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(shards, local, group=mpu.get_tensor_model_parallel_group())
    return torch.cat(shards, -1)[..., :vocab_size]
