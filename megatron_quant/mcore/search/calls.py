"""Keep the arguments of a module's calls and the gradients of their outputs, to run them again."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_quant.errors import CalibrationError
from megatron_quant.search import detached, first_output


@dataclass
class Call:
    """A call of a module in a forward, and the gradient of its output once there is one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradient: torch.Tensor | None = None
    output: torch.Tensor | None = None

    @torch.no_grad()
    def score(
        self, module: nn.Module, rounded: Callable[[], AbstractContextManager[None]]
    ) -> float:
        """Return the sum of (gradient x change of the output)^2 that rounding makes.

        All ranks that compute the module together call it in the same order.
        """
        assert self.gradient is not None
        if self.output is None:
            self.output = first_output(module(*self.args, **self.kwargs)).float()
        with rounded():
            change = first_output(module(*self.args, **self.kwargs)).float() - self.output
        return float((self.gradient.float() * change).square().sum(dtype=torch.float64))


class Seen:
    """The calls of a module that a forward made.

    Args:
        name: Name of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: list[Call] = []

    def saw(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note a call; a forward hook."""
        out = first_output(output)
        if not out.requires_grad:
            return
        call = Call(detached(args), {name: detached(value) for name, value in kwargs.items()})
        self._calls.append(call)

        def note(gradient: torch.Tensor) -> None:
            call.gradient = gradient

        out.register_hook(note)

    def calls(self, count: int) -> Sequence[Call]:
        """Return the first ``count`` calls, one for each batch.

        Raises:
            CalibrationError: If the forward did not call the module, or went around it.
        """
        calls = self._calls[:count]
        if len(calls) < count or any(call.gradient is None for call in calls):
            raise CalibrationError(
                f"the forward does not run {self._name} as one module, so its output has no "
                "gradient: build the model without moe_shared_expert_overlap and activation "
                "recomputation, or take --auto-quantize-method kl_div"
            )
        return calls
