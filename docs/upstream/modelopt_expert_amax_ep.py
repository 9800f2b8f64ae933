"""ModelOpt: one weight amax for the experts of a rank, and another on the next EP rank.

torchrun --nproc-per-node 2 docs/upstream/modelopt_expert_amax_ep.py
"""

import tiny_moe as tiny

# isort: split
import modelopt.torch.quantization as mtq

tiny.start(tp=1, ep=2, etp=1)
built = tiny.model()
mtq.quantize(built, mtq.FP8_DEFAULT_CFG, tiny.forward)
linear = built.decoder.layers[0].mlp.experts.linear_fc1
amaxes = {
    name: round(float(value), 6)
    for name, value in linear.state_dict().items()
    if name.startswith("weight_quantizer") and name.endswith("_amax")
}
by_rank = tiny.gathered(amaxes)
shared = len(amaxes) < linear.num_gemms
tiny.finish(
    "a quantizer that experts share has one amax in the layer, whatever EP is; or one an expert",
    f"weight amaxes by EP rank: {by_rank}",
    shared and by_rank[0] != by_rank[1],
)
