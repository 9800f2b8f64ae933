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


def _trained(path: Path, tp: int, ep: int, every: int, freeze: int | None) -> tuple[Ranges, ...]:
    """Ranges at the start, after a step, after the save, and those of the weights beside them."""
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
    callback.on_save(2)
    found.append(_ranges(handle.layers))
    calibrate_weights(handle.layers, handle.plan, handle.model.groups)
    return *found, _ranges(handle.layers)


@pytest.mark.parametrize(("world", "tp", "ep"), [(1, 1, 1), (4, 2, 2)])
@pytest.mark.parametrize("every", [0, 10])
def test_a_save_has_the_ranges_of_its_weights(
    ranks: Ranks, moe: Path, world: int, tp: int, ep: int, every: int
) -> None:
    for first, trained, saved, own in ranks(world, _trained, moe, tp, ep, every, None):
        assert first == trained != saved == own


def test_frozen_ranges_stay(ranks: Ranks, moe: Path) -> None:
    ((first, trained, saved, own),) = ranks(1, _trained, moe, 1, 1, 0, 1)
    assert first == trained == saved != own


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
