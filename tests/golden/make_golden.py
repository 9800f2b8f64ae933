"""Golden bytes of the number formats, made by the tools whose formats they are.

fp8, fp8_channel, fp8_block, fp8_group, nvfp4 and mxfp8: nvidia-modelopt 0.47.0. The others:
compressed-tensors 0.20.0. Run from the repository's root with both installed; the tests read only
the files:

    python -m tests.golden.make_golden

``inputs.safetensors`` has the inputs that all formats share, ``<case>``. A format's file has, for
each case, ``<case>.input`` unless it is one of those, ``<case>.dscale`` (formats with a tensor
scale), ``<case>.stat`` (where block statistics are given), the format's fields, and
for bf16 inputs ``<case>.decoded``: the same tool's decoding, rounded to bf16 except in fp8 and
nvfp4.
"""
# ruff: noqa: E402

import sys
from collections.abc import Callable
from pathlib import Path

sys.modules["transformer_engine"] = None  # an optional plugin of ModelOpt, not used here

import modelopt
import torch
from compressed_tensors import __version__ as ct_version
from compressed_tensors.compressors import (
    BaseCompressor,
    IntQuantizationCompressor,
    MXFP4PackedCompressor,
    PackedQuantizationCompressor,
)
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from modelopt.torch.export.quant_utils import get_scaling_factor, to_quantized_weight
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.nn.modules.tensor_quantizer import StaticBlockScaleQuantizer
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import save_file
from torch import Tensor

from tests.golden import cases
from tests.golden.cases import Case, Cases

HERE = Path(__file__).parent
Fields = dict[str, Tensor]
BF16 = torch.bfloat16
MODELOPT = f"nvidia-modelopt {modelopt.__version__}"
COMPRESSED_TENSORS = f"compressed-tensors {ct_version}"


def scale_of(w: Tensor, given: Tensor | None, largest: float) -> Tensor:
    return w.abs().max().float() / largest if given is None else given.clone()


def fp8(name: str, case: Case) -> Fields:
    w = case[0]
    dscale = scale_of(*case, 448.0)
    elements = to_quantized_weight(w, dscale, "fp8")
    decoded = FP8QTensor(w.shape, w.dtype, elements).dequantize(torch.float32, scale=dscale)
    return {"dscale": dscale, "elements": elements, "decoded": decoded}


def modelopt_scale(w: Tensor, config: dict) -> Tensor:
    """Scale that ModelOpt exports for a weight quantizer that saw only ``w``."""
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3), **config))
    quantizer.enable_calib()
    quantizer.disable_quant()
    quantizer(w)
    quantizer.load_calib_amax()
    return get_scaling_factor(quantizer)


def fp8_channel(name: str, case: Case) -> Fields:
    w = case[0]
    scale = modelopt_scale(w, {"axis": 0}).view(-1)
    elements = to_quantized_weight(w, scale, "fp8_pc_pt")
    decoded = (elements.float() * scale[:, None]).to(BF16)
    return {"elements": elements, "scale": scale.view(-1, 1), "decoded": decoded}


def fp8_block(name: str, case: Case) -> Fields:
    fields = fp8_by_block(case[0], {-1: 128, -2: 128})
    exported = to_quantized_weight(case[0], fields["scale"], "fp8_pb_wo", block_size=128)
    assert torch.equal(exported.view(torch.uint8), fields["elements"].view(torch.uint8))
    return fields


def fp8_group(name: str, case: Case) -> Fields:
    return fp8_by_block(case[0], {-1: 128})


