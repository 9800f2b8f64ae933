"""How pipeline parallelism deals a model's layers to its stages."""

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

    size: pipeline ranks. chunks: virtual stages of each of them. first, last: layers of the first
    and of the last rank; None for the even share of what is left.
    """

    size: int = 1
    chunks: int = 1
    first: int | None = None
    last: int | None = None

    def stages(self, layers: int) -> Stages:
        """The layers of every chunk of every rank of a model with ``layers`` layers.

        As Megatron deals them (``get_num_layers_to_build`` and ``get_transformer_layer_offset`` of
        megatron.core.transformer): chunk by chunk, and within a chunk rank by rank. Raises
        LayoutError where the layers cannot be dealt so.
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
        given = {_VIRTUAL: self.chunks, _FIRST: self.first, _LAST: self.last}
        for flag, value in given.items():
            if value not in (None, 1):
                raise LayoutError(f"{flag} {value} needs a pipeline: give --pp above 1 with it")

    def _layers_each(self, layers: int) -> list[int]:
        """How many layers each rank has."""
        if self.size > layers:
            raise LayoutError(
                f"--pp {self.size} is more stages than the model has layers ({layers}); give at "
                f"most {layers}"
            )
        ends = [end for end in (self.first, self.last) if end is not None]
        left, ranks = layers - sum(ends), self.size - len(ends)
        fits = left % ranks == 0 and left >= ranks if ranks else left == 0
        if not fits and not ends:
            raise LayoutError(
                f"--pp {self.size} does not divide the model's {layers} layers; choose a divisor, "
                f"or say with {_FIRST} or {_LAST} how many the ends have"
            )
        if not fits:
            raise LayoutError(
                f"{_FIRST} {self.first} and {_LAST} {self.last} leave {left} of {layers} layers to "
                f"{ranks} other stages of --pp {self.size}, which does not divide them; choose "
                "others"
            )
        share = left // ranks if ranks else 0
        first = share if self.first is None else self.first
        last = share if self.last is None else self.last
        return [first, *[share] * (self.size - 2), last]

    def _share(self, count: int) -> int:
        """Layers of each chunk of a rank that has ``count``."""
        if count % self.chunks:
            raise LayoutError(
                f"{_VIRTUAL} {self.chunks} does not divide the {count} layers of a pipeline rank; "
                "choose a divisor of every rank's layers"
            )
        return count // self.chunks


_VIRTUAL = "--num-virtual-stages-per-pipeline-rank"
_FIRST = "--num-layers-in-first-pipeline-stage"
_LAST = "--num-layers-in-last-pipeline-stage"
