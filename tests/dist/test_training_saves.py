"""A prepared model's checkpoints: their ranges, their names and ModelOpt's state."""

from pathlib import Path

import pytest
import torch

from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_training import BATCHES


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 128}
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"), **sizes)


def _prepared(path: Path, recipe: str, tp: int, ep: int, stages: int = 1) -> list:
    from megatron_quant.mcore.training import prepare
    from megatron_quant.models import Pipeline
    from tests.dist import live, training

    pipeline = Pipeline(2, stages) if stages > 1 else Pipeline()
    model = training.build(path, live.Parallelism(tp, ep, pipeline=pipeline))
    return prepare(model, recipe, hf_model=str(path))


Ranges = dict[str, list[float]]


def _ranges(layers: object) -> Ranges:
    return {x.name: x.weight_quantizer.amax.float().flatten().tolist() for x in layers}


def _trained(
    path: Path, tp: int, ep: int, every: int, freeze: int | None, event: bool = True
) -> tuple[Ranges, ...]:
    """Ranges at the start, after a step, after the save, and those of the weights beside them.

    event: whether the loop has one before a save.
    """
    from megatron_quant.calib import calibrate_weights
    from megatron_quant.mcore.live import quantized
    from megatron_quant.mcore.training import QuantCallback, Schedule
    from tests.dist import training

    script = training.wrap(_prepared(path, "fp8", tp, ep))
    schedule = Schedule(calibrate_before=0, every=every, freeze_before=freeze)
    callback = QuantCallback(schedule, log=lambda line: None)
    callback.start(script.model)
    callback.calibrate([lambda: script.forward_backward(BATCHES)])
    handle = quantized(script.model)
    found = [_ranges(handle.layers)]
    for step in range(2):
        callback.on_step_begin(step)
        script.step(BATCHES)
        callback.on_step_end(step)
    found.append(_ranges(handle.layers))
    if event:
        callback.on_save(2)
    else:
        found.append(_sharded(script.model))
    found.append(_ranges(handle.layers))
    if not event:
        assert found.pop(-2) == {name: values[0] for name, values in found[-1].items()}
    calibrate_weights(handle.layers, handle.plan, handle.model.groups)
    return *found, _ranges(handle.layers)


def _sharded(model: list) -> dict[str, float]:
    """Ranges of weights as a save of Megatron's gets them, by the layer's name."""
    from megatron.core import parallel_state as mpu

    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    end = ".weight_quantizer._amax"
    found = {}
    for chunk in model:
        for name, sharded in chunk.sharded_state_dict(metadata=metadata).items():
            if name.endswith(end):
                found[name.removesuffix(end).removeprefix("module.")] = float(sharded.data)
    return found


@pytest.mark.parametrize(("world", "tp", "ep"), [(1, 1, 1), (4, 2, 2)])
@pytest.mark.parametrize(("every", "event"), [(0, True), (10, True), (0, False)])
def test_a_save_has_the_ranges_of_its_weights(
    ranks: Ranks, moe: Path, world: int, tp: int, ep: int, every: int, event: bool
) -> None:
    """Whether or not the loop tells the callback of it."""
    for first, trained, saved, own in ranks(world, _trained, moe, tp, ep, every, None, event):
        assert first == trained != saved == own


@pytest.mark.parametrize("event", [True, False])
def test_frozen_ranges_stay(ranks: Ranks, moe: Path, event: bool) -> None:
    ((first, trained, saved, own),) = ranks(1, _trained, moe, 1, 1, 0, 1, event)
    assert first == trained == saved != own


def _no_callback(path: Path) -> None:
    from copy import deepcopy

    from megatron_quant.mcore.live import quantized

    (chunk,) = _prepared(path, "w4a16_nvfp4", 1, 1)
    layers = quantized(chunk).layers
    first = _ranges(layers)
    assert deepcopy(chunk.megatron_quant.hook) is None, "a copy's save would change this model"
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.mul_(2.0)
    assert _sharded([chunk]) == {name: 2 * values[0] for name, values in first.items()}


def test_a_save_follows_the_weights_without_a_callback(ranks: Ranks, moe: Path) -> None:
    ranks(1, _no_callback, moe)


def _requeued(path: Path, run: Path, tp: int) -> tuple[bool, Ranges]:
    """One script, started twice; whether it went on from a save, and its ranges."""
    from megatron_quant.mcore.live import quantized
    from megatron_quant.mcore.training import prepare
    from megatron_quant.mcore.training.train_state import save_run
    from tests.dist import live, training

    model = training.build(path, live.Parallelism(tp))
    model = prepare(model, "w4a16_nvfp4", hf_model=str(path), checkpoint_if_present=run)
    handle = quantized(model)
    script = training.wrap(model)
    script.step(BATCHES)
    save_run(run, 1, {}, script.model, script.optimizer)
    return bool(handle.stored), _ranges(handle.layers)


