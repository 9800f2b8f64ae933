"""Training through the quantizers, by Megatron's own loop, DDP and optimizers."""

import importlib.util
from pathlib import Path

import pytest
import torch

from megatron_quant.errors import QuantError
from megatron_quant.models import Pipeline
from tests.dist import checkpoints
from tests.dist.pool import Ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
BATCHES = [torch.arange(i, i + 2 * 32).mul(7).remainder(258).view(2, 32) for i in (0, 5, 11, 17)]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    return checkpoints.save("qwen3_moe", path, num_experts=4, moe_intermediate_size=128)


Layout = tuple[int, int, Pipeline]
"""Tensor- and expert-parallel size, and the pipeline."""
ALONE: Layout = (1, 1, Pipeline())


def _script(path: Path, recipe: str, layout: Layout, fused: bool, **ddp: bool) -> object:
    """A wrapped model whose inputs have ranges already."""
    from megatron_quant.mcore.callback import QuantCallback, Schedule
    from megatron_quant.mcore.hooks import prepare
    from tests.dist import live, training

    tp, ep, pipeline = layout
    model = training.build(path, live.Parallelism(tp, ep, pipeline=pipeline))
    if fused:
        training.fuse(model)
    callback = QuantCallback(Schedule(calibrate_before=0), log=lambda line: None)
    callback.start(prepare(model, recipe, hf_model=str(path)))
    from megatron_quant.mcore.run import forward

    callback.calibrate([lambda ids=ids: forward(model, ids) for ids in BATCHES])
    callback.on_step_begin(0)
    return training.wrap(model, **ddp)


def _gradients(path: Path, recipe: str, layout: Layout, fused: bool) -> tuple[float, dict]:
    from tests.dist import training

    script = _script(path, recipe, layout, fused, use_distributed_optimizer=False)
    loss = script.forward_backward(BATCHES)
    return loss, training.slices(script, training.gradient)


def whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """What ranks hold of each tensor, put together; where several hold it, they agree."""
    found: dict[str, torch.Tensor] = {}
    boxes = [(name, *piece) for held in ranks for name, pieces in held.items() for piece in pieces]
    for name, box, values in boxes:
        size = tuple(max(b[i].stop for n, b, _ in boxes if n == name) for i in range(len(box)))
        whole = found.setdefault(name, torch.full(size, torch.nan))
        before = whole[box]
        assert before.isnan().all() or torch.allclose(before, values, rtol=1e-5, atol=1e-7), name
        whole[box] = values
    assert not any(w.isnan().any() for w in found.values())
    return found


@pytest.mark.parametrize(
    ("recipe", "tolerance"),
    # Quantized inputs that differ by a rounding in fp32 may fall on either side of a step.
    [("w4a16_nvfp4", 1e-5), ("int4", 1e-5), ("nvfp4", 0.2)],
)
def test_a_step_has_the_single_ranks_gradients(
    ranks: Ranks, moe: Path, recipe: str, tolerance: float
) -> None:
    (alone,) = ranks(1, _gradients, moe, recipe, ALONE, False)
    fused = ranks(4, _gradients, moe, recipe, (2, 2, Pipeline()), True)
    assert sum(loss for loss, _ in fused) / 4 == pytest.approx(alone[0], rel=tolerance)
    want, got = whole([alone[1]]), whole([gradients for _, gradients in fused])
    assert want.keys() == got.keys()
    off = {name: float((got[name] - g).norm() / g.norm()) for name, g in want.items()}
    assert max(off.values()) < tolerance, off


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, of which one is dense."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 128, "intermediate_size": 128}
    path = tmp_path_factory.mktemp("deep")
    return checkpoints.save("qwen3_moe", path, num_hidden_layers=4, mlp_only_layers=[1], **sizes)


def _loss_of_ends(ranks: list[tuple[float, dict]]) -> float:
    """The mean of those ranks that have one."""
    found = torch.tensor([loss for loss, _ in ranks])
    return float(found.nanmean())


