"""Weigh the errors of a search for scales by the inputs that they are multiplied with."""

import torch
from torch import Tensor

from megatron_quant.errors import CalibrationError
from megatron_quant.formats import Format
from megatron_quant.native import WHOLE, Cuts

_FLOOR = 0.01
"""Part of the mean that every weight gets on top: inputs that were always 0 count a little."""


def importance(diagonal: Tensor, fmt: Format, name: str = "a weight") -> Tensor:
    """Return weights for ``formats.search.errors``: fp32 [..., K], above 0 and below 1.

    Weights of a block of columns are divided by a power of two, so that its largest is 1/2 or more:
    errors keep their digits, and no block's choice changes. Where all are 0 they are equal.

    Args:
        diagonal: Sums (or means) of squares of the inputs, fp32 [..., K], all of K. A rank that
            holds some columns takes theirs of the result.
        fmt: Format whose scales are searched.
        name: Name of the weight, for messages.

    Raises:
        CalibrationError: Where the diagonal is not finite.
    """
    if not diagonal.isfinite().all():
        raise CalibrationError(
            f"the squares of the inputs of {name} are not finite: an activation is NaN, infinite "
            "or very large on the calibration data; exclude the layer or check the model"
        )
    cols = diagonal.shape[-1]
    block = fmt.stat_block[1] if fmt.stat_block else WHOLE
    columns = Cuts.of(cols, block, 0)
    mean = diagonal.double().mean(-1, keepdim=True).float()
    raised = torch.where(mean > 0, diagonal + _FLOOR * mean, 1.0).view(-1, cols)
    weights_RBb = columns.split(raised)
    exponent = torch.frexp(weights_RBb.amax(-1, keepdim=True)).exponent
    return columns.join(torch.ldexp(weights_RBb, -exponent)).view(diagonal.shape)
