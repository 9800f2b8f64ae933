"""ModelOpt: mse calibration gives one weight's tensor-parallel shards different scales.

torchrun --nproc-per-node 2 docs/upstream/modelopt_mse_tp.py
"""

import copy

import tiny_moe as tiny

# isort: split
import modelopt.torch.quantization as mtq

tiny.start(tp=2, ep=1, etp=1)
found = {}
for algorithm in ("max", "mse"):
    built = tiny.model()
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["algorithm"] = {"method": algorithm}
    mtq.quantize(built, config, tiny.forward)
    amax = built.decoder.layers[0].self_attention.linear_proj.weight_quantizer.amax
    found[algorithm] = tiny.gathered(round(float(amax), 6))
tiny.finish(
    "a per-tensor amax of linear_proj that is equal on both TP ranks",
    f"amax by TP rank: {found}",
    len(set(found["max"])) == 1 and len(set(found["mse"])) == 2,
)
