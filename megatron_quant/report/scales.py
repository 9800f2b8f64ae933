"""Where a value stands between others: levels of colour, ticks, and numbers for people."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

LEVELS = 9
"""Steps of the colour scale, 0 to 8."""
_UNITS = ("B", "KB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Scale:
    """Maps values from ``low`` to ``high`` onto 0 to 1, by their logarithm if ``log``.

    counts: whether only whole numbers make ticks.
    """

    low: float
    high: float
    log: bool = False
    counts: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value, 0 to 1; values outside go to the nearest end."""
        if self.high <= self.low or value != value:
            return 0.5
        value = min(max(value, self.low), self.high)
        if self.log:
            return log10(value / self.low) / log10(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def level(self, value: float) -> int:
        """Return the level of colour of a value."""
        return min(int(self.at(value) * LEVELS), LEVELS - 1)

    def ticks(self) -> list[float]:
        """Return a few round values between the ends, or the ends where there are none."""
        found = self._decades() if self.log else self._steps()
        return found if len(found) > 1 else list(dict.fromkeys((self.low, self.high)))

    def _decades(self) -> list[float]:
        first, last = ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9)
        step = max(1, ceil((last - first + 1) / 5))
        found = [10.0**n for n in range(first, last + 1, step)]
        if last - first < 1:
            near = range(floor(log10(self.low)), last + 1)
            found = [m * 10.0**n for n in near for m in (1, 2, 5)]
        return [v for v in found if self.low <= v <= self.high * (1 + 1e-9)]

    def _steps(self) -> list[float]:
        if self.high <= self.low:
            return []
        rough = (self.high - self.low) / 4
        unit = 10.0 ** floor(log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * (1 - 1e-9))
        step = max(step, 1.0) if self.counts else step
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def scale_of(values: Iterable[float], log: bool = False) -> Scale:
    """Return the scale that just holds ``values``; a logarithmic one of those above zero."""
    found = [v for v in values if isfinite(v) and (v > 0 or not log)]
    return Scale(min(found, default=1.0), max(found, default=1.0), log)


def short(value: float | None, digits: int = 3) -> str:
    """Write a number with a few digits, and a dash for none and for what is not finite."""
    if value is None or not isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 10**6:
        return f"{int(value)}"
    return f"{value:.{digits}g}"


def whole(value: int) -> str:
    """Write a count with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def size(nbytes: float | None) -> str:
    """Write bytes for people, in powers of 1000; a dash for none."""
    if nbytes is None:
        return "–"
    for unit in _UNITS:
        if nbytes < 1000 or unit == _UNITS[-1]:
            return f"{nbytes:.3g}\u00a0{unit}" if nbytes < 1000 else f"{nbytes:.0f}\u00a0{unit}"
        nbytes /= 1000
    raise AssertionError


def seconds(taken: float) -> str:
    """Write a time for people."""
    if taken < 60:
        return f"{taken:.1f} s"
    minutes, rest = divmod(round(taken), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plural(count: int, one: str, many: str = "") -> str:
    """Write a count and its noun."""
    return f"{whole(count)} {one if count == 1 else many or one + 's'}"
