"""The codecs on a GPU: the CPU's bits, the golden bytes, and ModelOpt's own kernels."""

import pytest
import torch

from tests.gpu import NO_GPU

if not torch.cuda.is_available():
    pytest.skip(NO_GPU, allow_module_level=True)  # before Megatron is imported in this process
from megatron_quant.formats import Format, encode, fake_quant, stack_amax
from megatron_quant.formats.backends import gpu
from tests.gpu import checks
from tests.unit import test_formats_golden as goldens
from tests.unit import test_formats_native as loops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("name", list(checks.FORMATS))
def test_bytes_are_the_cpus(name: str, dtype: torch.dtype) -> None:
    checks.bytes_are_the_cpus("cuda", checks.FORMATS[name], dtype)


@loops.each_format
@loops.each_input
def test_triton_gives_torchs_bits(
    fmt: Format, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = x.cuda()
    calls = [lambda: stack_amax(x.unsqueeze(0))]
    for scale in loops.scales(x, fmt):
        d = None if scale is None else scale.cuda()
        calls += [lambda d=d: encode(x, fmt, d), lambda d=d: fake_quant(x, fmt, d)]
    assert gpu.available()
    with_loops = [call() for call in calls]
    monkeypatch.setenv("MEGATRON_QUANT_NATIVE", "0")
    assert not gpu.available()
    assert all(loops.same_bits(pair) for pair in zip(with_loops, (c() for c in calls), strict=True))


@pytest.mark.parametrize(("name", "case"), goldens.CASES)
def test_encode_equals_golden_bytes(name: str, case: str) -> None:
    want, fmt = goldens.golden(name, case), goldens.format_of(name, case)
    on_gpu = {key: tensor.cuda() for key, tensor in want.items()}
    fields = encode(on_gpu["input"], fmt, on_gpu.get("dscale"))
    for field in fmt.fields:
        if field.name in want:
            assert checks.same_bits(fields[field.name].cpu(), want[field.name]), field.name


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_packing_is_modelopts(name: str) -> None:
    checks.packing_is_modelopts("cuda", name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8", torch.float32), ("nvfp4", torch.float32), ("nvfp4", torch.bfloat16)],
)
def test_fake_quant_is_modelopts_kernels(name: str, dtype: torch.dtype) -> None:
    checks.fake_quant_is_modelopts("cuda", name, dtype)
