"""The callback: when ranges are found, followed and frozen while a model trains."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_quant.errors import CalibrationError, QuantError
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_training import BATCHES


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    return checkpoints.save("qwen3_moe", path, num_experts=4, moe_intermediate_size=128)


def _prepared(path: Path, recipe: str, tp: int = 1, ep: int = 1) -> list:
    from megatron_quant.mcore.training import prepare
    from tests.dist import live, training

    return prepare(training.build(path, live.Parallelism(tp, ep)), recipe, hf_model=str(path))


def _scheduled(path: Path, tp: int, ep: int) -> tuple[list[str], list[dict[str, float]]]:
    """Lines said, and the ranges of inputs before each of five steps."""
    from megatron_quant.mcore.training import QuantCallback, Schedule
    from megatron_quant.mcore.live import quantized
    from tests.dist import training

    lines: list[str] = []
    schedule = Schedule(calibrate_before=1, warm_up=1, every=2, freeze_before=4)
    callback = QuantCallback(schedule, lines.append)
    script = training.wrap(_prepared(path, "fp8", tp, ep))
    callback.start(script.model)
    layers = quantized(script.model).layers
    found = []
    for step in range(5):
        callback.on_step_begin(step)
        enabled = {q.is_enabled for layer in layers for q in layer.quantizers}
        assert enabled == {step >= 2}
        script.step(BATCHES)
        callback.on_step_end(step)
        amaxes = {x.name: x.module.input_quantizer.amax for x in layers}
        found.append({name: float(a) for name, a in amaxes.items() if a is not None})
    callback.on_save(5)
    callback.finish(5)
    return lines, found


def test_ranges_are_found_followed_and_frozen(ranks: Ranks, moe: Path) -> None:
    ((lines, alone),) = ranks(1, _scheduled, moe, 1, 1)
    assert alone[0] == {} and alone[1].keys() == alone[2].keys() and alone[3] == alone[4]
    assert all(alone[3][name] >= amax for name, amax in alone[1].items())
    assert alone[3] != alone[1]
    assert [line.split(":")[1].strip() for line in lines[:3]] == ["step 1", "step 2", "step 4"]
    assert "calibrated" in lines[0] and "largest drift" in lines[1] and "decoder.layers." in lines[1]
    assert lines[3].startswith("quantizers: step 5: ") and "fp8 weights, ranges frozen (2" in lines[3]
    many = ranks(4, _scheduled, moe, 2, 2)
    assert [len(said) for said, _ in many] == [len(lines), 0, 0, 0]
    for _, found in many:
        assert found == many[0][1]
        assert found[1] == pytest.approx(alone[1], rel=1e-3)


def _late(path: Path) -> list[int]:
    """A run that goes on at step 7 without ranges; the steps that run quantized."""
    from megatron_quant.mcore.live import quantized
    from megatron_quant.mcore.training import QuantCallback
    from tests.dist import training

    script = training.wrap(_prepared(path, "fp8"))
    callback = QuantCallback(log=lambda line: None)
    callback.start(script.model)
    found = []
    for step in range(7, 10):
        callback.on_step_begin(step)
        if all(q.is_enabled for x in quantized(script.model).layers for q in x.quantizers):
            found.append(step)
        script.step(BATCHES)
        callback.on_step_end(step)
    return found


def test_a_run_that_goes_on_without_ranges_finds_them(ranks: Ranks, moe: Path) -> None:
    assert ranks(1, _late, moe) == [[8, 9]]


def _averaged(path: Path) -> None:
    from megatron_quant.calib.training import update_inputs
    from megatron_quant.mcore.live import quantized

    layers = quantized(_prepared(path, "fp8")).layers
    first = layers[0]
    for average, want in ((None, [4.0, 4.0, 6.0]), (0.5, [4.0, 3.0, 4.5])):
        first.module.input_quantizer.reset_amax()
        for newest, expected in zip([4.0, 2.0, 6.0], want, strict=True):
            update_inputs(layers, {first.name: newest}, average)
            assert float(first.module.input_quantizer.amax) == expected
    assert layers[1].module.input_quantizer.amax is None


def test_a_running_maximum_and_an_average(ranks: Ranks, moe: Path) -> None:
    ranks(1, _averaged, moe)


def _observed_once(path: Path) -> None:
    from megatron_quant.calib.observe import InputAmax
    from megatron_quant.calib.training import TrainingAmax
    from megatron_quant.mcore.live import quantized
    from megatron_quant.mcore.model.schedule import forward
    from tests.dist import training

    class Spy(InputAmax):
        calls = 0

        def __call__(self, module: torch.nn.Module, args: tuple) -> None:
            self.calls += 1
            super().__call__(module, args)

    class Watched(TrainingAmax, Spy):
        pass

    model = _prepared(path, "w4a16_nvfp4")
    config = model[0].config
    config.recompute_granularity, config.recompute_method = "full", "uniform"
    config.recompute_num_layers = 1
    script = training.wrap(model)
    layers = [x.module.input_quantizer for x in quantized(model).layers]
    spies, watched = [Spy() for _ in layers], [Watched() for _ in layers]
    for quantizer, *hooks in zip(layers, spies, watched, strict=True):
        for hook in hooks:
            quantizer.register_forward_pre_hook(hook)
    script.forward_backward(BATCHES)
    assert all(spy.calls >= 2 * len(BATCHES) for spy in spies), "nothing was recomputed"
    assert all(one.calls == len(BATCHES) for one in watched)
    forward(model[0].eval(), BATCHES[0])
    assert all(one.calls == len(BATCHES) for one in watched)


def test_what_is_recomputed_or_evaluated_is_not_observed(ranks: Ranks, moe: Path) -> None:
    ranks(1, _observed_once, moe)


def _bridge(path: Path) -> list[str]:
    """Megatron-Bridge's events, on a model in bf16."""
    from megatron.core.transformer.module import Float16Module

    from megatron_quant.mcore.training import QuantCallback, Schedule
    from megatron_quant.mcore.live import quantized
    from megatron_quant.mcore.training import wrap_provider
    from tests.dist import live, training

    def provider(pre_process: bool = True, post_process: bool = True) -> torch.nn.Module:
        return training.build(path, live.Parallelism(), torch.bfloat16)[0]

    provide = wrap_provider(provider, "nvfp4_mse", hf_model=str(path))
    module = provide(pre_process=True, post_process=True)
    script = training.wrap([Float16Module(module.config, module)], overlap_grad_reduce=True)
    amax = quantized(script.model).layers[0].module.weight_quantizer.amax
    assert amax.dtype is torch.bfloat16
    lines: list[str] = []
    callback = QuantCallback(Schedule(every=1), lines.append)
    train_state = SimpleNamespace(step=0)
    context = SimpleNamespace(model=script.model, state=SimpleNamespace(train_state=train_state))
    callback.on_train_start(context)
    for _ in range(2):
        callback.on_train_step_start(context)
        script.step(BATCHES)
        callback.on_train_step_end(context)
        train_state.step += 1  # Megatron-Bridge counts after the event
    callback.on_checkpoint_save(context)
    callback.on_train_end(context)
    layers = quantized(script.model).layers
    assert all(q.amax.dtype is torch.float32 for layer in layers for q in layer.quantizers)
    return lines