def test_one_script_starts_and_goes_on(ranks: Ranks, moe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    first = ranks(1, _requeued, moe, run, 1)
    second = ranks(2, _requeued, moe, run, 2)
    assert [went_on for went_on, _ in [*first, *second]] == [False, True, True]
    assert first[0][1] != second[0][1]


def _early(path: Path, run: Path, tp: int, steps: range) -> tuple[list[str], list[float | None]]:
    """A run of static inputs, stopped after ``steps``; its lines, and the inputs' ranges."""
    from megatron_quant.mcore.live import quantized
    from megatron_quant.mcore.training import QuantCallback, Schedule, prepare
    from megatron_quant.mcore.training.train_state import save_run
    from tests.dist import live, training

    model = training.build(path, live.Parallelism(tp))
    model = prepare(model, "fp8", hf_model=str(path), checkpoint_if_present=run)
    script, lines = training.wrap(model), []
    callback = QuantCallback(Schedule(calibrate_before=3, warm_up=1, every=0), lines.append)
    callback.start(script.model)
    quantizers = [layer.quantizers for layer in quantized(model).layers]
    for step in steps:
        callback.on_step_begin(step)
        assert {q.is_enabled for pair in quantizers for q in pair} == {step >= 4}, step
        script.step(BATCHES)
        callback.on_step_end(step)
    save_run(run, steps.stop, {}, script.model, script.optimizer)
    amaxes = [inputs.amax for _, inputs in quantizers]
    return lines, [amax if amax is None else float(amax) for amax in amaxes]


def _restored(path: Path, run: Path) -> None:
    import megatron_quant as mq
    from tests.dist import live, training

    mq.restore(training.build(path, live.Parallelism()), run, hf_model=str(path))


def test_a_run_goes_on_that_was_saved_before_its_calibration(
    ranks: Ranks, moe: Path, tmp_path: Path
) -> None:
    """Its inputs get their ranges when they would have; who cannot find them is told so."""
    run = tmp_path / "run"
    ((_, without),) = ranks(1, _early, moe, run, 1, range(1))
    assert set(without) == {None}
    (error,) = ranks.errors(1, _restored, moe, run)
    assert "before it was calibrated" in str(error)
    for lines, found in ranks(2, _early, moe, run, 2, range(1, 5)):
        assert None not in found
    assert lines == [] or lines[0].startswith("quantizers: step 3: calibrated")
    ranks(1, _restored, moe, run)


def _left(path: Path, out: Path, recipe: str, stages: int) -> tuple[set[str], set[str]]:
    """Names in plain state dicts and in sharded ones, beyond those of the bare model."""
    import modelopt.torch.opt as mto
    from megatron.core import parallel_state as mpu
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state

    from tests.dist import training

    chunks = _prepared(path, recipe, 1, 1, stages)
    for model in (chunks, training.wrap(chunks).model):
        assert not any(mto.ModeloptStateManager.is_converted(chunk) for chunk in model)
        save_sharded_modelopt_state(model, out)
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    sharded = [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    plain = [chunk.state_dict() for chunk in chunks]
    with torch.no_grad():
        for chunk, state in zip(chunks, plain, strict=True):
            old = {**state, "megatron_quant.description": torch.zeros(3, dtype=torch.uint8)}
            assert not any(chunk.load_state_dict(old))
    names = [{name for state in of for name in state} for of in (plain, sharded)]
    return names[0], names[1]


@pytest.mark.parametrize(("world", "stages"), [(1, 1), (2, 2)])
def test_plain_states_and_modelopts_modes_are_as_before(
    ranks: Ranks, moe: Path, tmp_path: Path, world: int, stages: int
) -> None:
    """With virtual stages ModelOpt's save would raise."""
    source = checkpoints.save("qwen3_moe", tmp_path / "deep", num_hidden_layers=4) if stages > 1 else moe
    for plain, sharded in ranks(world, _left, source, tmp_path / "out", "w4a16_nvfp4", stages):
        assert "megatron_quant.description" in sharded
        assert not any(name.startswith("megatron_quant") for name in plain)
    assert not (tmp_path / "out").exists()


def _distilling(path: Path) -> None:
    import modelopt.torch.opt as mto

    from megatron_quant.mcore.training import prepare
    from tests.dist import live, training

    model = training.build(path, live.Parallelism(1, 1))
    mto.ModeloptStateManager(model[0], init_state=True)
    model[0]._modelopt_state.append(("kd_loss", {"config": {}, "metadata": {}}))
    prepare(model, "w4a16_nvfp4", hf_model=str(path))
    assert [name for name, _ in model[0]._modelopt_state] == ["kd_loss"]


def test_modes_of_the_users_own_stay(ranks: Ranks, moe: Path) -> None:
    ranks(1, _distilling, moe)
