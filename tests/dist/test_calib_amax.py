"""Calibrated amaxes are those of the logical tensors, on every rank and at every layout."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.dist import checkpoints
from tests.dist.pool import Ranks

EXPERTS, TOPK, BATCHES = 8, 2, 4
LAYOUTS = {
    "1": (1, 1, 1, 1),
    "tp2-ep2": (4, 2, 2, 1),
    "ep4": (4, 1, 4, 1),
    "tp2-ep2-etp2": (4, 2, 2, 2),
}


@dataclass(frozen=True)
class Found:
    """One rank's report, and what its quantizers hold by global slot name."""

    weight_amax: dict[str, float]
    input_amax: dict[str, float]
    tokens: dict[str, int]
    weights: dict[str, float]
    inputs: dict[str, float]
    experts: dict[str, int]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


def _calibrated(path: Path, tp: int, ep: int, etp: int, scales: str) -> Found:
    from megatron_quant.layers.install import ExpertScales
    from tests.dist import live

    model = live.load(path, live.Parallelism(tp, ep, etp))
    attached = live.with_quantizers(model, "fp8", ExpertScales(scales))
    report = attached.calibrate(live.batches(BATCHES))
    again = attached.calibrate(live.batches(BATCHES))
    assert again == report, "a second calibration found something else"
    slots = [(d.slot, x, i) for x in attached.layers for i, d in enumerate(x.decisions)]
    for _, layer, _ in slots:
        assert layer.module.weight_quantizer.is_enabled
        assert layer.module.input_quantizer.is_enabled
    return Found(
        dict(report.weight_amax),
        dict(report.input_amax),
        dict(report.tokens),
        {slot.name: layer.weight_amax(i).item() for slot, layer, i in slots},
        {slot.name: layer.input_amax().item() for slot, layer, i in slots},
        {slot.name: slot.expert for slot, _, _ in slots if slot.expert is not None},
    )


def _both_scales(path: Path, *parallelism: int) -> tuple[Found, Found]:
    return (
        _calibrated(path, *parallelism, "shared"),
        _calibrated(path, *parallelism, "per_expert"),
    )


