"""Train a model through its quantizers, in Megatron's own loop, and export it.

torchrun --nproc-per-node 4 examples/train_qat.py --hf-model-id PATH --export-quant-cfg nvfp4 \
    --tp 2 --ep 2 --train-steps 200 --kd-teacher bf16 --train-data TEXTS --export-dir OUT

The student starts as the calibrated model (what `quantize` would export) and learns to give the
logits of the model that it was (`--kd-teacher bf16`), or to predict the text (`none`).
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_quant import cpu

if not torch.cuda.is_available():
    cpu.activate()

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import Float16Module

from megatron_quant.api.inputs import Inputs, open_inputs
from megatron_quant.api.options import QuantizeOptions
from megatron_quant.api.quantize import producer
from megatron_quant.calib.data import load_texts, shard, token_batches
from megatron_quant.ckpt.origin import digest_of
from megatron_quant.ckpt.verify import verify
from megatron_quant.ckpt.writer import export
from megatron_quant.cli.console import print_error
from megatron_quant.dist import Groups, together
from megatron_quant.errors import QuantError
from megatron_quant.evaluate.tokenizer import load_tokenizer
from megatron_quant.layers.install import ExpertScales
from megatron_quant.mcore.callback import QuantCallback, Schedule
from megatron_quant.mcore.hooks import prepare, quantized
from megatron_quant.mcore.load import load_model
from megatron_quant.mcore.parallel import start_distributed
from megatron_quant.mcore.run import forward

Step = Callable[[Iterator[torch.Tensor], Any], tuple[torch.Tensor, Callable[..., Any]]]


def say(*words: object) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def divergence(
    student_BSV: torch.Tensor, teacher_BSV: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Mean KL(teacher || student) per token, of logits that tensor parallelism cuts."""
    start = mpu.get_tensor_model_parallel_rank() * student_BSV.shape[-1]
    real = max(0, min(student_BSV.shape[-1], vocab_size - start))  # the rest pads the vocabulary
    student, teacher = (x[..., :real].float() for x in (student_BSV, teacher_BSV))
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    kl_BS = (log_p.exp() * (log_p - log_q)).sum(-1)
    return reduce_from_tensor_model_parallel_region(kl_BS).mean()


