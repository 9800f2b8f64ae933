"""Delta nets in training: what the gates' rows multiply, and a run that goes on at another layout."""

from pathlib import Path

import pytest
import torch

import megatron_quant as mq
from megatron_quant.models import Pipeline
from tests.dist import checkpoints, plain
from tests.dist.pool import Ranks
from tests.dist.test_family_exports import SIZES
from tests.dist.test_layouts import tensors
from tests.dist.test_training import ALONE, BATCHES, Layout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("next")
    return checkpoints.save("qwen3_next", path, **SIZES["qwen3_next"])


def products(source: Path, fused: bool) -> None:
    """Of in_proj: its outputs and weight gradients are those of rounded inputs for quantized rows,
    and of the inputs as they are for those of b and a."""
    from megatron_quant.calib.learned_scales import _gradients
    from megatron_quant.mcore.live import quantized
    from tests.dist.test_train_qat import _example
    from tests.dist.test_training import _script

    script = _script(source, "nvfp4", ALONE, fused, use_distributed_optimizer=False)
    layer = next(x for x in quantized(script.model).layers if x.name.endswith(".0.self_attention.in_proj"))
    linear, rows = layer.module, layer.rows
    weight = linear.weight.detach()
    assert rows == len(weight) - 16 and linear.fuse_wgrad_accumulation is fused
    linear.is_first_microbatch = True  # a fused gradient then replaces what main_grad holds
    torch.manual_seed(0)
    x, dy = torch.randn(7, 2, 64), torch.randn(7, 2, len(weight))
    n = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + linear.layer_norm_weight.detach())
    seen: list[torch.Tensor] = []
    linear.input_quantizer.register_forward_pre_hook(lambda q, args: seen.append(args[0].detach()))
    out = linear(x.requires_grad_())[0]
    torch.testing.assert_close(seen[0].view_as(n), n)
    n, rounded = seen[0].view_as(n), layer.input_quantizer(seen[0]).view_as(n)
    assert (rounded - n).norm() > 0.01 * n.norm()
    w = layer.weight_quantizer(weight).detach()
    torch.testing.assert_close(out[..., :rows], rounded @ w[:rows].T)
    torch.testing.assert_close(out[..., rows:], n @ weight[rows:].T)
    linear.weight.main_grad.zero_()
    linear.weight.grad = None
    out.backward(dy)
    got = linear.weight.main_grad  # DDP adds what is not fused
    torch.testing.assert_close(got[:rows], dy[..., :rows].flatten(0, 1).T @ rounded.flatten(0, 1))
    torch.testing.assert_close(got[rows:], dy[..., rows:].flatten(0, 1).T @ n.flatten(0, 1))
    assert all(found.stat.count_nonzero() for found in _gradients(layer)), "scales would not move"
    _example("train_qat").choose_trained(script.model, "quantized")
    assert linear.weight.requires_grad and not linear.layer_norm_weight.requires_grad


@pytest.mark.parametrize("fused", [False, True])
def test_gates_multiply_inputs_that_nothing_rounded(source: Path, ranks: Ranks, fused: bool) -> None:
    ranks(1, products, source, fused)


def test_a_step_has_the_single_ranks_gradients(source: Path, ranks: Ranks) -> None:
    """Inputs quantized, weight gradients fused, at TP 2 x EP 2."""
    from tests.dist.test_training import assert_equal_gradients_of_codes

    assert_equal_gradients_of_codes(ranks, source)


def train(
    source: Path, start: Path, run: Path, layout: Layout, steps: range, out: Path
) -> list[float]:
    """Losses of ``steps``, which begin at ``start``, or go on from the last save in ``run``."""
    from megatron_quant.mcore.model import start_distributed
    from megatron_quant.mcore.training import QuantCallback, Schedule, prepare
    from megatron_quant.mcore.training.train_state import last_save, load_progress, save_run
    from tests.dist import live, training
    from tests.dist.test_training_plain import loaded_again

    tp, ep, pipeline = layout
    model = training.build(source, live.Parallelism(tp, ep, pipeline=pipeline))
    with torch.no_grad():
        for parameter in (p for chunk in model for p in chunk.parameters()):
            parameter.fill_(3.0)
    progress = last_save(run, start_distributed())
    assert (progress is None) == (steps.start == 0)
    model = prepare(model, "w4a8", start, hf_model=str(source), checkpoint_if_present=run)
    script = training.wrap(model)
    if progress is not None:
        load_progress(progress, script.model, script.optimizer)
    else:
        loaded_again([chunk.module for chunk in script.model], start / "iter_0000003")
        script.optimizer.reload_model_params()
    callback = QuantCallback(Schedule(calibrate_before=1), log=lambda line: None)
    callback.start(script.model)
    losses = []
    for step in steps:
        callback.on_step_begin(step)
        losses.append(script.step(BATCHES[:2]))
        callback.on_step_end(step)
    callback.on_save(steps.stop)
    save_run(run, steps.stop, {}, script.model, script.optimizer)
    mq.export(script.model, out)
    return losses


def export(source: Path, run: Path, out: Path) -> None:
    from tests.dist import live, training

    mq.export(mq.restore(training.build(source, live.Parallelism()), run, hf_model=str(source)), out)


def test_a_run_begins_plain_and_goes_on_at_another_layout(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Its losses are those of a run that was not stopped, its export that of its last save."""
    how = plain.Training((2, 1, 1), stacked=True, dtype=torch.float32)
    ranks(2, plain.save_run, source, tmp_path / "plain", how)
    begin = (source, tmp_path / "plain")
    (whole,) = ranks(1, train, *begin, tmp_path / "one", ALONE, range(3), tmp_path / "a")
    run, split, staged = tmp_path / "two", (2, 2, Pipeline()), (1, 1, Pipeline(2))
    first = torch.tensor(ranks(4, train, *begin, run, split, range(2), tmp_path / "b"))
    last = torch.tensor(ranks(2, train, *begin, run, staged, range(2, 3), tmp_path / "c"))
    losses = [*first.nanmean(0), *last.nanmean(0)]  # data parallel ranks, and the last stage
    assert losses == pytest.approx(whole, rel=5e-3) and whole[2] < whole[0]
    ranks(1, export, source, run, tmp_path / "d")
    found, want = tensors(tmp_path / "c"), tensors(tmp_path / "d")
    assert found.keys() == want.keys() and all(torch.equal(t, want[k]) for k, t in found.items())