def test_stages_have_the_single_ranks_gradients(ranks: Ranks, deep: Path) -> None:
    """Inputs quantized: a microbatch is computed alike wherever its layers are."""
    (alone,) = ranks(1, _gradients, deep, "nvfp4", ALONE, False)
    want = whole([alone[1]])
    for pipeline in (Pipeline(2), Pipeline(2, 2)):
        staged = ranks(2, _gradients, deep, "nvfp4", (1, 1, pipeline), True)
        assert _loss_of_ends(staged) == pytest.approx(alone[0], rel=1e-6)
        got = whole([gradients for _, gradients in staged])
        assert want.keys() == got.keys()
        for name, gradient in want.items():
            assert float((got[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()), name


def _fused_equals_unfused(path: Path) -> None:
    from tests.dist import training

    found = [_gradients(path, "nvfp4", ALONE, fused)[1] for fused in (False, True)]
    for name, pieces in found[0].items():
        for (_, a), (_, b) in zip(pieces, found[1][name], strict=True):
            assert torch.equal(a, b), name
    script = _script(path, "nvfp4", ALONE, True)
    layer = script.model[0].module.decoder.layers[0]
    linears = (layer.mlp.experts.linear_fc1, layer.self_attention.linear_qkv)
    assert all(linear.fuse_wgrad_accumulation for linear in linears)
    script.forward_backward(BATCHES[:1])
    assert all(w.grad_added_to_main_grad for w in (linears[0].weight0, linears[1].weight))
    assert training.gradient(linears[0].weight0).any()


def test_fused_and_unfused_gradients_are_equal(ranks: Ranks, moe: Path) -> None:
    ranks(1, _fused_equals_unfused, moe)


def _main(path: Path, tp: int, ep: int, pipeline: Pipeline = Pipeline()) -> list[float]:
    from tests.dist import live, training

    return training.main(path, live.Parallelism(tp, ep, pipeline=pipeline), BATCHES)


def test_a_megatron_script_needs_one_line(ranks: Ranks, moe: Path) -> None:
    (alone,) = ranks(1, _main, moe, 1, 1)
    assert alone[0] > alone[1] > alone[2]
    many = torch.tensor(ranks(4, _main, moe, 2, 2)).mean(0)
    assert many.tolist() == pytest.approx(alone, rel=1e-3)


def test_the_line_takes_virtual_stages(ranks: Ranks, deep: Path) -> None:
    """Three steps of the distributed optimizer, at PP 2 x EP 2 of two chunks each."""
    (alone,) = ranks(1, _main, deep, 1, 1)
    many = torch.tensor(ranks(4, _main, deep, 1, 2, Pipeline(2, 2)))
    assert many.nanmean(0).tolist() == pytest.approx(alone, rel=1e-3)


def _divergence(vocab_size: int) -> float:
    """Of shards of logits; raises unless it and its gradient are those of whole ones."""
    from megatron.core import parallel_state as mpu

    from tests.dist import tiny

    spec = importlib.util.spec_from_file_location("train_qat", EXAMPLES / "train_qat.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
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


def _prepare(path: Path, change: str) -> None:
    from megatron_quant.mcore.hooks import prepare, wrap_provider
    from tests.dist import live, training

    model = training.build(path, live.Parallelism())
    if change == "fp8":
        model[0].config.fp8 = "hybrid"
    if change == "wrapped":
        model = training.wrap(model).model
    if change == "chunks":
        model = model * 2
    if change == "provider":
        wrap_provider(lambda config: model[0], "nvfp4", hf_model=str(path))
    prepare(model, "nvfp4", hf_model=str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("fp8", "fp8='hybrid' in the TransformerConfig"),
        ("wrapped", "wrapped in DistributedDataParallel already: call prepare before"),
        ("chunks", "comes in 2 chunks, and a pipeline rank has 1 virtual stages"),
        ("provider", "has no parameter pre_process, so it is no model provider"),
    ],
)
def test_refusals(ranks: Ranks, moe: Path, change: str, words: str) -> None:
    (error,) = ranks.errors(1, _prepare, moe, change)
    assert isinstance(error, QuantError), error
    assert words in str(error)
