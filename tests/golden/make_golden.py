"""Golden bytes of the number formats, made by the tools whose formats they are.

fp8 and nvfp4: nvidia-modelopt 0.47.0. int4: compressed-tensors 0.20.0. Run from the repository's
root with both installed; the tests read only the files:

    python tests/golden/make_golden.py

A file holds, for each case, ``<case>.input``, ``<case>.dscale`` (fp8, nvfp4), the format's fields
and ``<case>.decoded`` (the same tool's decoding, fp32 for ModelOpt, bf16 for compressed-tensors).
"""
# ruff: noqa: E402

import sys
from pathlib import Path

sys.modules["transformer_engine"] = None  # an optional plugin of ModelOpt, not used here

import modelopt
import torch
from compressed_tensors import __version__ as ct_version
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
Case = tuple[Tensor, Tensor | None]  # input, dscale (None: from the input's amax)
Fields = dict[str, Tensor]

BF16_MAX = torch.finfo(torch.bfloat16).max
E2M1_TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def shared_cases() -> dict[str, Case]:
    """Inputs that make sense for every format."""
    gen = torch.Generator().manual_seed(7)
    normal = torch.randn(6, 128, generator=gen) * 0.02
    exponents = torch.empty(4, 128).uniform_(-30, 2, generator=gen).exp2()
    wide = exponents * torch.randn(4, 128, generator=gen).sign()
    holes = normal[:4].clone()
    holes[0], holes[1, :64], holes[2, 16:32], holes[3, ::2] = 0, 0, 0, 0
    subnormal = torch.randint(-127, 128, (2, 128), generator=gen) * 2.0**-133
    signed_zero = normal[:2].clone()
    signed_zero[0, ::3], signed_zero[1, ::5], signed_zero[1, 1::5] = -0.0, -1e-30, 1e-30
    huge = torch.full((2, 128), BF16_MAX)
    huge[0, ::2], huge[1, ::3], huge[1, 1::3] = -BF16_MAX, 1.0, -BF16_MAX / 2
    return {
        "random_bf16": (normal.bfloat16(), None),
        "random_fp16": (normal[:3].half(), None),
        "random_fp32": (normal[:3].clone(), None),
        "wide_bf16": (wide.bfloat16(), None),
        "wide_fp32": (wide.clone(), None),
        "holes_bf16": (holes.bfloat16(), None),
        "holes_fp32": (holes, None),
        "zero_bf16": (torch.zeros(2, 128, dtype=torch.bfloat16), torch.tensor(1.0)),
        "subnormal_bf16": (subnormal.bfloat16(), None),
        "signed_zero_bf16": (signed_zero.bfloat16(), None),
        "huge_bf16": (huge.bfloat16(), None),
        "single_bf16": (normal[:1, :128].bfloat16(), None),
    }


def around(ties: Tensor) -> Tensor:
    """Each tie and its bf16 neighbours, both signs."""
    up = (ties.bfloat16().view(torch.int16) + 1).view(torch.bfloat16)
    down = (ties.bfloat16().view(torch.int16) - 1).view(torch.bfloat16)
    one_sign = torch.cat([ties.bfloat16(), up, down])
    return torch.cat([one_sign, -one_sign])


def fp8_cases() -> dict[str, Case]:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = around((values[1:] + values[:-1]) / 2)
    beyond = torch.tensor([448.0, 464, 480, 1e4, BF16_MAX, -448, -500, -BF16_MAX]).bfloat16()
    return {
        "ties_bf16": (ties.view(1, -1), torch.tensor(1.0)),
        "ties_fp32": (ties.float().view(1, -1), torch.tensor(1.0)),
        "beyond_bf16": (beyond.view(1, -1), torch.tensor(1.0)),
        "odd_k_bf16": (torch.linspace(-1, 1, 3 * 7).view(3, 7).bfloat16(), None),
    }


