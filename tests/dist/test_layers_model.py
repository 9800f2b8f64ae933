"""Quantizers attached to a loaded model: it computes what a checkpoint of decoded weights would."""

from pathlib import Path

import pytest
import torch

from megatron_quant.errors import CoverageError, QuantError
from tests.dist import checkpoints
from tests.dist.pool import Ranks

IDS = (torch.arange(2 * 16) * 7 % 258).view(2, 16)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("llama", tmp_path_factory.mktemp("dense"))


def _fake_quantized_equals_decoded(path: Path, recipe: str, scales: str, tp: int, ep: int) -> float:
    """Raises unless the logits are equal; the relative change that quantization made."""
    from megatron_quant.formats import decode, encode, tensor_scale
    from megatron_quant.layers.install import ExpertScales
    from megatron_quant.mcore.model.schedule import full_logits
    from tests.dist import live

    model = live.load(path, live.Parallelism(tp, ep))
    attached = live.with_quantizers(model, recipe, ExpertScales(scales), weights_alone=True)
    attached.calibrate()
    with torch.no_grad():
        quantized = full_logits(model.module, IDS, 258).clone()
        for layer in attached.layers:
            for i, weight in enumerate(layer.weights()):
                fmt = layer.decisions[i].weights
                scale = tensor_scale(layer.weight_amax(i), fmt) if fmt.tensor_scale else None
                weight.copy_(decode(encode(weight, fmt, scale), fmt, weight.dtype))
            layer.module.weight_quantizer.disable()
        decoded = full_logits(model.module, IDS, 258).clone()
    assert torch.equal(quantized, decoded)
    original = full_logits(live.load(path, live.Parallelism(tp, ep)).module, IDS, 258)
    return float((quantized - original).norm() / original.norm())


def _all_recipes(path: Path, cases: list[tuple[str, str]], tp: int, ep: int) -> list[float]:
    return [_fake_quantized_equals_decoded(path, *case, tp, ep) for case in cases]


def test_a_quantized_moe_computes_with_its_decoded_weights(ranks: Ranks, moe: Path) -> None:
    cases = [("fp8", "shared"), ("w4a16_nvfp4", "per_expert"), ("int4", "shared")]
    for changes in ranks(4, _all_recipes, moe, cases, 2, 2):
        assert all(0.001 < change < 0.5 for change in changes), changes


def test_a_quantized_dense_model_does_too(ranks: Ranks, dense: Path) -> None:
    cases = [("fp8", "shared"), ("nvfp4_mlp_only", "shared"), ("int4", "shared")]
    for changes in ranks(2, _all_recipes, dense, cases, 2, 1):
        assert all(0.001 < change < 0.5 for change in changes), changes


def _classes(path: Path) -> dict[str, str]:
    from tests.dist import live

    attached = live.with_quantizers(live.load(path), "nvfp4_experts_only")
    block = attached.model.module.decoder.layers[0]
    modules = {
        "qkv": block.self_attention.linear_qkv,
        "proj": block.self_attention.linear_proj,
        "fc1": block.mlp.experts.linear_fc1,
        "router": block.mlp.router,
        "output": attached.model.module.output_layer,
    }
    assert {x.name.split(".")[-2] for x in attached.layers} == {"experts"}
    enabled = [
        name
        for name, m in modules.items()
        if any(q in dict(m.named_children()) for q in ("weight_quantizer",))
        and m.weight_quantizer.is_enabled
    ]
    assert enabled == ["fc1"], enabled
    return {name: type(module).__name__ for name, module in modules.items()}


def test_attach_converts_linears_and_turns_on_what_the_plan_names(ranks: Ranks, moe: Path) -> None:
    (classes,) = ranks(1, _classes, moe)
    assert classes == {
        "qkv": "QuantTELayerNormColumnParallelLinear",
        "proj": "QuantTERowParallelLinear",
        "fc1": "QuantTEColumnParallelGroupedLinear",
        "router": "TopKRouter",
        "output": classes["output"],
    }


