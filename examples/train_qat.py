"""Train a model through its quantizers, in Megatron's own loop, and export it.

torchrun --nproc-per-node 4 examples/train_qat.py --hf-model-id PATH --export-quant-cfg nvfp4 \
    --tp 2 --ep 2 --train-steps 200 --kd-teacher bf16 --train-data TEXTS --export-dir OUT

The student starts as the calibrated model that `quantize` would export. With `--start-from DIR` it
starts as the model that `quantize --megatron-save-path DIR` saved, such as one of `--algorithm
gptq`, whose scales `--learn-scales` learns too. It learns to give the original model's logits
(`--kd-teacher bf16`), or to predict the text (`none`).

With `--save-dir RUN --save-every 50` the run is saved. The same command continues from the last
save, also with other --tp, --ep, --etp and --pp.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megatron_quant as mq

if not torch.cuda.is_available():
    mq.use_cpu()

import torch.distributed as dist
from distillation import divergence
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
from megatron.core.transformer.module import Float16Module

from megatron_quant.calib import ScaleLearner
from megatron_quant.calib.data import load_texts, shard, token_batches
from megatron_quant.cli.failure import fail
from megatron_quant.dist import Groups, together
from megatron_quant.errors import QuantError
from megatron_quant.evaluation.tokenizer import load_tokenizer
from megatron_quant.layers.install import ExpertScales
from megatron_quant.mcore.model.load import load_model
from megatron_quant.mcore.model.parallel import start_distributed
from megatron_quant.mcore.model.schedule import run_schedule as run_model
from megatron_quant.mcore.training import QuantCallback, Schedule, learn_scales, prepare
from megatron_quant.mcore.training.train_state import (
    TrainProgress,
    last_save,
    load_progress,
    save_run,
)
from megatron_quant.runs.inputs import Inputs, open_inputs, with_texts
from megatron_quant.runs.options import QuantizeOptions

Microbatch = tuple[torch.Tensor, torch.Tensor | None]
"""Token ids [B, S + 1], and the teacher's logits of the first S if the rank has any."""
PIECE = 4096  # characters of the text that stay together
# Flags that must stay the same when a run continues.
SETTINGS = (
    *("train_steps", "global_batch_size", "seq_length", "lr", "seed", "kd_teacher", "train"),
    *("learn_scales", "scale_lr"),
)


