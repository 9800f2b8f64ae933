"""GPTModel of Transformer Engine layers on CPU tensors, at several layouts."""

from typing import Any

import pytest
import torch

from megatron_quant import cpu
from megatron_quant.errors import HostError
from tests.dist.pieces import assemble
from tests.dist.pool import Ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the room for hosts without CUDA")

DENSE_BIASED = {"add_qkv_bias": True}
GPT2_LIKE = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
    "qk_layernorm": False,
}
BF16 = {"params_dtype": torch.bfloat16, "bf16": True}
FP16 = {"params_dtype": torch.float16, "fp16": True}


def _logits(
    experts: int | None, fields: dict[str, Any], layers: str, tied: bool
) -> tuple[torch.Tensor, dict[str, int]]:
    from tests.dist import tiny

    tiny.start()
    built = tiny.model(tiny.config(experts, **fields), layers, tied)
    return tiny.logits(built, length=32), cpu.calls()


def _step(tp: int, ep: int, etp: int, experts: int | None) -> tuple[Any, float, Any]:
    """Logits, loss and gradients of one forward and backward."""
    from tests.dist import tiny

    tiny.start(tp, ep, etp)
    built = tiny.model(tiny.config(experts, num_layers=2))
    before = tiny.logits(built)
    loss = tiny.loss(built)
    loss.backward()
    return before, loss.item(), tiny.gradients(built)


def _count_of_a_step() -> dict[str, int]:
    _step(1, 1, 1, 4)
    return cpu.calls()


def _call_lacking_kernel() -> None:
    import transformer_engine_torch

    transformer_engine_torch.fused_topk_with_score_function_fwd(1)


def _activate_twice() -> None:
    cpu.activate()
    cpu.activate()


def _random_states() -> list[bool]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from tests.dist import tiny

    tiny.start()
    tracker = get_cuda_rng_tracker()
    outside = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(4)
    restored = torch.equal(outside, torch.get_rng_state())
    with tracker.fork():
        second = torch.rand(4)
    return [restored, bool((first != second).all())]


def _fork_unknown_state() -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork("nobody"):
        pass


def _modelopt() -> tuple[float, list[str], int]:
    import modelopt.torch.quantization as mtq

    from tests.dist import tiny

    tiny.start()
    built = tiny.model(tiny.config(None))
    before = tiny.logits(built)
    mtq.quantize(built, mtq.FP8_DEFAULT_CFG, tiny.logits)
    after = tiny.logits(built)
    kind = type(built.decoder.layers[0].mlp.linear_fc1).__name__
    amaxes = [name for name in built.state_dict() if name.endswith("_amax")]
    return float((before - after).norm() / before.norm()), [kind], len(amaxes)


@pytest.mark.parametrize(
    ("experts", "fields", "tied"),
    [
        pytest.param(4, {}, False, id="moe"),
        pytest.param(4, BF16, False, id="moe-bf16"),
        pytest.param(4, FP16, False, id="moe-fp16"),
        pytest.param(None, DENSE_BIASED, True, id="dense-qkv-bias-tied"),
        pytest.param(None, GPT2_LIKE, False, id="dense-layernorm-biases"),
    ],
)
def test_one_rank_equals_megatrons_own_layers(
    ranks: Ranks, experts: int | None, fields: dict[str, Any], tied: bool
) -> None:
    ((got, _),) = ranks(1, _logits, experts, fields, "te", tied)
    ((want, _),) = ranks(1, _logits, experts, fields, "local", tied)
    assert torch.allclose(got, want, rtol=0, atol=2e-6 if fields is GPT2_LIKE else 0)


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks) -> dict[int | None, Any]:
    return {experts: ranks(1, _step, 1, 1, 1, experts)[0] for experts in (4, None)}


@pytest.mark.parametrize(
    ("world", "tp", "ep", "etp", "experts"),
    [
        pytest.param(2, 1, 2, 1, 4, id="ep2"),
        pytest.param(4, 2, 2, 1, 4, id="tp2-ep2-dp2"),
        pytest.param(4, 2, 2, 2, 4, id="tp2-ep2-etp2"),
        pytest.param(4, 4, 4, 1, 4, id="tp4-ep4"),
        pytest.param(2, 2, 1, 1, None, id="dense-tp2"),
    ],
)
def test_a_step_equals_one_rank(
    ranks: Ranks,
    one_rank: dict[int | None, Any],
    world: int,
    tp: int,
    ep: int,
    etp: int,
    experts: int | None,
) -> None:
    logits, loss, gradients = one_rank[experts]
    steps = ranks(world, _step, tp, ep, etp, experts)
    for got_logits, got_loss, _ in steps:
        torch.testing.assert_close(got_logits, logits, rtol=0, atol=1e-5)
        assert got_loss == pytest.approx(loss, abs=1e-5)
    whole, want = assemble(p for step in steps for p in step[2]), assemble(gradients)
    assert whole.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(whole[name], want[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_goes_through_the_kernels(ranks: Ranks) -> None:
    (calls,) = ranks(1, _count_of_a_step)
    layers, forwards = 2, 2
    experts_linears = 2 * layers
    # A backward takes two products per linear: one for the input, one for the weights.
    assert calls["te_general_grouped_gemm"] == experts_linears * (forwards + 2)
    assert calls["generic_gemm"] >= 2 * layers * (forwards + 2)
    assert calls["rmsnorm_bwd"] == 4 * layers + 1


def test_half_precision_goes_through_the_softmax_kernel(ranks: Ranks) -> None:
    ((_, calls),) = ranks(1, _logits, 4, BF16, "te", False)
    assert calls["scaled_masked_softmax_forward"] == 2


def test_a_lacking_kernel_raises_with_its_name(ranks: Ranks) -> None:
    (error,) = ranks.errors(1, _call_lacking_kernel)
    assert isinstance(error, HostError)
    assert "fused_topk_with_score_function_fwd" in str(error)


def test_activate_is_idempotent(ranks: Ranks) -> None:
    assert ranks(1, _activate_twice) == [None]


def test_random_states_are_forked_and_restored(ranks: Ranks) -> None:
    assert ranks(1, _random_states) == [[True, True]]
    (error,) = ranks.errors(1, _fork_unknown_state)
    assert "call model_parallel_cuda_manual_seed" in str(error)


def test_modelopt_converts_and_calibrates(ranks: Ranks) -> None:
    ((change, kinds, amaxes),) = ranks(1, _modelopt)
    assert 0 < change < 0.2
    assert kinds == ["QuantTELayerNormColumnParallelLinear"]
    assert amaxes == 2 * 4 * 2  # weight and input of four linears in two layers
