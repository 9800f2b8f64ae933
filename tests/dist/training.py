"""A training script as users of Megatron-LM write it, from megatron-core's public pieces.

Import it in functions that run under the ``ranks`` fixture.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_quant.mcore.live import quantized
from megatron_quant.mcore.training import prepare
from megatron_quant.models import copies
from tests.dist import live


def build(
    path: Path, parallelism: live.Parallelism, dtype: torch.dtype = torch.float32
) -> list[GPTModel]:
    """The checkpoint's model, as ``get_model`` has it before it wraps it."""
    chunks = live.load(path, parallelism, dtype).chunks
    return [chunk.train() for chunk in chunks]


def fuse(model: list[GPTModel]) -> list[GPTModel]:
    """Have Transformer Engine's layers add weight gradients to main_grad.

    ``gradient_accumulation_fusion`` does so, and asks for CUDA kernels for Megatron's own layers.
    """
    for module in model[0].modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
    return model


@dataclass
class Script:
    """A wrapped model with its optimizer."""

    model: list[DistributedDataParallel]
    optimizer: Any
    norm: float = 0.0  # of the last step's gradients

    def forward_backward(self, batches: Sequence[torch.Tensor]) -> float:
        """Gradients of all microbatches [B, S] of the global batch; this rank's mean loss.

        NaN where a pipeline's earlier stages have none.
        """
        own = batches[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
        feeds = [iter(own) for _ in self.model]
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=feeds if len(feeds) > 1 else feeds[0],
            model=self.model,
            num_microbatches=len(own),
            seq_length=own[0].shape[1],
            micro_batch_size=own[0].shape[0],
            forward_only=False,
        )
        return float(sum(loss["loss"] for loss in losses)) / len(own) if losses else float("nan")

    def step(self, batches: Sequence[torch.Tensor]) -> float:
        """One step of training; the loss before it."""
        loss = self.forward_backward(batches)
        stepped, self.norm, _ = self.optimizer.step()
        assert stepped
        return loss


def wrap(model: list[GPTModel], **ddp: bool) -> Script:
    """What ``setup_model_and_optimizer`` does; ``ddp``: fields of the DDP config."""
    config = model[0].config
    settings = {"use_distributed_optimizer": True, "grad_reduce_in_fp32": True} | ddp
    ddp_config = DistributedDataParallelConfig(**settings)
    wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in model]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = wrapped[0].no_sync
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.0,
        clip_grad=1.0,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=ddp_config.use_distributed_optimizer,
    )
    return Script(wrapped, get_megatron_optimizer(optimizer_config, wrapped))


def _forward_step(
    batches: Iterator[torch.Tensor], model: Any
) -> tuple[torch.Tensor, Callable[..., Any]]:
    ids = next(batches)
    length = ids.shape[1]
    positions = torch.arange(length).expand_as(ids)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    losses = model(ids, positions, mask, labels=ids.roll(-1, 1))
    return losses, _mean


def _mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides it in place


def main(path: Path, parallelism: live.Parallelism, batches: Sequence[torch.Tensor]) -> list[list[float]]:
    """The whole script: losses and norms of gradients."""
    model = build(path, parallelism)
    model = prepare(model, "nvfp4", hf_model=str(path))  # the line that trains it quantized
    script = wrap(model)
    found = [(script.step(batches), float(script.norm)) for _ in range(3)]
    return [list(values) for values in zip(*found, strict=True)]


def stored_ranges(
    path: Path, stored: Path, recipe: str
) -> tuple[dict[str, float], dict[str, float]]:
    """A checkpoint's ranges of weights by layer, and the largest of the weights beside them."""
    model = prepare(build(path, live.Parallelism()), recipe, stored, hf_model=str(path))
    held, own = {}, {}
    for layer in quantized(model).layers:
        held[layer.name] = float(layer.weight_quantizer.amax)
        own[layer.name] = max(float(weight.abs().max()) for weight in layer.weights())
    return held, own


Slices = dict[str, list[tuple[tuple[slice, ...], torch.Tensor]]]


def slices(script: Script, of: Callable[[torch.nn.Parameter], torch.Tensor]) -> Slices:
    """Hugging Face name -> (box, values) of what this rank holds of each tensor.

    of: the values of a parameter, such as its gradient.
    """
    found: Slices = {}
    model = quantized(script.model).model
    for local in model.local:
        values = of(model.chunks[local.chunk].get_parameter(local.name))
        if inside := local.param.inside:
            values = values.narrow(0, inside.before // local.shard_size, local.rows)
        for piece in copies(local.param, local.shard_rank, local.shard_size):
            held = values[piece.dst.index].detach().clone()
            found.setdefault(piece.source.name, []).append((piece.src.index, held))
    return found


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """As Megatron's optimizer reads it."""
    return parameter.main_grad

