"""Megatron-Core, ModelOpt: experts' linear_fc2 is calibrated on inputs that no engine gives it.

torchrun --nproc-per-node 1 docs/upstream/modelopt_fc2_inputs.py
"""

import tiny_moe as tiny

# isort: split
import modelopt.torch.quantization as mtq
import torch

tiny.start(tp=1, ep=1, etp=1)
built = tiny.model()
experts = built.decoder.layers[0].mlp.experts
largest = {}


def watch(linear: torch.nn.Module, args: tuple[torch.Tensor, ...], out: object) -> None:
    """The output of linear_fc1: what down_proj's input is made of in a serving engine."""
    gate, up = (out[0] if isinstance(out, tuple) else out).float().chunk(2, -1)
    largest["h"] = float((torch.nn.functional.silu(gate) * up).abs().max())


hook = experts.linear_fc1.register_forward_hook(watch)
mtq.quantize(built, mtq.FP8_DEFAULT_CFG, tiny.forward)
hook.remove()
found = float(experts.linear_fc2.input_quantizer.amax)
tiny.finish(
    f"amax of linear_fc2's inputs {largest['h']:.4g}: silu(gate) * up, as down_proj is served",
    f"{found:.4g}: the router's probability is multiplied in before linear_fc2",
    found < 0.98 * largest["h"],
)
