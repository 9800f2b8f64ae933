"""Quantization of ``weight0 .. weight{N-1}`` of a grouped linear, whatever its base class.

The base class is called through its public ``forward`` only. The quantized weights reach it through
the parameters that it reads: they stand in ``_parameters`` for the time of the call. All experts of
a rank are quantized as one stack, so the number of Python calls does not grow with theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer

from megatron_quant.errors import LayoutError


class ExpertQuantizer:
    """One expert's place in a quantizer that keeps an amax per expert of a stack.

    Called with that expert's weight it has the stack's quantizer observe (or quantize) it, which is
    all that a calibration loop over ``(weight, quantizer)`` pairs does.
    """

    def __init__(self, stack_quantizer: TensorQuantizer, expert: int, num_experts: int) -> None:
        self.stack_quantizer = stack_quantizer
        self.expert = expert
        self.num_experts = num_experts

    def __call__(self, w_NK: torch.Tensor) -> torch.Tensor:
        """``w_NK`` [N, K] -> the same shape."""
        # Other experts' rows are zero: a running maximum does not see them.
        stack = w_NK.new_zeros(self.num_experts, *w_NK.shape)
        stack[self.expert] = w_NK
        return self.stack_quantizer(stack)[self.expert]


class QuantGroupedLinear(QuantModule):
    """A grouped linear with an input quantizer and one weight quantizer for its experts.

    ``weight_quantizer`` sees the stack [E, N, K] of the rank's experts. With ``axis=None`` it holds
    one amax for all of them (shared scales), with ``axis=0`` one each ([E, 1, 1]).
    """

    def _setup(self) -> None:
        if self.num_gemms < 1:
            raise LayoutError(
                f"a grouped linear with num_gemms={self.num_gemms} holds no expert: "
                "lower --ep so that every rank has one"
            )
        self.input_quantizer = TensorQuantizer()
        self.weight_quantizer = TensorQuantizer()
        self.output_quantizer = TensorQuantizer()
        self.output_quantizer.disable()

    def weights(self) -> list[torch.nn.Parameter]:
        """The rank's expert weights, each [N, K], in local order."""
        return [self._parameters[f"weight{i}"] for i in range(self.num_gemms)]

    @property
    def per_expert(self) -> bool:
        """Whether every expert has a weight amax of its own."""
        return self.weight_quantizer.axis == 0

    def iter_weights_for_calibration(self) -> Iterator[tuple[torch.Tensor, Any]]:
        """Yield ``(weight_i, quantizer)`` of every local expert (ModelOpt's calibration seam)."""
        for i, weight in enumerate(self.weights()):
            quantizer = self.weight_quantizer
            yield (
                weight,
                ExpertQuantizer(quantizer, i, self.num_gemms) if self.per_expert else quantizer,
            )

    @torch.no_grad()
    def fold_weight(self, keep_attrs: bool = False) -> None:
        """Replace the weights by their quantized values and turn the quantizer off."""
        weights = self.weights()
        for weight, folded in zip(
            weights, self.weight_quantizer(torch.stack(weights)), strict=True
        ):
            weight.copy_(folded)
        self.weight_quantizer.disable()
        if not keep_attrs:
            self.weight_quantizer.reset_amax()

    @contextmanager
    def _quantized_weights(self) -> Iterator[None]:
        if not self.weight_quantizer.is_enabled:
            yield
            return
        originals = {f"weight{i}": w for i, w in enumerate(self.weights())}
        quantized = self.weight_quantizer(torch.stack(list(originals.values())))
        try:
            self._parameters.update(zip(originals, quantized.unbind(0), strict=True))
            yield
        finally:
            self._parameters.update(originals)

    def forward(self, x: torch.Tensor, m_splits: Any) -> Any:
        """As the base class: ``x`` [tokens, K] sorted by expert, ``m_splits`` tokens an expert."""
        x = self.input_quantizer(x)
        with self._quantized_weights():
            out = super().forward(x, m_splits)
        if isinstance(out, tuple):
            return (self.output_quantizer(out[0]), *out[1:])
        return self.output_quantizer(out)
