"""Training through the quantizers, by Megatron's own loop, DDP and optimizers."""

from pathlib import Path

import pytest
import torch

from megatron_quant.errors import QuantError
from megatron_quant.models import Pipeline
from tests.dist import checkpoints
from tests.dist.pool import Ranks

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
    from megatron_quant.mcore.training import QuantCallback, Schedule
    from megatron_quant.mcore.training import prepare
    from tests.dist import live, training

    tp, ep, pipeline = layout
    model = training.build(path, live.Parallelism(tp, ep, pipeline=pipeline))
    if fused:
        training.fuse(model)
    callback = QuantCallback(Schedule(calibrate_before=0), log=lambda line: None)
    callback.start(prepare(model, recipe, hf_model=str(path)))
    from megatron_quant.mcore.model.schedule import forward

    callback.calibrate([lambda ids=ids: forward(model, ids) for ids in BATCHES])
    callback.on_step_begin(0)
    return training.wrap(model, **ddp)


def _gradients(
    path: Path, recipe: str, layout: Layout, fused: bool, batches: list[torch.Tensor] = BATCHES
) -> tuple[float, dict]:
    from tests.dist import training

    script = _script(path, recipe, layout, fused, use_distributed_optimizer=False)
    loss = script.forward_backward(batches)
    return loss, training.slices(script, training.gradient)


def _steady(path: Path, recipe: str, candidates: list[list[torch.Tensor]]) -> int:
    """The first of ``candidates`` whose codes do not depend on a rounding in fp32.

    No input of a quantized layer, moved by a millionth of the largest one beside it, is quantized
    to another value.
    """
    from megatron_quant.mcore.live import quantized

    script, held = _script(path, recipe, ALONE, False, use_distributed_optimizer=False), []

    def watch(quantizer: torch.nn.Module, args: tuple[torch.Tensor, ...], out: object) -> None:
        x = args[0].detach()
        off = 1e-6 * x.abs().amax(-1, keepdim=True)
        held.append(all(torch.equal(quantizer.forward(x + d), out) for d in (off, -off)))

    for layer in quantized(script.model).layers:
        layer.module.input_quantizer.register_forward_hook(watch)
    for index, batches in enumerate(candidates):
        held.clear()
        script.forward_backward(batches)
        if all(held):
            return index
    raise AssertionError("some input of all candidates is on the edge of a quantization step")


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


def _assert_equal_gradients(
    ranks: Ranks, path: Path, recipe: str, batches: list[torch.Tensor]
) -> None:
    """At TP 2 x EP 2 with fused weight gradients those of one rank, to rounding in fp32."""
    (alone,) = ranks(1, _gradients, path, recipe, ALONE, False, batches)
    fused = ranks(4, _gradients, path, recipe, (2, 2, Pipeline()), True, batches)
    assert sum(loss for loss, _ in fused) / 4 == pytest.approx(alone[0], rel=1e-6)
    want, got = whole([alone[1]]), whole([gradients for _, gradients in fused])
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        assert float((got[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


@pytest.mark.parametrize("recipe", ["w4a16_nvfp4", "int4"])
def test_a_step_has_the_single_ranks_gradients(ranks: Ranks, moe: Path, recipe: str) -> None:
    _assert_equal_gradients(ranks, moe, recipe, BATCHES)


def assert_equal_gradients_of_codes(ranks: Ranks, path: Path) -> None:
    """Where all inputs have the same codes: none is so near the edge that a rounding moves it."""
    generator = torch.Generator().manual_seed(5)
    candidates = list(torch.randint(258, (30, 2, 1, 4), generator=generator))
    candidates = [list(microbatches) for microbatches in candidates]
    (chosen,) = ranks(1, _steady, path, "nvfp4", candidates)
    _assert_equal_gradients(ranks, path, "nvfp4", candidates[chosen])


def test_quantized_inputs_have_the_single_ranks_gradients(ranks: Ranks, moe: Path) -> None:
    assert_equal_gradients_of_codes(ranks, moe)


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


def _main(path: Path, tp: int, ep: int, pipeline: Pipeline = Pipeline()) -> list[list[float]]:
    from tests.dist import live, training

    return training.main(path, live.Parallelism(tp, ep, pipeline=pipeline), BATCHES)


def _assert_trains_alike(found: list[list[list[float]]], alone: list[list[float]]) -> None:
    losses, norms = torch.tensor(found).nanmean(0).tolist()
    assert losses == pytest.approx(alone[0], rel=1e-3)
    assert norms == pytest.approx(alone[1], rel=1e-2)


def test_a_megatron_script_needs_one_line(ranks: Ranks, moe: Path) -> None:
    (alone,) = ranks(1, _main, moe, 1, 1)
    assert alone[0][0] > alone[0][1] > alone[0][2]
    _assert_trains_alike(ranks(4, _main, moe, 2, 2), alone)


def test_the_line_takes_virtual_stages(ranks: Ranks, deep: Path) -> None:
    """Three steps of the distributed optimizer, at PP 2 x EP 2 of two chunks each."""
    (alone,) = ranks(1, _main, deep, 1, 1)
    _assert_trains_alike(ranks(4, _main, deep, 1, 2, Pipeline(2, 2)), alone)


def _prepare(path: Path, change: str) -> None:
    from megatron_quant.mcore.training import prepare, wrap_provider
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
        ("wrapped", "already wrapped in DistributedDataParallel: call prepare earlier"),
        ("chunks", "comes in 2 chunks, but a pipeline rank has 1 virtual stages"),
        ("provider", "has no parameter pre_process, so it is no model provider"),
    ],
)
def test_refusals(ranks: Ranks, moe: Path, change: str, words: str) -> None:
    (error,) = ranks.errors(1, _prepare, moe, change)
    assert isinstance(error, QuantError), error
    assert words in str(error)


def _never_called(path: Path, kept: bool) -> str:
    """What wrapping says where the loop trains a model of its own; and that it ends with a call."""
    from megatron.core.transformer.module import Float16Module

    from megatron_quant.mcore.training import prepare, wrap_provider
    from tests.dist import live, training

    def model_provider(pre_process: bool = True, post_process: bool = True) -> torch.nn.Module:
        return model[0]

    model = training.build(path, live.Parallelism(), torch.bfloat16)
    provide = wrap_provider(model_provider, "w4a16_nvfp4", hf_model=str(path))
    if not kept:
        del provide
        training.wrap(model)
        return ""
    for wrapped in ([Float16Module(model[0].config, model[0])], model):
        try:
            training.wrap(wrapped)
        except QuantError as e:
            said = str(e)
        else:
            raise AssertionError("it trains without quantizers")
    (other,) = prepare(training.build(path, live.Parallelism(), torch.bfloat16), "fp8", hf_model=str(path))
    training.wrap([Float16Module(other.config, other)])
    provide(pre_process=True, post_process=True)
    training.wrap(training.build(path, live.Parallelism(), torch.bfloat16))
    return said


def test_a_loop_that_never_calls_the_provider(ranks: Ranks, moe: Path) -> None:
    for said in ranks(2, _never_called, moe, True):
        assert said.startswith("this loop did not call model_provider, which wrap_provider gave")
        assert "pre_wrap_hooks" in said
    assert ranks(1, _never_called, moe, False) == [""]
