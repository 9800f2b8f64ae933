"""The codecs on CUDA tensors that hold no values: every tensor they make is where the weight is."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_quant.formats import (
    amax,
    decode,
    encode,
    fake_quant,
    get_format,
    stack_amax,
    tensor_scale,
)

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows no CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "group"), [("fp8", None), ("nvfp4", None), ("int4", 32)])
def test_devices_are_not_mixed(
    name: str, group: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_QUANT_NATIVE", "0")  # compiled loops want values
    fmt = get_format(name, group)
    # Tables are made once, on the CPU, and are real.
    with FakeTensorMode(allow_non_fake_inputs=True):
        w_ENK = torch.empty(4, 64, 128, device="cuda", dtype=dtype)
        scale = tensor_scale(stack_amax(w_ENK), fmt) if fmt.tensor_scale else None
        fields = encode(w_ENK, fmt, scale)
        found = [amax(w_ENK), decode(fields, fmt, dtype), fake_quant(w_ENK, fmt, scale)]
        assert {t.device.type for t in [*fields.values(), *found]} == {"cuda"}