def log_softmax(logits_BSV: torch.Tensor) -> torch.Tensor:
    """Over the whole vocabulary; the gradient too."""
    group = mpu.get_tensor_model_parallel_group()
    largest = logits_BSV.detach().amax(-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    total = SumOverShards.apply((logits_BSV - largest).exp().sum(-1, keepdim=True))
    return logits_BSV - largest - total.log()


class SumOverShards(torch.autograd.Function):
    """A sum that every rank goes on with in its own way, so that gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """[B, S, 1] of this rank -> their sum."""
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """What all ranks' uses of the sum ask for."""
        return _summed(grad)


def _summed(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    dist.all_reduce(out, group=mpu.get_tensor_model_parallel_group())
    return out


def forward_step(teacher: GPTModel | None, vocab_size: int) -> Step:
    """What Megatron's schedules call for a microbatch of token ids [B, S + 1]."""

    def step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Callable]:
        tokens = next(batches).to(next(model.parameters()).device)
        ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
        mask = mask.triu(1)
        if teacher is None:
            return model(ids, positions, mask, labels=labels), lambda losses: reported(
                losses.mean()
            )
        with torch.no_grad():
            target = teacher(ids, positions, mask)
        return model(ids, positions, mask), lambda logits: reported(
            divergence(logits, target, vocab_size)
        )

    return step


def reported(loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return loss, {"loss": loss.detach().clone()}


@dataclass
class Trainer:
    """A student in DistributedDataParallel with its optimizer."""

    model: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler
    step: Step

    def train(self, microbatches: Sequence[torch.Tensor]) -> float:
        """One step on this data-parallel rank's microbatches; the mean loss before it."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=self.step,
            data_iterator=iter(microbatches),
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=microbatches[0].shape[1] - 1,
            micro_batch_size=microbatches[0].shape[0],
            forward_only=False,
        )
        self.optimizer.step()
        self.scheduler.step(increment=1)
        loss = torch.stack([one["loss"] for one in found]).mean()
        dist.all_reduce(loss, group=mpu.get_data_parallel_group())
        return loss.item() / mpu.get_data_parallel_world_size()


def wrap(student: GPTModel, args: argparse.Namespace, step: Step) -> Trainer:
    config = student.config
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    half = config.bf16 or config.fp16
    inner = Float16Module(config, student) if half else student
    model = [DistributedDataParallel(config, ddp, inner)]
    config.finalize_model_grads_func = finalize_model_grads
    settings = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.lr / 10,
        weight_decay=0.0,
        clip_grad=1.0,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(settings, model)
    config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.lr / 10,
        lr_warmup_steps=args.train_steps // 20,
        lr_decay_steps=args.train_steps,
        lr_decay_style="cosine",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=args.train_steps,
        wd_incr_style="constant",
    )
    return Trainer(model, optimizer, scheduler, step)


def read_batches(args: argparse.Namespace, source: Path) -> list[torch.Tensor]:
    """Microbatches [B, S + 1], in an order of their own."""
    texts, length = load_texts(args.train_data), args.seq_length + 1
    wanted = args.train_steps * args.global_batch_size
    tokens = sum(map(len, texts)) // 4  # at the very least, of any tokenizer's text
    found = token_batches(
        texts, load_tokenizer(source), min(wanted, max(1, tokens // length)), length, 1
    )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(args.seed))
    samples = [found[i] for i in order]
    samples = [samples[i % len(samples)] for i in range(wanted)]
    size = args.micro_batch_size
    return [torch.cat(samples[i : i + size]) for i in range(0, wanted, size)]


def calibrate(callback: QuantCallback, inputs: Inputs, student: GPTModel) -> None:
    """As `quantize` does, so that training starts from what that would export."""
    if inputs.batches:
        rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        own = shard(inputs.batches, rank, size)
        callback.calibrate([lambda ids=ids: forward(student, ids) for ids in own])


def train(args: argparse.Namespace, inputs: Inputs, groups: Groups) -> Any:
    """The trained student, as :func:`quantized` has it."""
    job = inputs.job
    batches = together(groups, lambda: read_batches(args, job.source))

    def load() -> GPTModel:
        parts = (inputs.checkpoint, job.architecture, job.layout, groups, job.dtype)
        return load_model(*parts, lambda steps: None).module

    teacher, student = load() if args.kd_teacher == "bf16" else None, load()
    scales = ExpertScales(args.expert_scales)
    prepare([student], job.recipe, hf_model=job.hf_config, expert_scales=scales)
    frozen = args.freeze_before
    callback = QuantCallback(Schedule(calibrate_before=0, every=args.every, freeze_before=frozen))
    step = forward_step(teacher, job.hf_config["vocab_size"])
    trainer = wrap(student, args, step)
    callback.start(trainer.model)
    calibrate(callback, inputs, student)
    student.train()
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    count, started = len(batches) // args.train_steps, time.monotonic()
    for number in range(args.train_steps):
        callback.on_step_begin(number)
        own = batches[number * count : (number + 1) * count][rank::size]
        loss = trainer.train(own)
        callback.on_step_end(number)
        if (number + 1) % args.log_every == 0 or number == 0:
            seconds = time.monotonic() - started
            say(f"step {number + 1}/{args.train_steps}  loss {loss:.5f}  {seconds:.0f} s")
    callback.on_save(args.train_steps)
    callback.finish(args.train_steps)
    return quantized(trainer.model)


def write(inputs: Inputs, trained: Any, options: QuantizeOptions) -> None:
    model, beside = trained.model, inputs.companions
    amaxes = [
        (layer.name, [float(q.amax.sum()) for q in layer.quantizers if q.amax is not None])
        for layer in trained.layers
    ]
    origin = replace(beside.origin, statistics=digest_of(["trained", *amaxes]))
    files = replace(beside, origin=origin)
    produce = producer(model, trained.layers)
    args = (inputs.existing, lambda nbytes: None, inputs.writing)
    export(inputs.job.export, model.groups, produce, options.export_dir, files, *args)
    if model.groups.rank == 0:
        verify(options.export_dir).raise_for_problems()
    say(f"saved {options.export_dir}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--hf-model-id", required=True, help=" ")
    parser.add_argument("--export-quant-cfg", required=True, help="recipe, as of quantize")
    parser.add_argument("--export-dir", type=Path, required=True, help=" ")
    parser.add_argument("--train-data", default="stdlib", help="texts, as --calib-dataset")
    parser.add_argument("--kd-teacher", choices=("bf16", "none"), default="bf16", help=" ")
    for flag, default in {
        "tp": 1,
        "ep": 1,
        "etp": 1,
        "train-steps": 200,
        "seq-length": 128,
        "micro-batch-size": 4,
        "global-batch-size": 8,
        "calib-size": 32,
        "every": 10,
        "log-every": 20,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=" ")
    parser.add_argument("--freeze-before", type=int, help="ranges stay from this step on")
    parser.add_argument("--lr", type=float, default=1e-5, help=" ")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help=" ")
    parser.add_argument("--expert-scales", default="shared", help="as of quantize")
    parser.add_argument("--export-format", default="modelopt", help="as of quantize")
    parser.add_argument("--calib-dataset", default="stdlib", help="as of quantize")
    parser.add_argument("--overwrite", action="store_true", help="as of quantize")
    return parser.parse_args()


def check(args: argparse.Namespace, world: int) -> None:
    ranks = world // args.tp
    if args.train_steps < 1 or args.global_batch_size % (args.micro_batch_size * ranks):
        raise QuantError(
            f"--global-batch-size {args.global_batch_size} is no multiple of --micro-batch-size "
            f"{args.micro_batch_size} times {ranks} data-parallel ranks, or --train-steps "
            f"{args.train_steps} is below 1: change them"
        )


def run(args: argparse.Namespace) -> None:
    groups = start_distributed()
    fields = ("hf_model_id", "export_quant_cfg", "export_dir", "tp", "ep", "etp", "calib_size")
    names = (*fields, "calib_dataset", "expert_scales", "export_format", "overwrite", "dtype")
    options = QuantizeOptions(
        **{name: getattr(args, name) for name in names}, calib_seq_length=args.seq_length
    )
    together(groups, lambda: check(args, groups.size))
    inputs = together(groups, lambda: open_inputs(options, groups.size))
    write(inputs, train(args, inputs, groups), options)


def main() -> int:
    try:
        run(parse())
    except QuantError as e:
        print_error(e)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
