"""vLLM's quantized layers as plain ones, for kernels that a CPU has not.

What vLLM loaded, fused and stacked is decoded where it lies, before anything is repacked, and its
own layers without quantization multiply with it. So all but the product of codes is vLLM's own.
"""

from collections.abc import Callable
from typing import Any

import torch

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)


def decode_after_loading(first: Callable[[], None]) -> None:
    """Let every model be decoded between its loading and its processing, after ``first()``."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load = DefaultModelLoader.load_weights

    def load_and_decode(loader: Any, model: torch.nn.Module, config: Any) -> None:
        load(loader, model, config)
        first()
        for module in model.modules():
            decode(module)

    DefaultModelLoader.load_weights = load_and_decode


def decode(module: torch.nn.Module) -> None:
    """Decode a linear or the routed experts of a layer, in place; leave others alone."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    own = dict(module.named_parameters(recurse=False))
    widths = getattr(module, "logical_widths", None)
    if "w13_weight_scale" in own:
        values = {f"{w}_weight": values_of(own, f"{w}_") for w in ("w13", "w2")}
        method = UnquantizedFusedMoEMethod(module.moe_config)
    elif "weight_scale" in own:
        values = {"weight": values_of(own, "", widths)}
        method = UnquantizedLinearMethod()
    else:
        return
    for name in own:
        if name != "bias":
            delattr(module, name)
    for name, value in values.items():
        held = torch.nn.Parameter(value.bfloat16(), requires_grad=False)
        module.register_parameter(name, held)
    module.quant_method = method


def values_of(own: dict[str, Any], at: str, widths: list[int] | None = None) -> torch.Tensor:
    """The values of a weight [.., N, K], fp32. ``widths``: rows of the linears that it fuses."""
    scale = own[f"{at}weight_scale"].float()
    if f"{at}weight_packed" in own and own[f"{at}weight_packed"].dtype == torch.int32:
        words = own[f"{at}weight_packed"]
        codes = ((words.unsqueeze(-1) >> _NIBBLES) & 15).flatten(-2).float() - 8
        return codes * scale.repeat_interleave(codes.shape[-1] // scale.shape[-1], -1)
    weight = own[f"{at}weight"]
    if weight.dtype != torch.uint8:
        return weight.float() * scale
    codes = torch.stack((weight & 15, weight >> 4), -1).flatten(-2).long()
    values = _E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    whole = own[f"{at}weight_scale_2"].float()
    if widths is not None:  # one for each linear; a fused one is told by its rows
        whole = whole.repeat_interleave(torch.tensor(widths)).unsqueeze(-1)
    elif whole.dim() == 2:  # [E, 2]: gate and up
        whole = whole.repeat_interleave(weight.shape[-2] // whole.shape[-1], -1).unsqueeze(-1)
    else:
        whole = whole.view(-1, 1, 1)
    return values * scale.repeat_interleave(16, -1) * whole
