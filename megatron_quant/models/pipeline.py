"""Deal a model's layers to the stages of a pipeline."""

from dataclasses import dataclass
from itertools import accumulate

from megatron_quant.errors import LayoutError

Stages = tuple[tuple[tuple[int, ...], ...], ...]
"""For each pipeline rank, for each of its chunks (virtual stages): the global layers of the chunk.

Empty where one stage holds the whole model.
"""


@dataclass(frozen=True)
class Pipeline:
    """The sizes of a pipeline; every field is the flag of ``quantize`` that its errors name.

    Attributes:
        size: Pipeline ranks.
        chunks: Virtual stages of each rank.
        first: Layers of the first rank; None for an even share of the rest.
        last: Layers of the last rank; None for an even share of the rest.
    """

    size: int = 1
    chunks: int = 1
    first: int | None = None
    last: int | None = None

    def stages(self, layers: int) -> Stages:
        """Deal the layers of a model with ``layers`` layers to every chunk of every rank.

        The order is Megatron's (``get_num_layers_to_build`` and ``get_transformer_layer_offset`` of
        megatron.core.transformer): chunk by chunk, and within a chunk rank by rank.

        Raises:
            LayoutError: Where the layers cannot be dealt so.
        """
        if self.size == 1:
            self._check_alone()
            return ()
        counts = [self._share(count) for count in self._layers_each(layers)]
        ends = list(accumulate(counts * self.chunks))
        cells = [
            tuple(range(end - count, end))
            for end, count in zip(ends, counts * self.chunks, strict=True)
        ]
        return tuple(tuple(cells[rank :: self.size]) for rank in range(self.size))

    def _check_alone(self) -> None:
        given = {
            _VIRTUAL: self.chunks if self.chunks > 1 else None,
            _FIRST: self.first,
            _LAST: self.last,
        }
        for flag, value in given.items():
            if value is not None:
                raise LayoutError(f"{flag} {value} needs a pipeline: give --pp above 1 with it")

    def _layers_each(self, layers: int) -> list[int]:
        """Count the layers of each rank."""
        if self.size > layers:
            raise LayoutError(
                f"--pp {self.size} is more stages than the model has layers ({layers}); give at "
                "most as many"
            )
        ends = {_FIRST: self.first, _LAST: self.last}
        given = {flag: count for flag, count in ends.items() if count is not None}
        left, ranks = layers - sum(given.values()), self.size - len(given)
        fits = left % ranks == 0 and left >= ranks if ranks else left == 0
        if not fits and not given:
            raise LayoutError(
                f"--pp {self.size} does not divide the model's {layers} layers; choose a divisor, "
                f"or say with {_FIRST} or {_LAST} how many an end has"
            )
        if not fits:
            said = " and ".join(f"{flag} {count}" for flag, count in given.items())
            raise LayoutError(
                f"{said} of {layers} layers leave {left} to the other {ranks} stages of --pp "
                f"{self.size}: choose what they can share evenly, at least one each"
            )
        share = left // ranks if ranks else 0
        return [self.first or share, *[share] * (self.size - 2), self.last or share]

    def _share(self, count: int) -> int:
        """Return the layers of each chunk of a rank that has ``count``."""
        if count % self.chunks:
            raise LayoutError(
                f"{_VIRTUAL} {self.chunks} does not divide the {count} layers of a pipeline rank; "
                "choose a divisor of every rank's layers"
            )
        return count // self.chunks


_VIRTUAL = "--num-virtual-stages-per-pipeline-rank"
_FIRST = "--num-layers-in-first-pipeline-stage"
_LAST = "--num-layers-in-last-pipeline-stage"
