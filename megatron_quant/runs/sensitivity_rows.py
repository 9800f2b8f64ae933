"""Describe what a measurement of families found, as values. Nothing here imports torch."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FamilyLoss:
    """The loss of a family in a format, everything else unquantized.

    family: its name. format: the recipe that it is quantized by, or the form of the KV cache.
    weights: number of its weights that the recipe quantizes; 0 for the cache. bits: bits of each,
    scales included. kl: mean KL divergence of a token from the unquantized model, in nats.
    """

    family: str
    format: str
    weights: int
    bits: float
    kl: float = 0.0


@dataclass(frozen=True)
class Sensitivity:
    """The families of a model, and what each loses alone.

    rows: family by family, in every format that changes it. left_out: what was not measured, and
    why, one line each. tokens: how many it was measured on.
    """

    rows: tuple[FamilyLoss, ...]
    left_out: tuple[str, ...]
    tokens: int

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        rows = [asdict(row) for row in self.rows]
        return {
            "version": 1,
            "tokens": self.tokens,
            "rows": rows,
            "left_out": list(self.left_out),
        }
