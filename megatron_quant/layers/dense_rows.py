"""Let rows of a weight that stay dense multiply inputs that nothing rounded.

Megatron-Core has one linear for all inputs of a gated delta net. Engines build its last rows, the
gates b and a, as a linear of their own, without quantizers. So these rows go through the layer once
more by themselves, and their results replace those of rounded inputs. Gradients follow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule
from torch import Tensor

_WEIGHT, _MAIN_GRAD = "weight", "main_grad"


class DenseRows:
    """Gives a quantized linear dense results of its weight's rows from ``first`` on.

    They come before the others: a layer's first product of a step may overwrite the gradients that
    are in ``main_grad``, and the second adds to them.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._results: Tensor | None = None

    def put(self, module: QuantModule) -> None:
        """Hook them onto the forward of ``module``."""
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: Any, args: tuple[Any, ...]) -> None:
        self._results = None
        if module.input_quantizer.is_enabled:
            with self._alone(module):
                self._results = _tensor(module.original_cls.forward(module, *args))

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        results, self._results = self._results, None
        if results is None:
            return output
        mixed = torch.cat([_tensor(output)[..., : self._first], results], -1)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    @contextmanager
    def _alone(self, module: QuantModule) -> Iterator[None]:
        weight = module._parameters[_WEIGHT]
        assert weight is not None
        rows = weight[self._first :]
        # Transformer Engine adds gradients to main_grad, and looks for flags beside it
        rows.__dict__.update(vars(weight))
        if _MAIN_GRAD in vars(weight):
            rows.__dict__[_MAIN_GRAD] = vars(weight)[_MAIN_GRAD][self._first :]
        module._parameters[_WEIGHT] = rows
        try:
            yield
        finally:
            module._parameters[_WEIGHT] = weight


def _tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
