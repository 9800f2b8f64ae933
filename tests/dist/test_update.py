"""``mq.update``: scales follow weights that changed, without a forward."""

from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_quant as mq
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_live_models import stored_bytes

SIZES = {"num_experts": 4, "moe_intermediate_size": 128, "mlp_only_layers": [1]}
LAYOUTS = [(1, 1, 1), (4, 2, 2)]  # ranks, tp, ep


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


@torch.no_grad()
def trained(module: Any) -> Any:
    """Other weights, as a step of training leaves them; equal at every layout."""
    for weight in module.parameters():
        weight.mul_(1.25).add_(weight.square())
    return module


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: stored_bytes(tensor) for name, tensor in mq.export_tensors(model)}


def maxima(handle: Any) -> tuple[dict[str, float], dict[str, float]]:
    """What the quantizers hold and the weights' own maxima, of all ranks, by weight's name."""
    held: dict[str, float] = {}
    own: dict[str, float] = {}
    for layer in handle.layers:
        for index, (decision, weight) in enumerate(zip(layer.decisions, layer.weights())):
            name = decision.slot.name
            held[name], own[name] = float(layer.weight_amax(index)), float(weight.abs().max())
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    found = {name: max(r.get(name, 0.0) for r in ranks) for name in held}
    return held, found


def updated(source: Path, algorithm: str, tp: int, ep: int, scales: str) -> None:
    from megatron_quant.recipes import with_algorithm
    from tests.dist import bare

    recipe = with_algorithm(mq.load_recipe("w4a16_nvfp4"), algorithm)
    module = bare.filled(bare.built(source, tp, ep), source)
    first = mq.quantize(module, recipe, hf_model=source, expert_scales=scales)
    assert first.source
    trained(module)
    if scales == "per_expert":
        held, own = maxima(first)
        assert held != own
        held, own = maxima(mq.update(first))
        assert held == own
    handle = mq.update([module])
    assert mq.quantized(first) is mq.quantized(module) is handle
    assert not handle.source
    found = tensors(first)
    other = trained(bare.filled(bare.built(source, tp, ep), source))
    fresh = mq.quantize(other, recipe, hf_model=source, expert_scales=scales)
    assert handle.report.weight_amax == fresh.report.weight_amax
    want = tensors(fresh)
    assert found.keys() == want.keys()
    assert [name for name in want if not torch.equal(found[name], want[name])] == []


@pytest.mark.parametrize(("world", "tp", "ep"), LAYOUTS)
@pytest.mark.parametrize(
    ("algorithm", "scales"), [("max", "shared"), ("max", "per_expert"), ("mse", "shared")]
)
def test_scales_are_those_of_a_model_quantized_with_these_weights(
    ranks: Ranks, source: Path, world: int, tp: int, ep: int, algorithm: str, scales: str
) -> None:
    ranks(world, updated, source, algorithm, tp, ep, scales)


def inputs_stay(source: Path) -> None:
    from megatron_quant.mcore.model import run_through
    from tests.dist import bare

    def loop(model: Any) -> None:
        run_through(model, [torch.arange(256).view(4, 64)])

    module = bare.filled(bare.built(source, 1, 1), source)
    first = mq.quantize(module, "nvfp4", loop, hf_model=source)
    before = [float(layer.input_amax()) for layer in first.layers]
    handle = mq.update(trained(module))
    assert [float(layer.input_amax()) for layer in handle.layers] == before
    assert handle.report.input_amax == first.report.input_amax
    module.decoder.layers[0].self_attention.linear_proj.weight.data[0, 0] = torch.nan
    mq.update(module)


def test_inputs_keep_theirs_and_a_weight_that_is_not_finite_is_refused(
    ranks: Ranks, source: Path
) -> None:
    (error,) = ranks.errors(1, inputs_stay, source)
    assert isinstance(error, mq.QuantError)
    assert "contains NaN or Inf" in str(error)


def of_gptq(source: Path) -> str:
    """Return what a user is told when weights that gptq has rounded are updated."""
    import logging

    from megatron_quant.mcore.model import run_through
    from megatron_quant.recipes import with_algorithm
    from tests.dist import bare

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_quant").addHandler(handler)
    module = bare.filled(bare.built(source, 1, 1), source)
    recipe = with_algorithm(mq.load_recipe("w4a16_nvfp4"), "gptq")

    def loop(model: Any) -> None:
        run_through(model, [torch.arange(256).view(4, 64)])

    mq.update(mq.quantize(module, recipe, loop, hf_model=source))
    (line,) = [line for line in said if line.startswith("update")]
    return line


def test_weights_of_gptq_are_rounded_to_the_nearest_with_a_warning(
    ranks: Ranks, source: Path
) -> None:
    (line,) = ranks(1, of_gptq, source)
    assert "weights of algorithm gptq get searched scales and the nearest codes, also" in line