def say(*words: object) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def forward_step(vocab_size: int) -> Callable[..., Any]:
    """Return the function that Megatron's schedules call for each chunk and microbatch."""

    def step(batches: Iterator[Microbatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        tokens, target = next(batches)
        tokens = tokens.to(next(model.parameters()).device)
        ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
        if target is None:
            out = model(ids, positions, mask.triu(1), labels=labels)
            return out, lambda losses: reported(losses.mean())
        out = model(ids, positions, mask.triu(1))
        return out, lambda logits: reported(divergence(logits, target, vocab_size))

    return step


def reported(loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return loss, {"loss": loss.detach().clone()}


@dataclass
class Trainer:
    """A student in DistributedDataParallel with its optimizer, and its teacher.

    teacher: chunks of the original model; None if the student learns the text.
    """

    model: list[DistributedDataParallel]
    teacher: Sequence[GPTModel] | None
    optimizer: Any
    scheduler: OptimizerParamScheduler
    step: Callable[..., Any]
    scales: ScaleLearner | None = None

    def learn_scales(self, lr: float) -> None:
        """Learn the scales of gptq from now on, by gradients of weights that are not reduced."""
        self.scales = found = learn_scales(self.model, lr)
        config, reduce = self.model[0].config, self.model[0].config.finalize_model_grads_func

        def finalize(*args: Any, **kwargs: Any) -> None:
            found.collect()
            reduce(*args, **kwargs)

        config.finalize_model_grads_func = finalize

    def train(self, microbatches: Sequence[torch.Tensor]) -> float:
        """Do one step on this data-parallel rank's microbatches; return the mean loss before it."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = self._with_targets(microbatches)
        feeds = [iter(batches) for _ in self.model]
        found = get_forward_backward_func()(
            forward_step_func=self.step,
            data_iterator=feeds if len(feeds) > 1 else feeds[0],
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=microbatches[0].shape[1] - 1,
            micro_batch_size=microbatches[0].shape[0],
            forward_only=False,
        )
        self.optimizer.step()
        if self.scales is not None:
            group = self.optimizer.param_groups[0]
            self.scales.step(group["lr"] / self.scheduler.max_lr)
        self.scheduler.step(increment=1)
        device = next(self.model[0].parameters()).device
        return mean_of_ranks([one["loss"] for one in found], device)

    def _with_targets(self, microbatches: Sequence[torch.Tensor]) -> list[Microbatch]:
        if self.teacher is None:
            return [(tokens, None) for tokens in microbatches]
        ids = [tokens[:, :-1].contiguous() for tokens in microbatches]
        with torch.no_grad():
            logits = run_model(self.teacher, ids, lambda logits: logits)
        nothing = torch.empty(0)  # stages before the last do not use it
        return list(zip(microbatches, logits or [nothing] * len(ids), strict=True))


def mean_of_ranks(losses: Sequence[torch.Tensor], device: torch.device) -> float:
    """Average over the ranks that have losses: those of the last stage."""
    found = torch.tensor([float(sum(losses)), float(len(losses))], device=device)
    dist.all_reduce(found)
    return float(found[0] / found[1])


def wrap(
    student: Sequence[GPTModel],
    teacher: Sequence[GPTModel] | None,
    args: argparse.Namespace,
    vocab_size: int,
) -> Trainer:
    config = student[0].config
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    half = config.bf16 or config.fp16
    model = [
        DistributedDataParallel(config, ddp, Float16Module(config, chunk) if half else chunk)
        for chunk in student
    ]
    config.finalize_model_grads_func = finalize_model_grads
    settings = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=0.0,
        weight_decay=0.0,
        adam_beta2=0.95,  # runs are short, and an expert's gradients come and go
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
        min_lr=0.0,
        lr_warmup_steps=args.train_steps // 20,
        lr_decay_steps=args.train_steps,
        lr_decay_style="cosine",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=args.train_steps,
        wd_incr_style="constant",
    )
    return Trainer(model, teacher, optimizer, scheduler, forward_step(vocab_size))


def read_batches(args: argparse.Namespace, source: Path) -> list[torch.Tensor]:
    """Return microbatches [B, S + 1] from all over the text, shuffled."""
    texts, length = load_texts(args.train_data), args.seq_length + 1
    pieces = [text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)]
    random.Random(args.seed).shuffle(pieces)
    wanted = args.train_steps * args.global_batch_size
    tokens = sum(map(len, pieces)) // 4  # no tokenizer makes fewer of a text
    found = token_batches(
        pieces, load_tokenizer(source), min(wanted, max(1, tokens // length)), length, 1
    )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(args.seed))
    samples = [found[i] for i in order]
    samples = [samples[i % len(samples)] for i in range(wanted)]
    size = args.micro_batch_size
    return [torch.cat(samples[i : i + size]) for i in range(0, wanted, size)]


def calibrate(callback: QuantCallback, inputs: Inputs, student: Sequence[GPTModel]) -> None:
    """Calibrate as `quantize` does, so that training starts from what that would export."""
    if inputs.batches:
        rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        own = shard(inputs.batches, rank, size)
        callback.calibrate([lambda: run_model(student, own, lambda logits: None)])


def last_saved(args: argparse.Namespace, groups: Groups) -> TrainProgress | None:
    """Return the save that the run continues from; None if it starts."""
    saved = last_save(args.save_dir, groups) if args.save_dir else None
    for name in SETTINGS if saved else ():
        if (before := saved.settings.get(name)) != getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise QuantError(
                f"{flag} is {getattr(args, name)}, but the run in {args.save_dir} has {before}: "
                "give that, or another --save-dir"
            )
    return saved


def train(args: argparse.Namespace, inputs: Inputs, groups: Groups) -> mq.Quantized:
    """Train, and return the handle of the student."""
    job, saved = inputs.job, last_saved(args, groups)
    batches = together(groups, lambda: read_batches(args, job.source))

    def load() -> Sequence[GPTModel]:
        parts = (inputs.checkpoint, job.architecture, job.layout, groups, job.dtype)
        return load_model(*parts, lambda steps: None).chunks

    teacher, student = load() if args.kd_teacher == "bf16" else None, list(load())
    from_path, scales = saved.path if saved else args.start_from, ExpertScales(args.expert_scales)
    prepare(student, job.recipe, from_path, hf_model=job.source, expert_scales=scales)
    choose_trained(student, args.train)
    trainer = wrap(student, teacher, args, job.hf_config["vocab_size"])
    frozen = args.freeze_before
    callback = QuantCallback(Schedule(calibrate_before=0, every=args.every, freeze_before=frozen))
    callback.start(trainer.model)
    if args.learn_scales:
        trainer.learn_scales(args.scale_lr)
    if from_path is None:
        calibrate(callback, inputs, student)
    if saved is not None:
        load_progress(saved, trainer.model, trainer.optimizer)
        trainer.scheduler.step(increment=saved.step)
        say(f"continues from {saved.path}")
    for chunk in student:
        chunk.train()
    loop(args, trainer, callback, batches, saved.step if saved else 0)
    callback.finish(args.train_steps)
    return mq.quantized(trainer.model)


def choose_trained(student: Sequence[GPTModel], which: str) -> None:
    """Freeze unquantized weights, if only quantized ones shall make up for their rounding."""
    if which == "quantized":
        chosen = {id(p) for layer in mq.quantized(student).layers for p in layer.parameters}
        for parameter in (p for chunk in student for p in chunk.parameters()):
            parameter.requires_grad_(id(parameter) in chosen)


def loop(
    args: argparse.Namespace,
    trainer: Trainer,
    callback: QuantCallback,
    batches: Sequence[torch.Tensor],
    first: int,
) -> None:
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    count, started = len(batches) // args.train_steps, time.monotonic()
    settings = {name: getattr(args, name) for name in SETTINGS}
    for step in range(first + 1, args.train_steps + 1):
        callback.on_step_begin(step - 1)
        loss = trainer.train(batches[(step - 1) * count : step * count][rank::size])
        callback.on_step_end(step - 1)
        last = step == args.train_steps
        if step % args.log_every == 0 or step == 1 or last:
            seconds = time.monotonic() - started
            say(f"step {step}/{args.train_steps}  loss {loss:.5f}  {seconds:.0f} s")
        if args.save_dir and (step % args.save_every == 0 or last):
            callback.on_save(step)
            save_run(args.save_dir, step, settings, trainer.model, trainer.optimizer)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--hf-model-id", required=True, help=" ")
    parser.add_argument("--export-quant-cfg", required=True, help="recipe, as for quantize")
    parser.add_argument("--export-dir", type=Path, required=True, help=" ")
    parser.add_argument("--algorithm", help="as for quantize; gptq needs --start-from")
    parser.add_argument("--damp", type=float, help="as for quantize")
    parser.add_argument(
        "--start-from", type=Path, help="checkpoint of quantize --megatron-save-path, same recipe"
    )
    parser.add_argument("--train-data", default="stdlib", help="texts, as for --calib-dataset")
    parser.add_argument("--kd-teacher", choices=("bf16", "none"), default="bf16", help=" ")
    for flag, default in {
        "tp": 1,
        "pp": 1,
        "ep": 1,
        "etp": 1,
        "num-virtual-stages-per-pipeline-rank": 1,
        "train-steps": 200,
        "seq-length": 128,
        "micro-batch-size": 4,
        "global-batch-size": 8,
        "calib-size": 32,
        "every": 10,
        "log-every": 20,
        "save-every": 50,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=" ")
    parser.add_argument("--freeze-before", type=int, help="ranges stay from this step on")
    parser.add_argument("--lr", type=float, default=1e-4, help=" ")
    parser.add_argument("--learn-scales", action="store_true", help="of weights that gptq rounded")
    parser.add_argument("--scale-lr", type=float, default=1e-3, help="largest relative step")
    parser.add_argument(
        "--train", choices=("quantized", "all"), default="quantized", help="which weights"
    )
    parser.add_argument("--save-dir", type=Path, help="save the run here, and continue it here")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help=" ")
    parser.add_argument("--expert-scales", default="shared", help="as for quantize")
    parser.add_argument("--export-format", default="modelopt", help="as for quantize")
    parser.add_argument("--calib-dataset", default="stdlib", help="as for quantize")
    parser.add_argument("--overwrite", action="store_true", help="as for quantize")
    return parser.parse_args()


def check(args: argparse.Namespace, world: int) -> None:
    ranks = world // (args.tp * args.pp)
    if args.train_steps < 1 or args.global_batch_size % (args.micro_batch_size * ranks):
        raise QuantError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of "
            f"--micro-batch-size {args.micro_batch_size} times {ranks} data-parallel ranks, and "
            f"--train-steps {args.train_steps} at least 1"
        )
    microbatches = args.global_batch_size // (args.micro_batch_size * ranks)
    if args.num_virtual_stages_per_pipeline_rank > 1 and microbatches % args.pp:
        raise QuantError(
            f"--global-batch-size {args.global_batch_size} gives a rank {microbatches} "
            f"microbatches, but virtual stages need a multiple of --pp {args.pp}"
        )


def run(args: argparse.Namespace) -> None:
    groups = start_distributed()
    sizes = ("tp", "pp", "ep", "etp", "num_virtual_stages_per_pipeline_rank", "calib_size")
    fields = ("hf_model_id", "export_quant_cfg", "export_dir", *sizes)
    names = (
        *fields,
        "algorithm",
        "damp",
        "calib_dataset",
        "expert_scales",
        "export_format",
        "overwrite",
        "dtype",
    )
    options = QuantizeOptions.from_flags(
        **{name: getattr(args, name) for name in names}, calib_seq_length=args.seq_length
    )
    together(groups, lambda: check(args, groups.size))
    inputs = together(groups, lambda: open_inputs(options, groups.size))
    inputs = with_texts(inputs, options, None, groups)
    trained = train(args, inputs, groups)
    mq.export(trained, args.export_dir, format=options.export_format, write=options.write)
    say(f"saved {args.export_dir}")


def main() -> int:
    try:
        run(parse())
    except QuantError as e:
        return fail(e)
    return 0


if __name__ == "__main__":
    sys.exit(main())