def test_bridges_events_and_sixteen_bits(ranks: Ranks, moe: Path) -> None:
    (lines,) = ranks(1, _bridge, moe)
    assert [line.split(":")[1] for line in lines] == [" step 1", *[" step 2"] * 3]


def _fail(path: Path, how: str) -> None:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_quant.mcore.training import QuantCallback, Schedule
    from megatron_quant.mcore.live import quantized
    from tests.dist import live, training

    if how == "average":
        Schedule(average=1.5)
    if how == "steps":
        Schedule(every=-1)
    if how == "freeze":
        Schedule(calibrate_before=5, freeze_before=2)
    if how == "start":
        QuantCallback().on_step_begin(0)
    if how == "plain":
        quantized(training.build(path, live.Parallelism()))
    model = _prepared(path, "fp8")
    callback = QuantCallback(Schedule(every=1), lambda line: None)
    callback.start(model)
    callback.on_step_begin(0)
    if how == "inf":
        with torch.no_grad():
            quantized(model).layers[1].weights()[0][0, 0] = torch.inf
        callback.finish(1)
        callback.on_step_begin(1)
    if how == "unseen":
        callback.on_step_begin(1)
    state = getattr(FP8GlobalStateManager, "quantization_state", FP8GlobalStateManager)
    name = "FP8_ENABLED" if hasattr(state, "FP8_ENABLED") else "fp8_enabled"  # by releases
    setattr(state, name, True)  # what te.autocast does where the device can
    training.wrap(model).forward_backward(BATCHES)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("average", QuantError, "average=1.5: give a share"),
        ("steps", QuantError, "every=-1: give 0 or more"),
        ("freeze", QuantError, "freeze_before=2 is before calibrate_before=5"),
        ("start", QuantError, "the callback has no model: call start"),
        ("plain", QuantError, "GPTModel has no quantizers: pass it to"),
        ("inf", CalibrationError, "is NaN or Inf in training"),
        ("unseen", CalibrationError, "no token reached decoder.layers.0"),
        ("autocast", QuantError, "within Transformer Engine's fp8 autocast"),
    ],
)
def test_refusals(ranks: Ranks, moe: Path, how: str, kind: type, words: str) -> None:
    (error,) = ranks.errors(1, _fail, moe, how)
    assert isinstance(error, kind), error
    assert words in str(error)
