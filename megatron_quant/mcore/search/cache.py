"""The KV cache as a place of a live model: keys and values that its attention quantizes or not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_quant.layers import CachedTensor
from megatron_quant.mcore.search.scope import LivePlace, Scope
from megatron_quant.recipes import CAST_AMAX
from megatron_quant.search import Place, Problem


@dataclass(frozen=True)
class Cast:
    """Rounds the keys or values of an attention, with a scale that follows from ``amax``."""

    cached: CachedTensor
    amax: float

    def put(self) -> Callable[[], None]:
        """Have them rounded; return what has them left alone again."""
        self.cached.set_amax(self.amax)
        self.cached.quantizer.enable()
        return self._leave

    def _leave(self) -> None:
        self.cached.quantizer.disable()


def cache_format(problem: Problem) -> str:
    """Return the KV cache that all options can be measured with: a calibrated one if any is."""
    options = (option.kv_cache for place in problem.places for option in place.options)
    return min(filter(None, options), default="")  # fp8 comes before fp8_cast


def live_cache(
    place: Place, cached: Sequence[CachedTensor], amaxes: Mapping[str, float]
) -> LivePlace:
    """Return this rank's part of the cache: it is scored at its own heads' keys and values.

    Args:
        place: The place of the cache.
        cached: This rank's keys and values, unquantized.
        amaxes: Their calibrated amaxes by slot, for a cache of ``fp8``.
    """
    scopes = tuple(Scope(tensor.quantizer, tensor.slot.name, counted=True) for tensor in cached)
    options = tuple(
        tuple(Cast(t, amaxes[t.slot.name] if kind == "fp8" else CAST_AMAX) for t in cached)
        if kind
        else ()
        for kind in (option.kv_cache for option in place.options)
    )
    return LivePlace(place, scopes, options)
