"""The grid of a format, column by column of the weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_quant.formats import (
    E2M1,
    E2M1_VALUES,
    E4M3,
    INT4,
    INT4_MAX,
    INT4_MIN,
    INT8,
    INT8_MAX,
    INT8_MIN,
    INT8_WORDS,
    Element,
    Format,
    ScaleFields,
    e2m1_codes,
    e4m3,
    e4m3_values,
    kernel_of,
    rows_on,
)
from megatron_quant.native import Origin


def _e2m1_values(quotient: Tensor) -> Tensor:
    table = torch.tensor(E2M1_VALUES, device=quotient.device)
    codes = e2m1_codes(quotient).view(-1).to(torch.int32)
    return table.index_select(0, codes).view(quotient.shape)


def _integers(least: float, most: float) -> Callable[[Tensor], Tensor]:
    """Return a rounding to integers whose zero has no sign."""
    return lambda quotient: quotient.clamp_(least, most).round_().add_(0.0)


_NEAREST: list[tuple[Element, Callable[[Tensor], Tensor]]] = [
    (E4M3, lambda q: e4m3_values(e4m3(q))),
    (E2M1, _e2m1_values),
    (INT4, _integers(INT4_MIN, INT4_MAX)),
    (INT8, _integers(INT8_MIN, INT8_MAX)),
    (INT8_WORDS, _integers(INT8_MIN, INT8_MAX)),
]
"""(element, function): fp32 quotients (overwritten) -> values of their codes, unpacked."""


@dataclass(frozen=True)
class Steps:
    """Steps of some columns: fp32 [E, C, N] each; no zero point where ``zero_ECN`` is None."""

    step_ECN: Tensor
    zero_ECN: Tensor | None
    nearest: Callable[[Tensor], Tensor]

    def round(self, column: int, x_EN: Tensor) -> Tensor:
        """Return the nearest values on the grid of one of the columns, for fp32 ``x_EN``."""
        step = self.step_ECN[:, column]
        # A step that is 0 in fp32 decodes every value to 0: see ``numbers.arithmetic.exact``.
        code = x_EN / torch.where(step == 0, 1.0, step)
        if self.zero_ECN is None:
            return self.nearest(code).mul_(step)
        zero = self.zero_ECN[:, column]
        return self.nearest(code.add_(zero)).sub_(zero).mul_(step)


@dataclass(frozen=True)
class Grid:
    """Steps by block of columns, fp32 [E, B, N].

    Attributes:
        step_EBN: Steps.
        zero_EBN: Zero points; None where there are none.
        block_K: Block that each column lies in.
        nearest: Rounding of quotients to the values of codes.
    """

    step_EBN: Tensor
    zero_EBN: Tensor | None
    block_K: Tensor
    nearest: Callable[[Tensor], Tensor]

    @classmethod
    def of(
        cls, w: Tensor, fmt: Format, scales: Mapping[str, Tensor], origin: Origin, matrices: int
    ) -> "Grid":
        """Return the grid that ``scales``, as ``encode_on`` takes them, give to ``w`` [..., K].

        Args:
            w: The weight or a piece of it.
            fmt: Its format.
            scales: Fields of scales and zero points, by name.
            origin: Row and column of the logical tensor at which ``w`` starts.
            matrices: E, into which the rows of ``w`` are cut, in their order.
        """
        rows, kernel = rows_on(w, fmt, scales, origin), kernel_of(fmt)
        own: ScaleFields = rows.scales or ()
        if rows.block_R is not None:
            own = tuple(field.index_select(0, rows.block_R) for field in own)
        step_RB, zero_RB = kernel.scale.steps(own, rows.dscale_R1)
        column_K = torch.arange(w.shape[-1], device=w.device)
        return cls(
            _by_column(step_RB, matrices),
            None if zero_RB is None else _by_column(zero_RB, matrices),
            column_K.div(rows.columns.block, rounding_mode="floor"),
            next(nearest for element, nearest in _NEAREST if element is kernel.element),
        )

    def columns(self, part: slice, order_EC: Tensor) -> Steps:
        """Return the steps of the columns ``order_EC`` (int64) of the matrices ``part``."""
        index_EC = self.block_K[order_EC]
        zero = None if self.zero_EBN is None else taken(self.zero_EBN[part], index_EC)
        return Steps(taken(self.step_EBN[part], index_EC), zero, self.nearest)


def _by_column(value_RB: Tensor, matrices: int) -> Tensor:
    return value_RB.view(matrices, -1, value_RB.shape[1]).mT.contiguous()


def taken(value_EBN: Tensor, index_EC: Tensor) -> Tensor:
    """Take the rows ``index_EC`` of each matrix."""
    experts = torch.arange(len(index_EC), device=index_EC.device)[:, None]
    return value_EBN[experts, index_EC]