def _attach_to_a_plain_module(path: Path) -> None:
    from megatron_quant.layers.install import LocalWeight, attach
    from tests.dist import live

    attached = live.with_quantizers(live.load(path), "fp8")
    slot = attached.plan.quantized[0].slot
    model = torch.nn.Sequential(torch.nn.Bilinear(4, 4, 4))
    attach(model, attached.plan, [LocalWeight(slot=slot.name, module="0", attribute="weight")])


def test_a_layer_without_a_quantized_class_is_refused(ranks: Ranks, moe: Path) -> None:
    (error,) = ranks.errors(1, _attach_to_a_plain_module, moe)
    assert isinstance(error, CoverageError), error
    assert "0 is a Bilinear, which has no quantized class" in str(error)


def _moved_by_attaching(path: Path, probs_on_input: bool, tp: int, ep: int) -> float:
    """Largest change of the logits when quantizers that are off are attached."""
    from megatron_quant.calib.observe import unquantized
    from megatron_quant.mcore.model.schedule import full_logits
    from tests.dist import live

    model = live.load(path, live.Parallelism(tp, ep), torch.float32)
    for block in model.module.decoder.layers:
        block.mlp.experts.config.moe_apply_probs_on_input = probs_on_input
    with torch.no_grad():
        before = full_logits(model.module, IDS, 258)
        with unquantized(live.with_quantizers(model, "fp8").layers):
            after = full_logits(model.module, IDS, 258)
    return float((after - before).abs().max() / before.abs().max())


def test_weighing_the_outputs_of_experts_changes_no_result(ranks: Ranks, moe: Path) -> None:
    for moved in ranks(4, _moved_by_attaching, moe, False, 2, 2):
        assert 0 < moved < 1e-5  # it rounds otherwise


def test_weights_on_the_inputs_stay_there(ranks: Ranks, tmp_path: Path) -> None:
    path = checkpoints.save("qwen3_moe", tmp_path, num_experts_per_tok=1)
    assert ranks(1, _moved_by_attaching, path, True, 1, 1) == [0]


def _attach_to_fused_experts(path: Path) -> None:
    from tests.dist import live

    model = live.load(path)
    model.module.decoder.layers[1].mlp.experts._with_fused_impl = True  # as megatron-core sets it
    live.with_quantizers(model, "fp8")


def _attach_with_graphs(path: Path, when: str) -> None:
    from tests.dist import live

    model = live.load(path, live.Parallelism())
    if when == "configured":
        model.chunks[0].config.cuda_graph_impl = "local"
    attached = live.with_quantizers(model, "fp8", weights_alone=True)
    attached.calibrate()
    torch.cuda.is_current_stream_capturing = lambda: True  # as within torch.cuda.graph
    full_forward(model)


def full_forward(model: object) -> None:
    from megatron_quant.mcore.model.schedule import full_logits

    full_logits(model.module, IDS, 258)


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("configured", "cuda_graph_impl='local' cannot be used with quantizers"),
        ("recorded", "was called while a CUDA graph was recorded"),
    ],
)
def test_cuda_graphs_are_refused(ranks: Ranks, moe: Path, when: str, words: str) -> None:
    (error,) = ranks.errors(1, _attach_with_graphs, moe, when)
    assert isinstance(error, QuantError) and words in str(error), error


def test_experts_that_do_not_call_their_linears_are_refused(ranks: Ranks, moe: Path) -> None:
    (error,) = ranks.errors(1, _attach_to_fused_experts, moe)
    assert isinstance(error, QuantError), error
    assert "use_transformer_engine_op_fuser=True" in str(error)


def _fusion_after_a_failed_conversion(path: Path) -> None:
    from unittest import mock

    from megatron_quant.layers import install
    from tests.dist import live, training

    model = live.load(path)
    training.fuse(model.chunks)
    fused = [m for m in model.module.modules() if getattr(m, "fuse_wgrad_accumulation", False)]
    failing = mock.patch.object(install.mtq, "quantize", side_effect=RuntimeError("conversion"))
    with failing, pytest.raises(RuntimeError, match="conversion"):
        live.with_quantizers(model, "nvfp4")
    assert fused and all(module.fuse_wgrad_accumulation for module in fused)


def test_weight_gradients_stay_fused_after_a_failed_conversion(ranks: Ranks, dense: Path) -> None:
    ranks(1, _fusion_after_a_failed_conversion, dense)
