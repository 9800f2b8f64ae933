"""Make up for an error in one input column by the columns that are rounded after it.

The loss of a row is ``e H e^T``, e = w - q. With ``H = (F + 1) D (F + 1)^T``, F strictly lower and
D diagonal, it is ``sum_p D_p (e_p + sum_{i > p} e_i F_ip)^2``. Going from the last column to the
first, the bracket is least where q_p is the value nearest to ``w_p + sum_{i > p} e_i F_ip``. That
is GPTQ's rule (Frantar et al. 2023) in the form of QuIP's LDLQ (Chee et al. 2023), which needs one
Cholesky factor and no inverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_quant.errors import CalibrationError, RecipeError

SUM_BITS = 24
"""Bits of the sum of a column's coefficients: integers whose magnitudes add up to about 2^24."""
_GROWTH, _TRIES = 10.0, 4


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """F and D of each expert, for columns in the order in which they are rounded, last one first.

    Attributes:
        order_EK: int64, the weight's column at each place. The largest diagonal of H comes last.
        coefficients_EKK: F over its column's unit, integers in fp64, below the diagonal.
        unit_EK: Unit of each column, powers of two, fp64.
        pivot_EK: D, fp64.
        damp_E: Part of the mean diagonal that was added to it.
    """

    order_EK: Tensor
    coefficients_EKK: Tensor
    unit_EK: Tensor
    pivot_EK: Tensor
    damp_E: Tensor

    def of(self, part: slice) -> "Feedback":
        """Return those of some experts."""
        return Feedback(
            order_EK=self.order_EK[part],
            coefficients_EKK=self.coefficients_EKK[part],
            unit_EK=self.unit_EK[part],
            pivot_EK=self.pivot_EK[part],
            damp_E=self.damp_E[part],
        )


def check_damp(damp: float) -> None:
    """Raise RecipeError unless ``damp`` is a part of the mean diagonal, above 0 and at most 1."""
    if not 0 < damp <= 1:
        raise RecipeError(f"damp is {damp}; give a part of the mean diagonal, such as 0.01 or 0.05")


def check_moment(moment_EKK: Tensor, names: Sequence[str]) -> None:
    """Raise CalibrationError, with the name of the input, for a matrix that is no second moment."""
    diagonal_EK = moment_EKK.diagonal(dim1=1, dim2=2)
    # A sum of finite numbers may overflow; an infinity or NaN among them never gets lost.
    finite = torch.stack([m.abs().amax() for m in moment_EKK]).isfinite()
    for name, fine, least in zip(names, finite.tolist(), diagonal_EK.amin(1).tolist(), strict=True):
        if not fine:
            raise CalibrationError(
                f"the second moment of the inputs of {name} is not finite: an activation is NaN or "
                "infinite on the calibration data; exclude the layer or check the model"
            )
        if least < 0:
            raise CalibrationError(
                f"the second moment of the inputs of {name} has {least:g} on its diagonal, which "
                "holds sums of squares; calibrate again"
            )


def feedback(moment_EKK: Tensor, damp: float, names: Sequence[str]) -> Feedback:
    """Factor the damped moments.

    Args:
        moment_EKK: fp32 or fp64 sums (or means) of x x^T that ``check_moment`` accepts. Inputs that
            were always 0 get the mean diagonal: nothing is made up for in them, or for them.
        damp: Part of the mean diagonal to add to it; ten times as much where that is not enough to
            make the matrix positive definite, up to four times over.
        names: Names of the inputs, one an expert, for messages.

    Raises:
        CalibrationError: Where the matrix never becomes positive definite.
    """
    diagonal_EK = moment_EKK.diagonal(dim1=1, dim2=2).double()
    order_EK = diagonal_EK.argsort(dim=1, descending=True, stable=True).flip(1)
    mean_E = mean_diagonals(moment_EKK)
    lower_EKK, damp_E = cholesky(_permuted(moment_EKK, order_EK), mean_E, damp, names)
    root_EK = lower_EKK.diagonal(dim1=1, dim2=2).clone()
    sum_EK = torch.linalg.vector_norm(lower_EKK, ord=1, dim=1) / root_EK
    exponent = torch.frexp(sum_EK).exponent.sub_(SUM_BITS)
    unit_EK = torch.ldexp(torch.ones_like(root_EK), exponent)
    lower_EKK.mul_(1 / (root_EK * unit_EK).unsqueeze(1)).round_()
    return Feedback(
        order_EK=order_EK,
        coefficients_EKK=lower_EKK,
        unit_EK=unit_EK,
        pivot_EK=root_EK.square_(),
        damp_E=damp_E,
    )


def _permuted(matrix_EKK: Tensor, order_EK: Tensor) -> Tensor:
    """Permute rows and columns to that order, fp64."""
    pairs = zip(matrix_EKK, order_EK, strict=True)
    return torch.stack([matrix[order].double()[:, order] for matrix, order in pairs])


def mean_diagonals(moment_EKK: Tensor) -> Tensor:
    """Return the mean of each diagonal, fp64 [E]; 1 where it is 0."""
    mean_E = moment_EKK.diagonal(dim1=1, dim2=2).double().mean(1)
    return torch.where(mean_E > 0, mean_E, 1.0)


def cholesky(
    moment_EKK: Tensor, mean_E: Tensor, damp: float, names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return (lower factors, damp of each expert), and overwrite diagonals of ``moment_EKK``.

    Args and errors are those of :func:`feedback`; the moments are fp64, ``mean_E`` their diagonals'
    means.
    """
    diagonal_EK = moment_EKK.diagonal(dim1=1, dim2=2)
    diagonal_EK.copy_(torch.where(diagonal_EK == 0, mean_E[:, None], diagonal_EK))
    own_EK, damp_E = diagonal_EK.clone(), torch.full_like(mean_E, damp)
    diagonal_EK.add_(damp * mean_E[:, None])
    lower_EKK, info_E = torch.linalg.cholesky_ex(moment_EKK)
    for _ in range(_TRIES):
        failed = info_E.nonzero()[:, 0]
        if not len(failed):
            return lower_EKK, damp_E
        damp_E[failed] *= _GROWTH
        diagonal_EK.copy_(own_EK + (damp_E * mean_E)[:, None])
        lower_EKK[failed], info_E[failed] = torch.linalg.cholesky_ex(moment_EKK[failed])
    left = info_E.nonzero()[:, 0].tolist()
    if left:
        raise CalibrationError(
            f"the second moment of the inputs of {names[left[0]]} is not positive definite, even "
            f"with {damp_E[left[0]].item():g} of its mean diagonal added to it; calibrate again, "
            "with more tokens, or choose another algorithm"
        )
    return lower_EKK, damp_E
