"""Quantize ``weight0 .. weight{N-1}`` of a grouped linear, whatever its base class.

The base class is called only through its public ``forward``. It reads the quantized weights from
``_parameters``, where they replace the parameters during the call. All experts of a rank are
quantized as one stack, so the number of Python calls does not grow with the experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer

from megatron_quant.errors import LayoutError
from megatron_quant.layers.backend import BACKEND, reset_block_amax
from megatron_quant.layers.stand_in import stand_ins


class QuantGroupedLinear(QuantModule):
    """A grouped linear with an input quantizer and one weight quantizer for its experts.

    With this library's attributes, ``weight_quantizer`` gets the experts as a stack, [E, N, K]. It
    holds one amax for all of the rank's experts (``axis=None``, shared scales) or one each
    (``axis=0``, [E, 1, 1]). With ModelOpt's own attributes it works as on a plain linear and gets
    the experts' rows one after another, [E * N, K].
    """

    num_gemms: int

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

    def weights(self) -> list[torch.Tensor]:
        """Return the rank's expert weights, each [N, K], in local order."""
        return [self._parameters[f"weight{i}"] for i in range(self.num_gemms)]

    @property
    def per_expert(self) -> bool:
        """Return whether every expert has its own weight amax."""
        return bool(self.weight_quantizer.axis == 0 and self.weight_quantizer.backend == BACKEND)

    def quantize(self, w_ENK: torch.Tensor) -> torch.Tensor:
        """Quantize the weights [E, N, K] of all of the rank's experts in one call."""
        if self.weight_quantizer.backend == BACKEND:
            stack: torch.Tensor = self.weight_quantizer(w_ENK)
            return stack
        rows: torch.Tensor = self.weight_quantizer(w_ENK.flatten(0, 1))
        return rows.view_as(w_ENK)

    def iter_weights_for_calibration(self) -> Iterator[tuple[torch.Tensor, Any]]:
        """Yield weights [N, K], each with the quantizer that observes it, for ModelOpt.

        If every expert has its own amax, the weights come once, as the stack [E, N, K].
        """
        quantizer = self.weight_quantizer
        if quantizer.axis is None and not quantizer.is_static_block_quant:
            for weight in self.weights():
                yield weight, quantizer
        else:
            yield torch.stack(self.weights()), self.quantize

    @torch.no_grad()
    def fold_weight(self, keep_attrs: bool = False) -> None:
        """Replace the weights by their quantized values and turn the quantizer off."""
        weights = self.weights()
        for weight, folded in zip(weights, self.quantize(torch.stack(weights)), strict=True):
            weight.copy_(folded)
        self.weight_quantizer.disable()
        if not keep_attrs:
            self.weight_quantizer.reset_amax()
            reset_block_amax(self.weight_quantizer)

    @contextmanager
    def _quantized_weights(self) -> Iterator[None]:
        if not self.weight_quantizer.is_enabled:
            yield
            return
        originals = {f"weight{i}": w for i, w in enumerate(self.weights())}
        quantized = self._stand_ins(list(originals.values()))
        try:
            self._parameters.update(zip(originals, quantized, strict=True))
            yield
        finally:
            self._parameters.update(originals)

    def _stand_ins(self, weights: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        if self.weight_quantizer.backend == BACKEND:
            return stand_ins(weights, self.quantize)
        return self.quantize(torch.stack(weights)).unbind(0)

    def forward(self, x: torch.Tensor, m_splits: Any) -> Any:
        """Run ``x`` [tokens, K], sorted by expert; ``m_splits`` counts each expert's tokens."""
        x = self.input_quantizer(x)
        with self._quantized_weights():
            out = super().forward(x, m_splits)
        if isinstance(out, tuple):
            return (self.output_quantizer(out[0]), *out[1:])
        return self.output_quantizer(out)
