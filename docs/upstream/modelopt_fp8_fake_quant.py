"""ModelOpt: the fp8 fake quant of a bf16 weight is not what its export stores.

The export divides in bf16 (the scale is a 0-dim tensor), the fake quant in fp32.

    python docs/upstream/modelopt_fp8_fake_quant.py
"""

import tiny_moe as tiny

# isort: split
import torch
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

torch.manual_seed(0)
differ = {}
for dtype in (torch.float32, torch.bfloat16):
    w = torch.randn(256, 256).to(dtype)
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3)))
    quantizer.amax = w.abs().max().float()
    scale = quantizer.amax / 448
    stored = to_quantized_weight(w, scale, "fp8").float() * scale
    differ[str(dtype)] = round(float((quantizer(w) != stored.to(dtype)).float().mean()), 4)
tiny.finish(
    "fake-quantized weights that equal those of the export, decoded",
    f"share of values that differ: {differ}",
    differ["torch.bfloat16"] > 0,
)
