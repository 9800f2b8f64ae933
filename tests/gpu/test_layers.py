"""The quantized grouped linears on a GPU."""

import pytest
import torch

from tests.gpu import NO_GPU

if not torch.cuda.is_available():
    pytest.skip(NO_GPU, allow_module_level=True)  # before Megatron is imported in this process
from megatron_quant.errors import QuantError
from megatron_quant.layers.te import refuse_capture
from tests.dist import grouped
from tests.gpu import checks

FORMATS = pytest.mark.parametrize("name", list(checks.FORMATS))


@pytest.mark.parametrize("splits", list(checks.SPLITS))
@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_plain_layer_computes_as_the_cpu_kernels(one_rank: str, kind: str, splits: str) -> None:
    checks.layer_computes_as_the_kernels(one_rank, kind, checks.SPLITS[splits], None, None)


@pytest.mark.parametrize("splits", list(checks.SPLITS))
@pytest.mark.parametrize("axis", [None, 0])
@FORMATS
def test_a_quantized_layer_does_too(
    one_rank: str, name: str, axis: int | None, splits: str
) -> None:
    fmt = checks.FORMATS[name]
    checks.layer_computes_as_the_kernels(one_rank, "column", checks.SPLITS[splits], fmt, axis)


def test_fused_accumulation_changes_no_gradient(one_rank: str) -> None:
    checks.fused_accumulation_changes_no_gradient(one_rank)


def test_a_forward_is_not_captured(one_rank: str) -> None:
    layer = grouped.quantized("column", 4, checks.FORMATS["fp8"], None, torch.bfloat16)
    layer = layer.to(one_rank).requires_grad_(False)
    layer.register_forward_pre_hook(refuse_capture)
    x = grouped.inputs(32, torch.bfloat16).detach().to(one_rank)
    layer(x, [8, 0, 20, 4])
    with pytest.raises(QuantError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x, [8, 0, 20, 4])
