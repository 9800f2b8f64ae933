"""Routed experts whose second linear gets the same inputs as in serving engines.

Megatron's ``TEGroupedMLP`` multiplies a token's routing probability into the activation, before
``linear_fc2``. transformers and the engines multiply it into the output of ``down_proj``. In exact
arithmetic the results are equal. The inputs of ``linear_fc2`` are not, and these are what
calibration measures and fake quantization rounds.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.experts import TEGroupedMLP
from modelopt.torch.quantization.nn import QuantModule

from megatron_quant.errors import QuantError

EXPERTS = TEGroupedMLP


class QuantExperts(QuantModule):
    """A ``TEGroupedMLP`` that weighs its experts' outputs instead of their activations."""

    def _setup(self) -> None:
        if getattr(self, "_with_fused_impl", False):  # from megatron-core 0.17
            raise QuantError(
                "use_transformer_engine_op_fuser=True computes experts without their linears, and "
                "so without their quantizers: set it to False in the TransformerConfig"
            )

    def forward(
        self, x_TH: torch.Tensor, tokens_per_expert: torch.Tensor, probs_T: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        """Run the experts on tokens sorted by expert, and weigh each by its routing probability."""
        if self.config.moe_apply_probs_on_input:  # Llama 4 is trained and served so
            weighed: tuple[torch.Tensor, Any] = super().forward(x_TH, tokens_per_expert, probs_T)
            return weighed
        out_TH, bias = super().forward(x_TH, tokens_per_expert, torch.ones_like(probs_T))
        assert bias is None, "TEGroupedMLP adds its bias itself"
        return (out_TH * probs_T.unsqueeze(-1)).to(out_TH.dtype), None
