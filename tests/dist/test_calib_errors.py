"""Calibration refuses bad input on every rank alike; the number of collectives is counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_quant.errors import CalibrationError
from tests.dist import checkpoints
from tests.dist.pool import Ranks

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
FC2 = "decoder.layers.0.mlp.experts.linear_fc2.weight7"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No token visits expert 7 of layer 1: two of the others' opposite logits are above its 0."""
    path = checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("cold"))
    tensors = load_file(path / "model.safetensors")
    router = tensors["model.layers.1.mlp.gate.weight"]
    router[1], router[3], router[5], router[7] = -router[0], -router[2], -router[4], 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _calibrate(path: Path, policy: str, batches: int) -> tuple[tuple[str, ...], float, float]:
    """Cold experts, and the input amax of one and of another expert."""
    from megatron_quant.calib.calibration import ColdExperts
    from tests.dist import live

    attached = live.with_quantizers(live.load(path, live.Parallelism(2, 2)), "fp8")
    report = attached.calibrate(live.batches(batches), ColdExperts(policy))
    layer = next(x for x in attached.layers if x.name.endswith("1.mlp.experts.linear_fc1"))
    of_experts = [v for slot, v in report.input_amax.items() if slot.startswith(layer.name)]
    return report.cold, layer.input_amax().item(), max(of_experts)


def test_a_cold_expert_is_named_on_every_rank(ranks: Ranks, cold: Path) -> None:
    for error in ranks.errors(4, _calibrate, cold, "error", 4):
        assert isinstance(error, CalibrationError), error
        assert str(error) == (
            "expert 7 of decoder.layers.1.mlp.experts saw no calibration token: raise "
            "--calib-size, or take the layer's largest amax with --cold-experts layer-max"
        )


def test_a_cold_expert_takes_the_layers_largest_amax_on_request(ranks: Ranks, cold: Path) -> None:
    slots = [f"decoder.layers.1.mlp.experts.linear_fc{i}.weight7" for i in (1, 2)]
    for found, amax, largest in ranks(4, _calibrate, cold, "layer-max", 4):
        assert sorted(found) == slots
        assert amax == largest > 0


def test_no_token_at_all_is_an_error(ranks: Ranks, moe: Path) -> None:
    for error in ranks.errors(4, _calibrate, moe, "layer-max", 0):
        assert isinstance(error, CalibrationError), error
        assert str(error) == (
            "no calibration token reached decoder.layers.0.self_attention.linear_proj: "
            "give more data with --calib-size"
        )


def _poisoned_weight(path: Path, name: str, value: float, rank: int) -> None:
    import torch.distributed as dist

    from tests.dist import live

    model = live.load(path, live.Parallelism(2, 2))
    for local in model.local:
        if local.param.name == name and dist.get_rank() == rank:
            local.tensor(model.module).data[-1, -1] = value
    live.with_quantizers(model, "nvfp4", weights_alone=True).calibrate()


@pytest.mark.parametrize(
    ("name", "value", "rank"),
    [(QKV, torch.nan, 3), (QKV, -torch.inf, 0), (FC2, torch.inf, 1), (FC2, torch.nan, 3)],
)
def test_a_weight_that_is_not_finite_on_one_rank_is_named_on_all(
    ranks: Ranks, moe: Path, name: str, value: float, rank: int
) -> None:
    for error in ranks.errors(4, _poisoned_weight, moe, name, value, rank):
        assert isinstance(error, CalibrationError), error
        assert str(error).startswith(f"weight {name} contains NaN or Inf: repair the checkpoint")


def _poisoned_input(path: Path) -> None:
    import torch.distributed as dist

    from tests.dist import live

    model = live.load(path, live.Parallelism(tp=2))
    norm = model.module.decoder.layers[1].self_attention.linear_qkv.layer_norm_weight
    if dist.get_rank() == 1:
        norm.data[5] = torch.nan
    live.with_quantizers(model, "fp8").calibrate(live.batches(1))


def test_an_input_that_is_not_finite_is_named_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    path = checkpoints.save("llama", tmp_path)
    for error in ranks.errors(2, _poisoned_input, path):
        assert isinstance(error, CalibrationError), error
        assert str(error).startswith(
            "input of decoder.layers.1.self_attention.linear_qkv.weight contains NaN or Inf"
        ) or str(error).startswith("input of decoder.layers.1.self_attention.linear_proj.weight")


class Collectives(TorchDispatchMode):
    """Names of the collectives that are issued while ``listening``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.listening = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d" and self.listening:
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def _collectives(path: Path, recipe: str, batches: int) -> list[str]:
    from megatron_quant.calib.calibration import ColdExperts, InputRules, calibrate
    from tests.dist import live

    model = live.load(path, live.Parallelism(ep=2))
    attached = live.with_quantizers(model, recipe, weights_alone=not batches)
    with Collectives() as collectives:

        def deaf(forward: Any) -> None:
            collectives.listening = False
            forward()
            collectives.listening = True

        own = attached.forwards(live.batches(batches))
        forwards = [lambda f=f: deaf(f) for f in own]
        calibrate(attached.layers, attached.plan, model.groups, forwards, InputRules(cold_experts=ColdExperts.LAYER_MAX))
    return collectives.names


def test_collectives_do_not_grow_with_layers_and_experts(ranks: Ranks, tmp_path: Path) -> None:
    for layers, experts in ((2, 4), (8, 4), (2, 16)):
        path = checkpoints.save(
            "qwen3_moe",
            tmp_path / f"{layers}-{experts}",
            num_hidden_layers=layers,
            num_experts=experts,
            moe_intermediate_size=128,
        )
        for names in ranks(2, _collectives, path, "fp8", 0):
            assert names == ["allreduce_"]
        for names in ranks(2, _collectives, path, "fp8", 2):
            assert names == ["allreduce_"] * 3  # weights, inputs, tokens
