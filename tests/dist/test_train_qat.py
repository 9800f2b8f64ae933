"""examples/train_qat.py: its loss, and killed runs that continue at another layout."""

import importlib
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_quant.errors import CheckpointError, QuantError
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_layouts import PATIENCE_S

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, EVERY = 6, 2
LAYOUTS = {"tp2-ep2": (4, "--tp 2 --ep 2"), "ep4": (4, "--ep 4"), "pp2": (2, "--pp 2")}


def _example(name: str) -> ModuleType:
    """In a test's own fork."""
    sys.path.insert(0, os.fspath(EXAMPLES))
    return importlib.import_module(name)


def _divergence(vocab_size: int) -> float:
    """Of shards of logits; raises unless it and its gradient are those of whole ones."""
    from megatron.core import parallel_state as mpu

    from tests.dist import tiny

    example = _example("distillation")
    tiny.start(tp=2)
    student, teacher = torch.randn(2, 2, 3, 12, generator=torch.Generator().manual_seed(0)) * 3
    whole = student[..., :vocab_size].clone().requires_grad_()
    log_q, log_p = whole.log_softmax(-1), teacher[..., :vocab_size].log_softmax(-1)
    want = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    want.backward()
    at = slice(6 * mpu.get_tensor_model_parallel_rank(), None)
    own = student[..., at][..., :6].clone().requires_grad_()
    got = example.divergence(own, teacher[..., at][..., :6], vocab_size)
    got.backward()
    real = whole.grad[..., at][..., :6]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(own.grad[..., : real.shape[-1]], real)
    return float(own.grad[..., real.shape[-1] :].abs().sum())


def test_the_example_distils_over_shards_of_the_vocabulary(ranks: Ranks) -> None:
    assert ranks(2, _divergence, 12) == ranks(2, _divergence, 11) == [0, 0]



@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 128}
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **sizes)


def _run(source: Path, out: Path, flags: str, dies: str = "") -> list[str]:
    """The example's lines; ``dies``: when one of the ranks is killed."""
    example, lines = _example("train_qat"), []
    data = f"--train-data {__file__} --calib-dataset {__file__} --calib-size 4 --seq-length 32"
    sizes = f"--train-steps {STEPS} --global-batch-size 4 --micro-batch-size 1 --log-every 1"
    kept = f"--save-dir {out / 'run'} --save-every {EVERY} --overwrite --dtype fp32 --lr 1e-3"
    paths = f"--hf-model-id {source} --export-dir {out / 'export'} --export-quant-cfg int4"
    sys.argv = ["train_qat.py", *f"{paths} {data} {sizes} {kept} --train all {flags}".split()]
    example.say = lambda *words: lines.append(" ".join(map(str, words)))
    if dies == "in step 4" and dist.get_rank() == 1:
        _die_in_step_4(example)
    if dies == "in the save of step 4" and dist.get_rank() == 0:
        _die_when_complete()
    example.run(example.parse())
    return lines


def _die_in_step_4(example: ModuleType) -> None:
    steps, train = iter(range(3)), example.Trainer.train

    def dying(self: object, microbatches: list[torch.Tensor]) -> float:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, microbatches)

    example.Trainer.train = dying


def _die_when_complete() -> None:
    """All of the second save is written, but for the word that it is the last."""
    replace = os.replace

    def dying(source: Path, target: Path) -> None:
        if target.name == "latest_checkpointed_iteration.txt":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying


def _loss(lines: list[str]) -> float:
    (last,) = (line for line in lines if line.startswith(f"step {STEPS}/{STEPS}  loss "))
    return float(last.split()[3])


def _last(run: Path) -> str:
    return (run / "latest_checkpointed_iteration.txt").read_text()


