"""Keep what calibration measured in a file, by the names of logical tensors.

It is a safetensors file. For each Hugging Face module whose inputs were measured, it has:

- ``MODULE.input_amax``, fp32 []: their largest magnitude, which a percentile may have clipped.
- ``MODULE.input_tokens``, int64 []: tokens that were seen; 0 for an expert that saw none.
- ``MODULE.input_squares``, fp32 [K]: sums of squares.
- ``MODULE.input_peaks``, fp32 [K]: largest magnitudes; 0 for an expert that saw no token.
- ``MODULE.input_moment``, fp32 [K, K]: sums of x x^T. Fused modules read the same inputs, so it is
  kept once, under the first of them.
- ``MODULE.input_lost_FORMAT``, fp32 [K, K], likewise: sums of (x - y) y^T, y the values of the
  inputs' codes in a format such as nvfp4, by the scale of these inputs' amax.

For each attention with a calibrated KV cache, it has ``ATTENTION.k_cache_amax`` and
``ATTENTION.v_cache_amax``, fp32 []. An expert that saw no token has the squares and products of its
whole layer.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path

import torch

from megatron_quant.ckpt.storage import (
    Draft,
    MappedFiles,
    TensorEntry,
    allocate,
    entries_of,
    explained,
    lay_out,
    read_header,
    write_at,
)
from megatron_quant.errors import CalibrationError, CheckpointError, ExportError
from megatron_quant.recipes import Decision

AMAX, TOKENS, SQUARES, MOMENT = "input_amax", "input_tokens", "input_squares", "input_moment"
PEAKS = "input_peaks"
_LOST = "input_lost_"
_FLAG = "--save-calibration"


def statistic_key(module: str, statistic: str) -> str:
    """Return the name of a module's statistic in the file."""
    return f"{module}.{statistic}"


def lost_statistic(decision: Decision) -> str:
    """Return the name of the statistic of what the codes of a slot's inputs lose."""
    assert decision.inputs is not None, decision.slot.name
    return f"{_LOST}{decision.inputs.name}"


def cache_key(cache_slot: str) -> str:
    """Return the name of the amax of a cache slot, such as ``model.layers.0.self_attn.k``."""
    return f"{cache_slot}_cache_amax"


class CalibrationWriter:
    """Writes a calibration file whose tensors come in any order, also from several processes.

    One process calls :meth:`create`, then any process :meth:`put` and :meth:`close`, then the first
    :meth:`finish`. Until then an older file of that name stays.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        """Plan the file.

        Args:
            path: Its name.
            tensors: dtype and shape of each tensor by its name; alike in all processes.
        """
        drafts = [
            Draft(name, dtype, shape, prod(shape) * dtype.itemsize)
            for name, (dtype, shape) in sorted(tensors.items())
        ]
        (self._file,) = lay_out([drafts], max_shard_bytes=1 << 62)
        self._entries = {entry.name: entry for entry in self._file.entries}
        self._path, self._whole = path, path.with_name(f"{path.name}.incomplete")
        self._fd: int | None = None

    @property
    def nbytes(self) -> int:
        """Return the size of the file."""
        return self._file.size

    def create(self) -> None:
        """Claim the space of the file under a temporary name.

        Raises:
            ExportError: For what the disk refuses.
        """
        with explained(self._whole, "cannot be written", _FLAG):
            self._fd = os.open(self._whole, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            allocate(self._fd, self._file.size)
            write_at(self._fd, memoryview(self._file.header), 0)

    def put(self, name: str, value: torch.Tensor) -> None:
        """Write one tensor into its place.

        Raises:
            ExportError: For what the disk refuses.
        """
        entry = self._entries[name]
        assert (value.dtype, tuple(value.shape)) == (entry.dtype, entry.shape), (name, value.shape)
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        with explained(self._whole, "cannot be written", _FLAG):
            if self._fd is None:
                self._fd = os.open(self._whole, os.O_WRONLY)
            write_at(self._fd, memoryview(data.data), entry.offset)

    def close(self) -> None:
        """End the writing of this process.

        Raises:
            ExportError: For what the disk refuses.
        """
        fd, self._fd = self._fd, None
        if fd is not None:
            with explained(self._whole, "cannot be written", _FLAG):
                os.close(fd)

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            ExportError: For what the disk refuses.
        """
        self.close()
        with explained(self._path, "cannot be written", _FLAG):
            os.replace(self._whole, self._path)

    def abandon(self) -> None:
        """Remove the unfinished file."""
        with suppress(ExportError):
            self.close()
        with suppress(OSError):
            self._whole.unlink(missing_ok=True)


@dataclass(frozen=True)
class Late:
    """An fp32 tensor that is made when it is written: few fit into memory at a time."""

    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