@pytest.fixture(scope="module")
def found(ranks: Ranks, checkpoint: Path) -> dict[str, list[tuple[Found, Found]]]:
    """Layout -> each rank's findings with shared and with per-expert scales."""
    return {
        name: ranks(world, _both_scales, checkpoint, *parallelism)
        for name, (world, *parallelism) in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> dict[str, float]:
    """Largest magnitude of every tensor in the Hugging Face checkpoint."""
    tensors = load_file(checkpoint / "model.safetensors")
    return {name: tensor.abs().max().item() for name, tensor in tensors.items()}


def own_amaxes(weights: dict[str, float]) -> dict[str, float]:
    """Largest magnitude of each Megatron linear, with all that is fused in it."""
    expected = {}
    for i in (0, 1):
        hf, ours = f"model.layers.{i}", f"decoder.layers.{i}"
        qkv = [weights[f"{hf}.self_attn.{p}_proj.weight"] for p in "qkv"]
        expected[f"{ours}.self_attention.linear_qkv.weight"] = max(qkv)
        proj = weights[f"{hf}.self_attn.o_proj.weight"]
        expected[f"{ours}.self_attention.linear_proj.weight"] = proj
        for e in range(EXPERTS):
            gate, up, down = (
                weights[f"{hf}.mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")
            )
            expected[f"{ours}.mlp.experts.linear_fc1.weight{e}"] = max(gate, up)
            expected[f"{ours}.mlp.experts.linear_fc2.weight{e}"] = down
    return expected


def largest_of_module(amaxes: dict[str, float]) -> dict[str, float]:
    """For each slot the largest of its module's slots: of all experts of a layer."""
    modules: dict[str, list[float]] = {}
    for slot, value in amaxes.items():
        modules.setdefault(slot.rpartition(".")[0], []).append(value)
    return {slot: max(modules[slot.rpartition(".")[0]]) for slot in amaxes}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_amaxes_are_the_checkpoints(
    found: dict[str, list[tuple[Found, Found]]], weights: dict[str, float], layout: str
) -> None:
    own = own_amaxes(weights)
    shared_by_all = largest_of_module(own)
    held = set()
    for shared, per_expert in found[layout]:
        assert shared.weight_amax == per_expert.weight_amax == own
        assert shared.weights == {slot: shared_by_all[slot] for slot in shared.weights}
        assert per_expert.weights == {slot: own[slot] for slot in per_expert.weights}
        held |= shared.weights.keys()
    assert held == own.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_amaxes_are_equal_on_ranks_and_close_over_layouts(
    found: dict[str, list[tuple[Found, Found]]], layout: str
) -> None:
    reference = found["1"][0][0]
    first = found[layout][0][0]
    for shared, per_expert in found[layout]:
        assert shared.input_amax == per_expert.input_amax == first.input_amax
        of_module = largest_of_module(shared.input_amax)
        assert shared.inputs == {slot: of_module[slot] for slot in shared.inputs}
        assert shared.inputs == per_expert.inputs
    assert largest_of_module(first.input_amax) == pytest.approx(
        # A forward in bf16 rounds otherwise at another layout.
        largest_of_module(reference.input_amax),
        rel=0.02,
    )


def test_input_amaxes_are_those_of_transformers(
    found: dict[str, list[tuple[Found, Found]]], checkpoint: Path
) -> None:
    """Whatever the experts' inputs are, the largest is that of the tokens that they share."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(258, (BATCHES, 2, 32), generator=generator).view(-1, 32)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    seen: dict[str, float] = {}
    for i, layer in enumerate(model.model.layers):
        for name, module in (
            (f"decoder.layers.{i}.self_attention.linear_qkv", layer.self_attn.q_proj),
            (f"decoder.layers.{i}.self_attention.linear_proj", layer.self_attn.o_proj),
            (f"decoder.layers.{i}.mlp.experts.linear_fc1", layer.mlp),
        ):
            module.register_forward_pre_hook(
                lambda module, args, name=name: seen.update({name: args[0].abs().max().item()})
            )
    with torch.no_grad():
        model(ids)
    of_module = largest_of_module(found["1"][0][0].input_amax)
    ours = {slot.rpartition(".")[0]: value for slot, value in of_module.items()}
    assert {name: ours[name] for name in seen} == pytest.approx(seen, rel=0.02)


def _down_proj_input(experts: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> float:
    """The largest input of any expert's ``down_proj``; the routing weight comes after it."""
    x_TH, chosen_TK = args[0], args[1]
    found = []
    for e in range(EXPERTS):
        tokens_TH = x_TH[(chosen_TK == e).any(-1)]
        gate, up = (tokens_TH @ experts.gate_up_proj[e].T).chunk(2, -1)
        found.append((experts.act_fn(gate) * up).abs().max().item())
    return max(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_down_proj_are_those_of_transformers(
    found: dict[str, list[tuple[Found, Found]]], checkpoint: Path, layout: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(258, (BATCHES, 2, 32), generator=generator).view(-1, 32)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    seen: dict[str, float] = {}
    for i, layer in enumerate(model.model.layers):
        name = f"decoder.layers.{i}.mlp.experts.linear_fc2"
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: _down_proj_input(module, args)})
        )
    with torch.no_grad():
        model(ids)
    of_module = largest_of_module(found[layout][0][0].input_amax)
    ours = {slot.rpartition(".")[0]: value for slot, value in of_module.items()}
    assert {name: ours[name] for name in seen} == pytest.approx(seen, rel=0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_counted_topk_times_in_every_layer(
    found: dict[str, list[tuple[Found, Found]]], layout: str
) -> None:
    for shared, _ in found[layout]:
        assert len(shared.tokens) == 2 * 2 * EXPERTS
        for linear in ("linear_fc1", "linear_fc2"):
            for layer in (0, 1):
                prefix = f"decoder.layers.{layer}.mlp.experts.{linear}."
                counts = [n for slot, n in shared.tokens.items() if slot.startswith(prefix)]
                assert sum(counts) == BATCHES * 2 * 32 * TOPK


def _tokens_of_five_batches(path: Path) -> int:
    from tests.dist import live

    attached = live.with_quantizers(live.load(path, live.Parallelism(ep=4)), "nvfp4")
    tokens = attached.calibrate(live.batches(5)).tokens
    return sum(n for slot, n in tokens.items() if slot.startswith("decoder.layers.1."))


def test_batches_that_ranks_share_count_once(ranks: Ranks, checkpoint: Path) -> None:
    """Four data-parallel ranks share five batches: none counts twice."""
    assert ranks(4, _tokens_of_five_batches, checkpoint) == [5 * 2 * 32 * TOPK * 2] * 4