def nvfp4_cases() -> dict[str, Case]:
    rows = [[6.0, *row, 0, 0] for row in around(torch.tensor(E2M1_TIES)).view(-1, 7).tolist()]
    ties = torch.tensor([[*row, *[0.0] * (16 - len(row))] for row in rows])
    steep = torch.logspace(-14, 3, 8, 2).repeat_interleave(16).view(1, -1) * torch.ones(2, 1)
    return {
        "ties_bf16": (ties.bfloat16(), torch.tensor(1.0)),
        "ties_fp32": (ties, torch.tensor(1.0)),
        "block_scale_below_min_bf16": (steep.bfloat16(), None),
        "block_scale_above_max_bf16": (steep.bfloat16(), torch.tensor(1e-3)),
        "one_block_bf16": (torch.linspace(-3, 1, 16).view(1, 16).bfloat16(), None),
    }


def int4_cases() -> dict[str, Case]:
    ties = torch.arange(-7.5, 8, 0.5).repeat(5)[:128]
    ties[0] = 7.5
    tail = torch.randn(2, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    return {"ties_bf16": (ties.view(1, -1).bfloat16(), None), "group32_bf16": (tail, None)}


def scale_of(w: Tensor, given: Tensor | None, largest: float) -> Tensor:
    return w.abs().max().float() / largest if given is None else given


def fp8(case: Case) -> Fields:
    w = case[0]
    dscale = scale_of(*case, 448.0)
    elements = to_quantized_weight(w, dscale, "fp8")
    decoded = FP8QTensor(w.shape, w.dtype, elements).dequantize(torch.float32, scale=dscale)
    return {"dscale": dscale, "elements": elements, "decoded": decoded}


def nvfp4(case: Case) -> Fields:
    w = case[0]
    dscale = scale_of(*case, 6.0 * 448.0)
    block_scale, _ = NVFP4QTensor.get_weights_scaling_factor(w, 16, dscale)
    elements = to_quantized_weight(w, block_scale, "nvfp4", dscale, 16)
    decoded = NVFP4QTensor(w.shape, torch.float32, elements).dequantize(
        scale=block_scale, double_scale=dscale, block_sizes={-1: 16}
    )
    return {
        "dscale": dscale,
        "elements": elements,
        "block_scale": block_scale,
        "decoded": decoded,
    }


def int4(case: Case, group_size: int) -> Fields:
    w = case[0]
    args = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=group_size,
        scale_dtype=torch.bfloat16,
    )
    groups = w.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    if w.dtype == torch.float16:  # which the tool cannot round to bf16
        low, high = low.float(), high.float()
    scale, _ = calculate_qparams(low, high, args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": w, "weight_scale": scale.bfloat16()}
    packed = PackedQuantizationCompressor.compress(state, scheme)
    decoded = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    return {
        "elements": packed["weight_packed"],
        "scale": packed["weight_scale"],
        "decoded": decoded,
    }


def save(name: str, cases: dict[str, Case], results: dict[str, Fields], made_by: str) -> None:
    tensors = {f"{c}.input": case[0].contiguous() for c, case in cases.items()}
    for case, fields in results.items():
        tensors |= {f"{case}.{f}": t.contiguous() for f, t in fields.items()}
    save_file(tensors, HERE / f"{name}.safetensors", {"made_by": made_by})


def main() -> None:
    made_by = f"nvidia-modelopt {modelopt.__version__}"
    for name, tool, own in (("fp8", fp8, fp8_cases()), ("nvfp4", nvfp4, nvfp4_cases())):
        cases = shared_cases() | own
        save(name, cases, {c: tool(case) for c, case in cases.items()}, made_by)
    cases = shared_cases() | int4_cases()
    results = {c: int4(case, 32 if c.startswith("group32") else 128) for c, case in cases.items()}
    save("int4", cases, results, f"compressed-tensors {ct_version}")


if __name__ == "__main__":
    main()