def test_a_killed_run_goes_on_at_another_layout(
    ranks: Ranks, source: Path, tmp_path: Path
) -> None:
    (undisturbed,) = ranks(1, _run, source, tmp_path / "undisturbed", "", timeout=PATIENCE_S)
    world, flags = LAYOUTS["tp2-ep2"]
    run = tmp_path / "killed" / "run"
    died = ranks.errors(world, _run, source, run.parent, flags, "in step 4", timeout=PATIENCE_S)
    assert str(died[1]) == "the process died" and _last(run) == "2"
    world, flags = LAYOUTS["ep4"]
    dies = "in the save of step 4"
    died = ranks.errors(world, _run, source, run.parent, flags, dies, timeout=PATIENCE_S)
    assert str(died[0]) == "the process died" and _last(run) == "2"
    assert (run / "iter_0000004").is_dir()
    world, flags = LAYOUTS["pp2"]
    lines = ranks(world, _run, source, run.parent, flags, timeout=PATIENCE_S)[0]
    assert f"continues from {run / 'iter_0000002'}" in lines
    assert _loss(lines) == pytest.approx(_loss(undisturbed), rel=0.01)
    assert _last(run) == str(STEPS) and not (run / "iter_0000002").exists()
    (other,) = ranks.errors(1, _run, source, run.parent, "--seed 1")
    assert isinstance(other, QuantError) and "--seed is 1, but the run in" in str(other)
    (run / f"iter_000000{STEPS}" / "progress.json").unlink()
    (other,) = ranks.errors(1, _run, source, run.parent, "")
    assert isinstance(other, CheckpointError) and "has no progress.json" in str(other)


def _saved_gptq(source: Path, out: Path) -> None:
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.runs.megatron import quantize_run
    from megatron_quant.runs.options import QuantizeOptions

    options = QuantizeOptions.from_flags(
        hf_model_id=str(source),
        export_quant_cfg="int4",
        algorithm="gptq",
        megatron_save_path=out / "saved",
        dtype="fp32",
        calib_dataset=__file__,
        calib_size=16,
        calib_seq_length=32,
    )
    quantize_run(options, start_distributed(), ConsolePhases(console()))


def _from_gptq(source: Path, out: Path) -> tuple[float, float]:
    """Losses of the first step: from calibration alone, and from what gptq rounded."""
    _saved_gptq(source, out)
    found = []
    for name, flags in (("max", ""), ("gptq", f"--algorithm gptq --start-from {out / 'saved'}")):
        lines = _run(source, out / name, flags)
        found.append(float(next(x for x in lines if x.startswith("step 1/")).split()[3]))
    return found[0], found[1]


def test_a_run_starts_from_what_gptq_rounded(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    ((plain, rounded),) = ranks(1, _from_gptq, source, tmp_path)
    assert rounded < 0.9 * plain


def _scale_gradients(source: Path, out: Path, flags: str) -> dict[str, torch.Tensor]:
    """Gradients of the scales in the second step, by layer; the first leaves weights on the grid.

    Raises unless each step moves the scales by up to ``--scale-lr``.
    """
    from megatron_quant.calib import ScaleLearner

    found: dict[str, torch.Tensor] = {}
    seen, step = [], ScaleLearner.step

    def noted(self: ScaleLearner, factor: float) -> None:
        before = [one.stat.clone() for one in self._learned]
        step(self, factor)
        moved = [(one.stat / b).log().abs().max() for one, b in zip(self._learned, before)]
        seen.append(float(max(moved)))
        if len(seen) == 2:
            found.update({one.layer.name: one.gradient for one in self._learned})

    ScaleLearner.step = noted
    _run(source, out, flags)
    assert len(seen) == STEPS and seen[0] == 0 and 1e-3 < seen[1] < 5e-3, seen
    return found


def test_scales_are_learned_alike_at_other_layouts(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    ranks(1, _saved_gptq, source, tmp_path)
    start = f"--algorithm gptq --start-from {tmp_path / 'saved'} --learn-scales --scale-lr 3e-3"
    (one,) = ranks(1, _scale_gradients, source, tmp_path / "one", start)
    flags = f"{start} --tp 2 --ep 2 --etp 1"
    two = ranks(2, _scale_gradients, source, tmp_path / "two", flags)
    for name, whole in one.items():
        dim = {"linear_proj": 2, "linear_qkv": 1}.get(name.rpartition(".")[2], 0)
        parts = torch.cat([of_rank[name] for of_rank in two], dim)
        assert torch.cosine_similarity(whole.flatten(), parts.flatten(), 0) > 0.999, name
    before, after = (load_file(tmp_path / n / "export" / "model.safetensors") for n in ("one", "two"))
    names = [name for name in before if name.endswith("weight_scale")]
    assert len(names) > 20
    for name in names:
        assert (before[name].float() / after[name].float()).log().abs().mean() < 0.01, name


def test_scales_that_follow_the_weights_are_not_learned(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    (error,) = ranks.errors(1, _run, source, tmp_path, "--learn-scales --scale-lr 0")
    assert "--scale-lr is 0: give a relative step above 0" in str(error)
    (error,) = ranks.errors(1, _run, source, tmp_path, "--learn-scales")
    assert "start from a checkpoint of --algorithm gptq (--start-from)" in str(error)
    assert not (tmp_path / "export").exists()
