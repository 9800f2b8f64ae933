"""GPTQ: round a weight so that its outputs, not its elements, lose least.

Scales are found before and stay. Errors and coefficients are integers whose sums are exact in
fp64. So the order in which a matrix product adds changes nothing, nor do the rows that are rounded
together: the result depends on the row, its scales and the second moment alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_quant.errors import FormatError
from megatron_quant.formats import Format, check_storable
from megatron_quant.native import Origin
from megatron_quant.rounding.feedback import Feedback, check_damp, check_moment, feedback
from megatron_quant.rounding.grid import Grid, Steps, taken

_DAMP = {"nvfp4": 0.05}
_BLOCK, _INNER = 128, 16
"""Columns whose errors reach the rest by one matrix product, and columns of an inner block."""
_ERROR_BITS = 26
"""Errors are counted in the row's largest weight / 2^26, rounded to a power of two, ..."""
_MOST_ERROR = 2.0**28
"""... and are no more than this: with ``SUM_BITS`` for the coefficients sums stay below 2^53."""
_BYTES = {"cpu": 1 << 28}
_BYTES_ELSEWHERE = 1 << 33


@dataclass(frozen=True)
class Rounded:
    """The result of GPTQ on a weight.

    Attributes:
        w: fp32 in the weight's shape, every value on the grid.
        loss_E: Sum over rows of e H e^T, e = w - rounded, with the damped H: fp64, one per moment.
        damp_E: Damp that each moment took.
    """

    w: Tensor
    loss_E: Tensor
    damp_E: Tensor


def default_damp(fmt: Format) -> float:
    """Return the default part of the mean diagonal that is added to the diagonal."""
    return _DAMP.get(fmt.name, 0.01)


@dataclass(frozen=True)
class GptqSettings:
    """The damp that GPTQ takes, and which weights it rounds.

    Attributes:
        damp: Part of the moment's mean diagonal that is added to it, 0 < damp <= 1; that of
            ``default_damp`` where None.
        names: Names of the weights, one a matrix, for messages.
        origin: Row of the logical tensor at which the weight starts, and 0.
    """

    damp: float | None = None
    names: Sequence[str] = ()
    origin: Origin = (0, 0)


_NOTHING = GptqSettings()


@dataclass(frozen=True)
class Piece:
    """Whole rows of weights to round.

    Attributes:
        w: Finite bf16, fp16 or fp32, [N, K] or [E, N, K].
        scales: Fields of the format without its elements, as ``encode_on`` takes them.
        origin: Row of the logical tensor at which it starts, and 0.
    """

    w: Tensor
    scales: Mapping[str, Tensor]
    origin: Origin = (0, 0)


def gptq(
    w: Tensor,
    fmt: Format,
    scales: Mapping[str, Tensor],
    moment: Tensor,
    settings: GptqSettings = _NOTHING,
) -> Rounded:
    """Round ``w`` column by column; each makes up for the errors of those before it.

    Args:
        w: Finite bf16, fp16 or fp32, [N, K] or [E, N, K]: whole rows of the logical tensor.
        fmt: The format to round to.
        scales: Fields of ``fmt`` without its elements, as ``encode_on`` takes them. ``encode_on``
            of the result, with them, gives its codes exactly.
        moment: Sums (or means) of x x^T over the inputs, fp32 [E, K, K], or [K, K] for all.
        settings: The damp, and which weights these are.

    Raises:
        FormatError: Where ``encode`` raises it, and for a piece that begins after column 0.
        RecipeError: For another damp.
        CalibrationError: For a moment that is not finite or has no Cholesky factor.
    """
    (found,) = gptq_pieces([Piece(w, scales, settings.origin)], fmt, moment, settings)
    return found


@torch.no_grad()
def gptq_pieces(
    pieces: Sequence[Piece],
    fmt: Format,
    moment: Tensor | Feedback,
    settings: GptqSettings = _NOTHING,
) -> list[Rounded]:
    """Round pieces whose inputs are the same as :func:`gptq` does, and factor each moment once.

    Args:
        pieces: The pieces, each with as many matrices.
        fmt: The format to round to.
        moment: As :func:`gptq` takes it, or what :func:`factored` made of it.
        settings: The damp, unless the moment is factored, and names; the origin is the pieces'.

    Raises:
        QuantError: As :func:`gptq` does.
    """
    for piece in pieces:
        _check(piece, fmt)
    cols = pieces[0].w.shape[-1]
    shape = (moment.coefficients_EKK if isinstance(moment, Feedback) else moment).shape
    assert shape[-2:] == (cols, cols), (pieces[0].w.shape, shape)
    matrices = shape[0] if len(shape) == 3 else 1
    all_EN = [piece.w.reshape(matrices, -1, cols) for piece in pieces]
    assert all(len(shape) == 2 or matrices in (1, len(p.w)) for p in pieces), shape
    grids = [Grid.of(p.w, fmt, p.scales, p.origin, matrices) for p in pieces]
    found = [_Output(w_ENK) for w_ENK in all_EN]
    names = settings.names or [f"matrix {e}" for e in range(matrices)]
    for part in _parts(all_EN):
        how = _factors(moment, part, fmt, settings, names[part])
        for w_ENK, grid, out in zip(all_EN, grids, found, strict=True):
            out.add(part, *_round(w_ENK[part], part, grid, how), how.damp_E)
    return [out.whole(piece.w.shape) for piece, out in zip(pieces, found, strict=True)]


def factored(moment: Tensor, fmt: Format, settings: GptqSettings = _NOTHING) -> Feedback:
    """Factor the second moment of one input, to round several pieces of its weight in turn.

    Args:
        moment: fp32 [K, K].
        fmt: The format, for its damp.
        settings: The damp, and one name.

    Raises:
        QuantError: As :func:`gptq` does.
    """
    names = settings.names or ["matrix 0"]
    return _factors(moment.unsqueeze(0), slice(0, 1), fmt, settings, names)