def write_calibration(path: Path, tensors: Mapping[str, torch.Tensor | Late]) -> None:
    """Write a calibration file at once.

    Raises:
        ExportError: If the disk refuses; an older file then stays as it is.
    """
    shapes = {
        name: (torch.float32 if isinstance(t, Late) else t.dtype, tuple(t.shape))
        for name, t in tensors.items()
    }
    writer = CalibrationWriter(path, shapes)
    try:
        writer.create()
        for name, tensor in tensors.items():
            writer.put(name, tensor.make() if isinstance(tensor, Late) else tensor)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


@dataclass(frozen=True)
class CalibrationFile:
    """An open calibration file; tensors are read on demand."""

    path: Path
    entries: Mapping[str, TensorEntry]
    files: MappedFiles

    def find(
        self, modules: Sequence[str], statistic: str, shape: tuple[int, ...]
    ) -> torch.Tensor | None:
        """Return a statistic of the inputs that fused modules share; None where it has none.

        Args:
            modules: Hugging Face modules.
            statistic: :data:`AMAX`, :data:`TOKENS`, :data:`SQUARES`, :data:`PEAKS`,
                :data:`MOMENT` or that of :func:`lost_statistic`.
            shape: Shape that it has to have.

        Raises:
            CalibrationError: For another shape or dtype, and for bytes that are not there.
        """
        keys = (statistic_key(module, statistic) for module in modules)
        return self._read(next((k for k in keys if k in self.entries), ""), shape)

    def amax(self, modules: Sequence[str]) -> float | None:
        """Return the largest magnitude of the inputs of fused modules; None where it has none.

        Raises:
            CalibrationError: As :meth:`find`, and for a value that is no magnitude.
        """
        return self._magnitude(self.find(modules, AMAX, ()), f"{modules[0]}.{AMAX}")

    def tokens(self, modules: Sequence[str]) -> int | None:
        """Return the number of tokens that an expert saw; None where it is not known.

        Raises:
            CalibrationError: As :meth:`find`.
        """
        found = self.find(modules, TOKENS, ())
        return None if found is None else int(found)

    def cache_amax(self, cache_slot: str) -> float | None:
        """Return the largest key or value of a cache slot; None where it has none.

        Raises:
            CalibrationError: As :meth:`amax`.
        """
        key = cache_key(cache_slot)
        return self._magnitude(self._read(key, ()), key)

    def needed(
        self, modules: Sequence[str], statistic: str, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Return what :meth:`find` does.

        Raises:
            CalibrationError: As :meth:`find`, and where the file has no such statistic.
        """
        found = self.find(modules, statistic, shape)
        if found is None:
            products = statistic == MOMENT or statistic.startswith(_LOST)
            how = " with --keep-hessians" if products else ""
            raise CalibrationError(
                f"--load-calibration {self.path} has no {statistic_key(modules[0], statistic)}: "
                f"save one{how} of this model and recipe with {_FLAG}"
            )
        return found

    def _magnitude(self, found: torch.Tensor | None, key: str) -> float | None:
        if found is None:
            return None
        value = found.item()
        if not (isfinite(value) and value >= 0):
            raise CalibrationError(
                f"--load-calibration {self.path}: {key} is {value}; calibrate again"
            )
        return value

    def _read(self, key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        entry = self.entries.get(key)
        if entry is None:
            return None
        dtype = torch.int64 if key.endswith(TOKENS) else torch.float32
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise CalibrationError(
                f"--load-calibration {self.path}: {key} is {entry.dtype} {list(entry.shape)}, but "
                f"{dtype} {list(shape)} is needed; it was saved for another model, calibrate again"
            )
        try:
            return self.files.tensor(entry)
        except OSError as e:
            raise CalibrationError(f"--load-calibration {self.path}: {key}: {e}") from e


def read_calibration(path: Path) -> CalibrationFile:
    """Open a calibration file.

    Raises:
        CalibrationError: Where there is none, or it is no safetensors file.
    """
    try:
        header = read_header(path)
        entries = {entry.name: entry for entry in entries_of(path.name, header)}
    except (CheckpointError, KeyError) as e:
        raise CalibrationError(f"--load-calibration: {e}") from e
    return CalibrationFile(path, entries, MappedFiles(path.parent))


def loaded_amaxes(file: CalibrationFile, decisions: Sequence[Decision]) -> dict[str, float]:
    """Return the amaxes of inputs by slot name; an expert that saw no token is missing.

    Args:
        file: The file.
        decisions: Decisions on slots whose inputs have a static scale.

    Raises:
        CalibrationError: Where the file has none for a slot, nor for one that shares its scale.
    """
    found: dict[str, float] = {}
    lacking: dict[str, Decision] = {}
    for decision in decisions:
        value = file.amax(decision.slot.sources)
        if value is None:
            lacking.setdefault(decision.slot.name, decision)
        elif file.tokens(decision.slot.sources) != 0:
            found[decision.slot.name] = value
    reached = {d.slot.sharing for d in decisions if d.slot.name in found}
    for decision in lacking.values():
        slot = decision.slot
        if slot.expert is None or slot.sharing not in reached:
            file.needed(slot.sources, AMAX, ())
    return found
