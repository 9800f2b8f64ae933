"""Golden bytes of transposed packings, made by AutoRound 0.16.0's packers.

Run from the repository's root with auto-round's wheel unpacked on PYTHONPATH and compressed-tensors
0.20.0 installed (the tests read only the file):

    python -m tests.golden.make_packing

``packing.safetensors`` has, for each case, the codec's fields (``<case>.elements``, ``.scale`` and
``.zero``; codes packed by compressed-tensors) and the tensors that AutoRound stores, by name.
"""

import sys
from pathlib import Path
from unittest.mock import MagicMock

sys.modules["datasets"] = MagicMock()  # calibration data, which packing does not touch

# ruff: noqa: E402
import torch
from auto_round.export.export_to_autoround.qlinear_fp import QuantLinear as MxLinear
from auto_round.export.export_to_awq.utils import WQLinear_GEMM
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as GptqLinear
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS, COLS = 64, 128
Tensors = dict[str, Tensor]
GEN = torch.Generator().manual_seed(11)


def linear(w_NK: Tensor) -> nn.Linear:
    module = nn.Linear(w_NK.shape[1], w_NK.shape[0], bias=False)
    module.weight.data = w_NK
    return module


def integers(bits: int, group: int, asymmetric: bool) -> tuple[Tensors, Tensor, Tensor]:
    """The codec's fields, the weight fp32 and the zero points of random codes."""
    codes = torch.randint(0, 2**bits, (ROWS, COLS), generator=GEN)
    scale = torch.rand(ROWS, COLS // group, generator=GEN).add_(0.5).mul_(2**-6).bfloat16()
    # Version 1 of GPTQ cannot store a zero point of 0.
    zero = torch.full(scale.shape, 2 ** (bits - 1))
    if asymmetric:
        zero = torch.randint(1, 2**bits, scale.shape, generator=GEN)
    wide_zero, wide_scale = (t.repeat_interleave(group, 1) for t in (zero, scale.float()))
    words = pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits)
    fields = {"elements": words, "scale": scale, "zero": zero.to(torch.uint8)}
    return fields, (codes - wide_zero) * wide_scale, zero


def gptq(bits: int, group: int, asymmetric: bool) -> Tensors:
    fields, w_NK, zero = integers(bits, group, asymmetric)
    packed = GptqLinear(bits, group, COLS, ROWS, bias=False)
    given = zero if asymmetric else 2 ** (bits - 1)
    packed.pack(linear(w_NK), fields["scale"].float(), given)
    return {**fields, "qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}


def awq(group: int, asymmetric: bool) -> Tensors:
    fields, w_NK, zero = integers(4, group, asymmetric)
    scales = fields["scale"].float().t().contiguous()
    given = zero.t().contiguous() if asymmetric else 8
    packed = WQLinear_GEMM.from_linear(linear(w_NK), 4, group, scales=scales, zeros=given)
    return {**fields, "qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}


def mx(bits: int) -> Tensors:
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.randint(0, 16, (ROWS, COLS), generator=GEN)
    codes[codes == 8] = 0  # no negative zero
    values = magnitudes[codes % 8] * (1 - 2 * (codes // 8))
    exponents = torch.randint(-9, 3, (ROWS, COLS // 32), generator=GEN).float()
    w_NK = values * torch.exp2(exponents).repeat_interleave(32, 1)
    packed = MxLinear(bits, 32, COLS, ROWS, bias=False, data_type="mx_fp", act_bits=bits)
    packed.pack(linear(w_NK), exponents)
    name = "weight" if bits == 8 else "weight_packed"
    stored = {name: getattr(packed, name), "weight_scale": packed.weight_scale}
    elements = values.to(torch.float8_e4m3fn)
    if bits == 4:
        elements = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
    return {"elements": elements, "scale": (exponents + 127).to(torch.uint8), **stored}


def main() -> None:
    cases = {
        "gptq_int4": gptq(4, 32, False),
        "gptq_int4_channel": gptq(4, COLS, False),
        "gptq_int4_asym": gptq(4, 64, True),
        "gptq_int8_group": gptq(8, 32, False),
        "awq_int4": awq(64, False),
        "awq_int4_asym": awq(32, True),
        "mx_mxfp4": mx(4),
        "mx_mxfp8": mx(8),
    }
    tensors = {f"{c}.{n}": t.contiguous() for c, case in cases.items() for n, t in case.items()}
    made_by = {"made_by": "auto-round 0.16.0"}
    save_file(tensors, Path(__file__).parent / "packing.safetensors", made_by)


if __name__ == "__main__":
    main()
