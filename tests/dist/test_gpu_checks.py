"""The checks of tests/gpu on the CPU, so that they are known to run before a GPU is at hand."""

import pytest
import torch

from tests.dist.pool import Ranks


def _layers() -> None:
    from tests.dist import tiny
    from tests.gpu import checks

    tiny.start()
    for splits in checks.SPLITS.values():
        for fmt in (None, *checks.FORMATS.values()):
            for axis in (None, 0) if fmt else (None,):
                checks.layer_computes_as_the_kernels("cpu", "row", splits, fmt, axis)
    checks.fused_accumulation_changes_no_gradient("cpu")


def _codecs() -> None:
    from tests.gpu import checks

    for fmt in checks.FORMATS.values():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            checks.bytes_are_the_cpus("cpu", fmt, dtype)
    for name in ("fp8", "nvfp4"):
        checks.packing_is_modelopts("cpu", name)
    # ModelOpt's fake quant of nvfp4 takes CUDA tensors only.
    checks.fake_quant_is_modelopts("cpu", "fp8", torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="make test-gpu runs the checks there")
@pytest.mark.parametrize("check", [_layers, _codecs])
def test_on_the_cpu(ranks: Ranks, check: object) -> None:
    ranks(1, check)
