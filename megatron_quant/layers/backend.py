"""ModelOpt's quantizers computing with our codecs.

ModelOpt owns the quantizer object (what is on, its amax, its name in state dicts); the numbers come
from :mod:`megatron_quant.formats` through ModelOpt's public backend seam, so that what a forward
sees is what an export stores, on every device.
"""

from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend
from modelopt.torch.quantization.nn.modules.tensor_quantizer import is_registered_quant_backend

from megatron_quant.errors import CalibrationError
from megatron_quant.formats import fake_quant, tensor_scale
from megatron_quant.formats.spec import Format, get_format

BACKEND = "megatron_quant"

# The attributes by which ModelOpt's summaries describe a format; the backend computes by its name.
_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": (4, 3)},
    "nvfp4": {"num_bits": (2, 1), "block_sizes": {"type": "dynamic", "scale_bits": (4, 3)}},
    "int4": {"num_bits": 4, "block_sizes": {"type": "dynamic"}},
}


def quantizer_attributes(fmt: Format, axis: int | None = None) -> dict[str, Any]:
    """Attribute config of a ModelOpt ``TensorQuantizer`` that stores in ``fmt``.

    ``axis``: the dim that has one amax an index (0 for one an expert of a stack); None for one
    amax over all. Block formats say ``dynamic``: their block scales follow from the values.
    """
    attributes = dict(_ATTRIBUTES[fmt.name])
    if fmt.group_size:
        attributes["block_sizes"] = {-1: fmt.group_size, **attributes["block_sizes"]}
    return {
        **attributes,
        "enable": True,
        "axis": axis,
        "backend": BACKEND,
        "backend_extra_args": {"format": fmt.name, "group_size": fmt.group_size},
    }


def quantizer_format(quantizer: TensorQuantizer) -> Format:
    """The format that :func:`quantizer_attributes` gave the quantizer."""
    args = quantizer.backend_extra_args
    return get_format(args["format"], args["group_size"])


def _fake_quantize(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    fmt = quantizer_format(quantizer)
    if not fmt.tensor_scale:
        return fake_quant(inputs, fmt, None)
    if quantizer.amax is None:
        raise CalibrationError(
            f"a {fmt.name} quantizer was used before it has an amax: calibrate the model first"
        )
    return fake_quant(inputs, fmt, tensor_scale(quantizer.amax.float(), fmt))


def register_backend() -> None:
    """Make ``backend="megatron_quant"`` known to ModelOpt; a second call does nothing."""
    if not is_registered_quant_backend(BACKEND):
        register_quant_backend(BACKEND, _fake_quantize)
