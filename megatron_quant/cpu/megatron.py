"""Replace the parts of Megatron-Core that need CUDA besides Transformer Engine.

- Its tracker keeps named states of the CUDA generator; here they are states of the CPU's. As on a
  GPU, ``model_parallel_cuda_manual_seed`` must have named them before a model is built.
- The alltoall dispatcher turns split sizes into numpy arrays only where they lie on a GPU.
- With expert tensor parallelism the dispatcher gathers a different number of tokens from each rank,
  which gloo's all-gather and reduce-scatter refuse; its all-to-all does not.
- The schedules of forwards and backwards count tokens in a tensor on ``device="cuda"``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_quant.cpu import cuda

_SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)


def replace() -> None:
    """Import megatron.core and put the CPU versions in its modules."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    random.CudaRNGStatesTracker = _tracker(random.CudaRNGStatesTracker)
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host
    mappings._gather_along_first_dim = _uneven(mappings._gather_along_first_dim, _gather)
    mappings._reduce_scatter_along_first_dim = _uneven(
        mappings._reduce_scatter_along_first_dim, _reduce_scatter
    )
    for name in _SCHEDULES:
        setattr(schedules, name, cuda.named(getattr(schedules, name)))


def _get_rng_state(
    device: object = "cpu", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _tracker(base: type) -> type:
    class CpuRNGStatesTracker(base):
        """Megatron's tracker over states of the CPU generator."""

        @contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            """Draw from the named state within, and from the state before it afterwards."""
            if name not in self.states_:
                raise RuntimeError(
                    f"random state {name} is not added: call model_parallel_cuda_manual_seed"
                )
            before = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before)

    return CpuRNGStatesTracker


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return a tensor on the host already; Megatron's own converts only one that ``is_cuda``."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _uneven(
    even: Callable[..., torch.Tensor],
    uneven: Callable[[torch.Tensor, Any, list[int]], torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """Call ``even`` where all ranks hold equally many rows (no ``sizes``), else ``uneven``."""

    def along_first_dim(
        input_: torch.Tensor,
        group: Any = None,
        sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if sizes is None or group is None or group.size() == 1:
            return even(input_, group, sizes, use_global_buffer)
        return uneven(input_.contiguous(), group, [int(size) for size in sizes])

    return along_first_dim


def _gather(input_: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """Gather rows of all ranks, sizes[r] of them from rank r, in rank order."""
    ranks = len(sizes)
    output = input_.new_empty(sum(sizes), *input_.shape[1:])
    copies = input_.repeat(ranks, *(1,) * (input_.dim() - 1))
    dist.all_to_all_single(output, copies, sizes, [len(input_)] * ranks, group=group)
    return output


def _reduce_scatter(input_: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """Sum this rank's sizes[rank] rows over the ranks in rank order."""
    ranks, rows = len(sizes), sizes[group.rank()]
    parts = input_.new_empty(ranks * rows, *input_.shape[1:])
    dist.all_to_all_single(parts, input_, [rows] * ranks, sizes, group=group)
    return parts.view(ranks, rows, *input_.shape[1:]).sum(0)