def fp8_by_block(w: Tensor, blocks: dict[int, int]) -> Fields:
    grid = [-(-w.shape[dim] // blocks.get(dim, 1)) for dim in (-2, -1)]
    scale = modelopt_scale(w, {"block_sizes": blocks}).reshape(grid)
    stored, _ = FP8QTensor.quantize(w, scale, block_sizes=blocks)
    decoded = stored.dequantize(torch.float32, scale=scale, block_sizes=blocks)
    return {"elements": stored._quantized_data, "scale": scale, "decoded": decoded.to(BF16)}


def nvfp4(name: str, case: Case) -> Fields:
    w = case[0]
    dscale = scale_of(*case, 6.0 * 448.0)
    block_scale, _ = NVFP4QTensor.get_weights_scaling_factor(w, 16, dscale)
    return nvfp4_by(w, block_scale, dscale)


def nvfp4_by(w: Tensor, block_scale: Tensor, dscale: Tensor) -> Fields:
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


def nvfp4_static(name: str, case: Case) -> Fields:
    """With searched block amaxes: of each block 1 or 1.5 times its own for four-over-six."""
    w, four_over_six = case[0], name.startswith("four_over_six")
    gen = torch.Generator().manual_seed(15)
    stat = w.float().abs().unflatten(-1, (-1, 16)).amax(-1)
    share = torch.rand(stat.shape, generator=gen)
    stat *= torch.where(share < 0.5, 1.0, 1.5) if four_over_six else 0.5 + share
    blocks = {-1: 16, "type": "static", "scale_bits": (4, 3), "four_over_six": four_over_six}
    quantizer = StaticBlockScaleQuantizer.from_tensor_quantizer(
        TensorQuantizer(QuantizerAttributeConfig(num_bits=(2, 1), block_sizes=blocks)),
        global_amax=w.abs().max().float(),
    )
    quantizer.amax = stat.view(-1, 1)
    dscale = NVFP4QTensor.get_weights_scaling_factor_2_from_quantizer(quantizer)
    scale, _ = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, w, dscale)
    return {"stat": stat.unsqueeze(-1), **nvfp4_by(w, scale, dscale)}


def mxfp8(name: str, case: Case) -> Fields:
    w = case[0]
    scale = MXFP8QTensor.get_weights_scaling_factor(w)
    elements = MXFP8QTensor.quantize_with_scale(w, scale)
    decoded = MXFP8QTensor(w.shape, BF16, elements).dequantize(scale=scale)
    return {"elements": elements, "scale": scale, "decoded": decoded}


def compressed(w: Tensor, args: QuantizationArgs, tool: type[BaseCompressor]) -> Fields:
    """What compressed-tensors stores of ``w``, and as ``decoded`` what it makes of that.

    Scales in the dtype that the args name; from bf16 statistics where that is bf16 and w is too,
    else from fp32 ones (compressed-tensors cannot round an fp16 scale to bf16).
    """
    columns = args.group_size if args.group_size else w.shape[1]
    groups = w.unflatten(-1, (-1, columns))
    low, high = groups.amin(-1), groups.amax(-1)
    if w.dtype != BF16 or args.scale_dtype == torch.float32:
        low, high = low.float(), high.float()
    if args.strategy == "tensor":
        low, high = low.min(), high.max()
    scale, zero = calculate_qparams(low, high, args)
    return compressed_by(w, args, tool, scale, zero)


def compressed_by(
    w: Tensor, args: QuantizationArgs, tool: type[BaseCompressor], scale: Tensor, zero: Tensor
) -> Fields:
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    is_float = args.scale_dtype is not None and args.scale_dtype.is_floating_point
    state = {"weight": w, "weight_scale": scale.to(args.scale_dtype) if is_float else scale}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    stored = tool.compress(state, scheme)
    fields = {"elements": stored.get("weight_packed", stored.get("weight"))}
    fields["scale"] = stored["weight_scale"]
    if not args.symmetric:
        shape = torch.Size((w.shape[0], scale.shape[1]))
        words = stored["weight_zero_point"]
        fields["zero"] = (unpack_from_int32(words, 4, shape, packed_dim=0) + 8).to(torch.uint8)
    decoded = tool.decompress(stored, scheme)["weight"]
    return {**fields, "decoded": decoded.to(BF16)}


def args(bits: int, kind: str, strategy: str, scale_dtype: torch.dtype, **more) -> QuantizationArgs:
    more = {"symmetric": True, **more}
    return QuantizationArgs(
        num_bits=bits, type=kind, strategy=strategy, scale_dtype=scale_dtype, **more
    )


def int8(name: str, case: Case) -> Fields:
    how = args(8, "int", "channel", torch.float32)
    return compressed(case[0], how, IntQuantizationCompressor)


def int8_tensor(name: str, case: Case) -> Fields:
    how = args(8, "int", "tensor", torch.float32)
    dscale = scale_of(*case, 127.5)
    fields = compressed_by(case[0], how, IntQuantizationCompressor, dscale.view(1), dscale)
    return {"dscale": dscale, "elements": fields["elements"], "decoded": fields["decoded"]}


def grouped(name: str, bits: int, symmetric: bool) -> QuantizationArgs:
    """Args of a case whose name says its group, 128 where it does not."""
    if name.startswith("channel"):
        return args(bits, "int", "channel", BF16, symmetric=symmetric)
    size = int(name.removeprefix("group").split("_")[0]) if name.startswith("group") else 128
    return args(bits, "int", "group", BF16, symmetric=symmetric, group_size=size)


def int4(name: str, case: Case) -> Fields:
    return compressed(case[0], grouped(name, 4, True), PackedQuantizationCompressor)


def int4_asym(name: str, case: Case) -> Fields:
    # The tool cannot unpack the zero points of eight rows or less.
    rows = case[0].repeat(16, 1)
    fields = compressed(rows, grouped(name, 4, False), PackedQuantizationCompressor)
    return {field: value[: len(case[0])].clone() for field, value in fields.items()}


def int8_group(name: str, case: Case) -> Fields:
    return compressed(case[0], grouped(name, 8, True), PackedQuantizationCompressor)


def mxfp4(name: str, case: Case) -> Fields:
    how = args(4, "float", "group", torch.uint8, group_size=32, zp_dtype=torch.uint8)
    w = case[0].float() if case[0].dtype == torch.float16 else case[0]
    return compressed(w, how, MXFP4PackedCompressor)


FORMATS: dict[str, tuple[Callable[[str, Case], Fields], Cases, str]] = {
    "fp8": (fp8, cases.fp8_cases(), MODELOPT),
    "fp8_channel": (fp8_channel, cases.fp8_channel_cases(), MODELOPT),
    "fp8_block": (fp8_block, cases.fp8_block_cases(), MODELOPT),
    "fp8_group": (fp8_group, cases.fp8_group_cases(), MODELOPT),
    "int8": (int8, cases.int8_cases(), COMPRESSED_TENSORS),
    "int8_tensor": (int8_tensor, cases.int8_tensor_cases(), COMPRESSED_TENSORS),
    "int4": (int4, cases.int4_cases(), COMPRESSED_TENSORS),
    "int4_asym": (int4_asym, cases.int4_asym_cases(), COMPRESSED_TENSORS),
    "int8_group": (int8_group, cases.int8_group_cases(), COMPRESSED_TENSORS),
    "nvfp4": (nvfp4, cases.nvfp4_cases(), MODELOPT),
    "nvfp4_static": (nvfp4_static, cases.nvfp4_static_cases(), MODELOPT),
    "mxfp8": (mxfp8, cases.mxfp8_cases(), MODELOPT),
    "mxfp4": (mxfp4, cases.mxfp4_cases(), COMPRESSED_TENSORS),
}


def main() -> None:
    shared = cases.shared_cases()
    save_file({name: w for name, (w, _) in shared.items()}, HERE / "inputs.safetensors")
    for fmt, (tool, own, made_by) in FORMATS.items():
        tensors = {f"{name}.input": w.contiguous() for name, (w, _) in own.items()}
        for name, case in {**({} if fmt == "nvfp4_static" else shared), **own}.items():
            fields = tool(name, case)
            if case[0].dtype != BF16:
                del fields["decoded"]
            tensors |= {f"{name}.{f}": t.contiguous() for f, t in fields.items()}
        save_file(tensors, HERE / f"{fmt}.safetensors", {"made_by": made_by})


if __name__ == "__main__":
    main()
