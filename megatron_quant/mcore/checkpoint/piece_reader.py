"""Read rectangles of a distributed checkpoint's tensors: the pieces they touch, and no more.

No process group and no Megatron is needed, whoever saved the pieces and at whatever layout.
"""

from collections.abc import Mapping
from itertools import product
from math import prod
from pathlib import Path

import torch

from megatron_quant.ckpt.storage import MappedFiles, TensorEntry
from megatron_quant.errors import CheckpointError
from megatron_quant.mcore.checkpoint.pieces import FilePiece, PiecedTensor
from megatron_quant.mcore.checkpoint.saved_tensor import SavedTensor, find_saved

_MATRIX = 2
"""Last dims of a tensor that ranks cut; those before them count layers and experts."""


class PieceReader:
    """The tensors of one checkpoint's directory."""

    def __init__(self, directory: Path, tensors: Mapping[str, PiecedTensor]) -> None:
        self._directory, self._tensors = directory, tensors
        self._files = MappedFiles(directory)
        self._found: dict[tuple[str, int], SavedTensor] = {}
        self._by_lead: dict[str, dict[tuple[int, ...], list[FilePiece]]] = {}

    def read(self, key: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """Read the rectangle ``size`` at ``start`` of tensor ``key``, in its stored dtype.

        What lies in one piece is a view of the file, not to be written. Raises CheckpointError
        where a file cannot be read, or is not as ``.metadata`` says.
        """
        tensor = self._tensors[key]
        found, whole = 0, torch.empty(0)
        one = all(n == 1 for n in size[:-_MATRIX])  # and not rows of a convolution
        for piece in self._leads(key).get(start[:-_MATRIX], ()) if one else tensor.pieces:
            low = tuple(map(max, piece.start, start))
            high = tuple(
                min(p + n, s + m)
                for p, n, s, m in zip(piece.start, piece.size, start, size, strict=True)
            )
            shared = tuple(h - lo for h, lo in zip(high, low, strict=True))
            if min(shared, default=1) <= 0:
                continue
            part = self._piece(key, tensor.dtype, piece)[_box(low, piece.start, shared)]
            if shared == size:
                return part
            if not found:
                whole = torch.full(size, float("nan"), dtype=tensor.dtype)
            whole[_box(low, start, shared)] = part
            found += prod(shared)
        if found != prod(size):
            raise CheckpointError(
                f"{self._directory}: the pieces of {key} are not all of it; fetch or save it again"
            )
        return whole

    def _leads(self, key: str) -> Mapping[tuple[int, ...], list[FilePiece]]:
        """Pieces by the layer and the expert that they touch."""
        if key not in self._by_lead:
            leads: dict[tuple[int, ...], list[FilePiece]] = {}
            for piece in self._tensors[key].pieces:
                spans = zip(piece.start[:-_MATRIX], piece.size[:-_MATRIX], strict=True)
                for lead in product(*(range(at, at + n) for at, n in spans)):
                    leads.setdefault(lead, []).append(piece)
            self._by_lead[key] = leads
        return self._by_lead[key]

    def _piece(self, key: str, dtype: torch.dtype, piece: FilePiece) -> torch.Tensor:
        file = self._directory / piece.file
        saved = self._found.get((piece.file, piece.offset))
        if saved is None:
            saved = find_saved(file, piece.offset, piece.nbytes)
            if saved.dtype != dtype or saved.shape != piece.size:
                raise CheckpointError(
                    f"{file}: {key} is {saved.dtype} {list(saved.shape)} where .metadata says "
                    f"{dtype} {list(piece.size)}; fetch or save it again"
                )
            self._found[piece.file, piece.offset] = saved
        entry = TensorEntry(
            name=key,
            dtype=dtype,
            shape=(saved.count,),
            file=piece.file,
            offset=saved.offset,
            nbytes=saved.count * dtype.itemsize,
        )
        try:
            numbers = self._files.tensor(entry)
        except OSError as e:
            raise CheckpointError(f"{file}: {key} cannot be read: {e}") from e
        return numbers.as_strided(saved.shape, saved.strides, saved.first)


def _box(at: tuple[int, ...], of: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    """Index ``size`` at ``at``, both of a whole, in what begins at ``of``."""
    return tuple(slice(a - o, a - o + n) for a, o, n in zip(at, of, size, strict=True))