def _factors(
    moment: Tensor | Feedback,
    part: slice,
    fmt: Format,
    settings: GptqSettings,
    names: Sequence[str],
) -> Feedback:
    if isinstance(moment, Feedback):
        return moment.of(part)
    damp = default_damp(fmt) if settings.damp is None else settings.damp
    check_damp(damp)
    moment_EKK = moment.view(-1, *moment.shape[-2:])[part]
    check_moment(moment_EKK, names)
    return feedback(moment_EKK, damp, names)


def _check(piece: Piece, fmt: Format) -> None:
    check_storable(piece.w, fmt, torch.empty(0), piece.origin)
    if piece.origin[1]:
        raise FormatError(f"GPTQ needs whole rows; this piece starts at column {piece.origin[1]}")


class _Output:
    """The result for a piece, filled some matrices at a time."""

    def __init__(self, w_ENK: Tensor) -> None:
        self._w_ENK = torch.empty(w_ENK.shape, device=w_ENK.device)
        self._losses: list[Tensor] = []
        self._damps: list[Tensor] = []

    def add(self, part: slice, w_ENK: Tensor, loss_E: Tensor, damp_E: Tensor) -> None:
        self._w_ENK[part] = w_ENK
        self._losses.append(loss_E)
        self._damps.append(damp_E)

    def whole(self, shape: torch.Size) -> Rounded:
        return Rounded(self._w_ENK.view(shape), torch.cat(self._losses), torch.cat(self._damps))


def _parts(all_EN: Sequence[Tensor]) -> Iterator[slice]:
    """Cut the matrices into parts to round at once: many on an accelerator, few on a small host."""
    matrices, _, cols = all_EN[0].shape
    each = cols * (24 * cols + 24 * max(w_ENK.shape[1] for w_ENK in all_EN))
    step = max(1, _BYTES.get(all_EN[0].device.type, _BYTES_ELSEWHERE) // max(each, 1))
    return (slice(start, min(start + step, matrices)) for start in range(0, matrices, step))


def _round(w_ENK: Tensor, part: slice, grid: Grid, how: Feedback) -> tuple[Tensor, Tensor]:
    """Return (values on the grid [E, N, K], loss [E])."""
    experts, _, cols = w_ENK.shape
    w_EKN = taken(w_ENK.mT.float(), how.order_EK)
    unit_EN = error_units(w_ENK)
    error_EKN = torch.empty(w_EKN.shape, dtype=torch.float64, device=w_ENK.device)
    loss_E = torch.zeros(experts, dtype=torch.float64, device=w_ENK.device)
    for stop in range(cols, 0, -_BLOCK):
        columns = slice(max(0, stop - _BLOCK), stop)
        made_up = how.coefficients_EKK[:, stop:, columns].mT @ error_EKN[:, stop:]
        block = _Block(
            w_ECN=w_EKN[:, columns],
            steps=grid.columns(part, how.order_EK[:, columns]),
            coefficients_ECC=how.coefficients_EKK[:, columns, columns],
            unit_EC=how.unit_EK[:, columns],
            unit_EN=unit_EN,
        )
        residual_ECN = block.round(made_up, error_EKN[:, columns])
        loss_E += (residual_ECN.square_().sum(-1) * how.pivot_EK[:, columns]).sum(-1)
    return _in_order(w_EKN, how.order_EK), loss_E


def error_units(w_ENK: Tensor) -> Tensor:
    """Return the unit in which errors of each row are counted: powers of two, fp64 [E, N]."""
    exponent = torch.frexp(w_ENK.abs().amax(-1).double()).exponent - _ERROR_BITS
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)


def _in_order(w_EKN: Tensor, order_EK: Tensor) -> Tensor:
    """Return [E, N, K] with its columns back in their places."""
    return taken(w_EKN, order_EK.argsort(1)).mT


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Some columns, to be rounded from the last to the first; w_ECN is overwritten."""

    w_ECN: Tensor
    steps: Steps
    coefficients_ECC: Tensor
    unit_EC: Tensor
    unit_EN: Tensor

    def round(self, made_up_ECN: Tensor, error_ECN: Tensor) -> Tensor:
        """Fill ``error_ECN`` and return the values before rounding less those after, fp64.

        Args:
            made_up_ECN: Sums of the errors of later columns, in units; overwritten.
            error_ECN: Errors of these columns, in units of their rows.
        """
        for stop in range(made_up_ECN.shape[1], 0, -_INNER):
            start = max(0, stop - _INNER)
            for column in range(stop - 1, start - 1, -1):
                self._round_column(column, made_up_ECN, error_ECN)
                before = self.coefficients_ECC[:, column, start:column, None]
                made_up_ECN[:, start:column].addcmul_(before, error_ECN[:, column, None])
            before = self.coefficients_ECC[:, start:stop, :start]
            made_up_ECN[:, :start] += before.mT @ error_ECN[:, start:stop]
        return made_up_ECN

    def _round_column(self, column: int, made_up_ECN: Tensor, error_ECN: Tensor) -> None:
        w_EN, made_up_EN = self.w_ECN[:, column], made_up_ECN[:, column]
        made_up_EN.mul_(self.unit_EC[:, column, None]).mul_(self.unit_EN).add_(w_EN)
        value_EN = self.steps.round(column, made_up_EN.float())
        error = (w_EN - value_EN).double().div_(self.unit_EN).round_()
        error_ECN[:, column] = error.clamp_(-_MOST_ERROR, _MOST_ERROR)
        made_up_EN.sub_(value_EN)
        w_EN.copy_(value_EN)
