"""Delta nets in training: what the gates' rows multiply, and a run that goes on at another layout."""

from pathlib import Path

import pytest
import torch

from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_family_exports import SIZES


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("next")
    return checkpoints.save("qwen3_next", path, **SIZES["qwen3_next"])


def products(source: Path, fused: bool) -> None:
    """Of in_proj: its outputs and weight gradients are those of rounded inputs for quantized rows,
    and of the inputs as they are for those of b and a."""
    from megatron_quant.mcore.live import quantized
    from tests.dist.test_training import ALONE, _script

    script = _script(source, "nvfp4", ALONE, fused, use_distributed_optimizer=False)
    layer = next(x for x in quantized(script.model).layers if x.name.endswith(".0.self_attention.in_proj"))
    linear, rows = layer.module, layer.rows
    weight = linear.weight.detach()
    assert rows == len(weight) - 16 and linear.fuse_wgrad_accumulation is fused
    linear.is_first_microbatch = True  # a fused gradient then replaces what main_grad holds
    torch.manual_seed(0)
    x, dy = torch.randn(7, 2, 64), torch.randn(7, 2, len(weight))
    n = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + linear.layer_norm_weight.detach())
    seen: list[torch.Tensor] = []
    linear.input_quantizer.register_forward_pre_hook(lambda q, args: seen.append(args[0].detach()))
    out = linear(x.requires_grad_())[0]
    torch.testing.assert_close(seen[0].view_as(n), n)
    n, rounded = seen[0].view_as(n), layer.input_quantizer(seen[0]).view_as(n)
    assert (rounded - n).norm() > 0.01 * n.norm()
    w = layer.weight_quantizer(weight).detach()
    torch.testing.assert_close(out[..., :rows], rounded @ w[:rows].T)
    torch.testing.assert_close(out[..., rows:], n @ weight[rows:].T)
    linear.weight.main_grad.zero_()
    linear.weight.grad = None
    out.backward(dy)
    got = linear.weight.main_grad  # DDP adds what is not fused
    torch.testing.assert_close(got[:rows], dy[..., :rows].flatten(0, 1).T @ rounded.flatten(0, 1))
    torch.testing.assert_close(got[rows:], dy[..., rows:].flatten(0, 1).T @ n.flatten(0, 1))


@pytest.mark.parametrize("fused", [False, True])
def test_gates_multiply_inputs_that_nothing_rounded(source: Path, ranks: Ranks, fused: bool) -> None:
    ranks(1, products, source, fused)


def test_a_step_has_the_single_ranks_gradients(source: Path, ranks: Ranks) -> None:
    """Inputs quantized, weight gradients fused, at TP 2 x EP 2."""
    from tests.dist.test_training import ALONE, _assert_equal_gradients, _steady

    generator = torch.Generator().manual_seed(5)
    candidates = list(torch.randint(258, (30, 2, 1, 4), generator=generator))
    candidates = [list(microbatches) for microbatches in candidates]
    (chosen,) = ranks(1, _steady, source, "nvfp4", candidates)
    _assert_equal_gradients(ranks, source, "nvfp4", candidates[chosen])
