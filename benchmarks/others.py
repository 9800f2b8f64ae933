"""Do the same work by other tools, from a bf16 weight [N, K] to stored tensors.

For ModelOpt it is what its exporter calls. For compressed-tensors it is each group's minimum and
maximum (its observers), ``calculate_qparams`` and the compressor.
"""

from collections.abc import Callable
from functools import partial

import torch
from compressed_tensors.compressors import (
    BaseCompressor,
    FloatQuantizationCompressor,
    IntQuantizationCompressor,
    MXFP4PackedCompressor,
    NVFP4PackedCompressor,
    PackedQuantizationCompressor,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor
from modelopt.torch.quantization.utils import reduce_amax, reduce_block_amax
from torch import Tensor

Encoder = Callable[[Tensor], object]

AMAX: dict[str, Encoder] = {
    "tensor": reduce_amax,
    "channel": partial(reduce_amax, axis=1),
    "group of 128": partial(reduce_block_amax, block_sizes={-1: 128}),
    "block of 16": partial(reduce_block_amax, block_sizes={-1: 16}),
}


def _modelopt_fp8_block(w: Tensor) -> object:
    scale = reduce_block_amax(w, {-1: 128, -2: 128}).float() / 448.0
    return to_quantized_weight(w, scale, "fp8_pb_wo", block_size=128)


def _modelopt_int4(w: Tensor) -> object:
    scale = reduce_block_amax(w, {-1: 128}).float() / 7.0
    return to_quantized_weight(w, scale, "int4_awq", block_size=128)


def _modelopt_nvfp4(w: Tensor) -> object:
    tensor_scale = w.abs().max().float() / (6.0 * 448.0)
    scale, _ = NVFP4QTensor.get_weights_scaling_factor(w, 16, tensor_scale)
    return to_quantized_weight(w, scale, "nvfp4", tensor_scale, 16)


def _modelopt_fp8(w: Tensor, axis: int | None, name: str) -> object:
    return to_quantized_weight(w, reduce_amax(w, axis, keepdims=False).float() / 448.0, name)


MODELOPT: dict[str, Encoder] = {
    "fp8": partial(_modelopt_fp8, axis=None, name="fp8"),
    "fp8_channel": partial(_modelopt_fp8, axis=1, name="fp8_pc_pt"),
    "fp8_block": _modelopt_fp8_block,
    "int4": _modelopt_int4,
    "nvfp4": _modelopt_nvfp4,
    "mxfp8": MXFP8QTensor.quantize,
}


def _compress(w: Tensor, args: QuantizationArgs, tool: type[BaseCompressor]) -> object:
    columns = args.group_size or w.shape[1]
    groups = w.unflatten(-1, (-1, columns))
    low, high = groups.amin(-1), groups.amax(-1)
    state = {"weight": w}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = 6.0 * 448.0 / w.abs().max().float()
    if args.strategy == "tensor":
        low, high = low.min(), high.max()
    scale, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    state["weight_scale"] = scale
    if not args.symmetric:
        state["weight_zero_point"] = zero
    return tool.compress(state, QuantizationScheme(targets=["Linear"], weights=args))


def _compressor(
    tool: type[BaseCompressor], bits: int, kind: str, strategy: str, **more: object
) -> Encoder:
    args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, **more)
    return partial(_compress, args=args, tool=tool)


_PACKED = partial(_compressor, PackedQuantizationCompressor)
COMPRESSED_TENSORS: dict[str, Encoder] = {
    "fp8": _compressor(FloatQuantizationCompressor, 8, "float", "tensor"),
    "fp8_channel": _compressor(FloatQuantizationCompressor, 8, "float", "channel"),
    "int8": _compressor(IntQuantizationCompressor, 8, "int", "channel"),
    "int4": _PACKED(4, "int", "group", group_size=128),
    "int4_asym": _PACKED(4, "int", "group", group_size=128, symmetric=False),
    "int8_group": _PACKED(8, "int", "group", group_size=128),
    "nvfp4": _compressor(
        NVFP4PackedCompressor,
        4,
        "float",
        "tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    ),
    "mxfp4": _compressor(
        MXFP4PackedCompressor,
        4,
        "float",
        "group",
        group_size=32,
        scale_dtype=torch.uint8,
        zp_dtype=torch.uint8,
    ),
}
