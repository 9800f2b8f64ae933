"""Weights for inputs in 4 bits: an engine multiplies what the codes of the inputs stand for.

A linear is measured with inputs x and served with y, the values of their codes. Of all weights
``W' = W E[x y^T] E[y y^T]^-1 = W + W L E[y y^T]^-1``, L = E[(x - y) y^T], loses least of the
outputs, E |W x - W' y|^2: what rounding takes from inputs on average, or from one where others
know of it, the weights give back. So GPTQ rounds W' in place of W, by the second moment of y. That
is Qronos' (Zhang et al. 2025) and GPTAQ's (Li et al. 2025) thought, here for inputs in codes, and
in one step before the rounding. Codes of 8 bits lose too little for it.

With H = E[x x^T], ``H - L - L^T = E[y y^T] + E[(x - y)(x - y)^T]``: the sums for weights alone and
L are enough. The last term, about a hundredth of the first, only adds to the damp.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_quant.rounding.algorithm import error_units
from megatron_quant.rounding.feedback import SUM_BITS, check_moment, cholesky, mean_diagonals

_DAMP = 0.02
"""Part of the mean diagonal that is added to the second moment of y, for W' alone."""


def serve_(moment_KK: Tensor, lost_KK: Tensor) -> None:
    """Turn sums of x x^T into those of y y^T, in place.

    Args:
        moment_KK: fp32 [..., K, K].
        lost_KK: Sums of (x - y) y^T over the same tokens, fp32 [..., K, K].
    """
    moment_KK.sub_(lost_KK).sub_(lost_KK.mT)


@dataclass(frozen=True)
class Correction:
    """The part that a weight gives back: ``W' = W + W D``.

    Its sums are exact, as GPTQ's are: a row's result does not depend on the rows beside it.

    Attributes:
        coefficients_KK: D over its column's unit, integers in fp64.
        unit_K: Unit of each column, powers of two, fp64.
    """

    coefficients_KK: Tensor
    unit_K: Tensor

    def apply(self, w_NK: Tensor) -> Tensor:
        """Return W' of whole rows, in their dtype."""
        unit_N1 = error_units(w_NK).unsqueeze(-1)
        added = (w_NK.double() / unit_N1).round_() @ self.coefficients_KK
        return added.mul_(self.unit_K).mul_(unit_N1).add_(w_NK).to(w_NK.dtype)


def correction(moment_KK: Tensor, lost_KK: Tensor, name: str) -> Correction:
    """Return the correction of the weights of one input.

    Args:
        moment_KK: Sums of y y^T, as :func:`serve_` leaves them, fp32.
        lost_KK: Sums of (x - y) y^T, fp32.
        name: Name of the weight, for messages.

    Raises:
        CalibrationError: For sums that are not finite, or not positive definite with any damp.
    """
    check_moment(moment_KK.unsqueeze(0), [name])
    moment_1KK = moment_KK.double().unsqueeze(0)
    mean_1 = mean_diagonals(moment_1KK)
    lower_1KK, _ = cholesky(moment_1KK, mean_1, _DAMP, [name])
    d_KK = torch.cholesky_solve(lost_KK.double().mT, lower_1KK[0]).mT
    exponent_K = torch.frexp(d_KK.abs().sum(0)).exponent - SUM_BITS
    unit_K = torch.ldexp(torch.ones_like(exponent_K, dtype=torch.float64), exponent_K)
    return Correction((d_KK / unit_K).round_(), unit_K)
