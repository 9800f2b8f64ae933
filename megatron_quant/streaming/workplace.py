"""The folder in which a calibration keeps how far it has come, so that a killed run can go on.

It is removed when the export is there. Nothing in it is removed that this library has not written.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

from megatron_quant import documents
from megatron_quant.ckpt.storage import explained, read_object, write_file
from megatron_quant.ckpt.write import LOCK, Existing, Lock
from megatron_quant.dist import Groups, together
from megatron_quant.errors import CheckpointError, ExportError

DOCUMENT = "megatron_quant_calibration.json"
_OWN = re.compile(
    rf"{re.escape(DOCUMENT)}(\.new)?|(scales-)?rank-\d+\.(json(\.new)?|scores\.safetensors(\.new)?|"
    r"(layer-\d+|gradients-\d+|change-\d+\.layer-\d+|sums|rounded)\.safetensors)"
)


@dataclass(frozen=True, kw_only=True)
class Come:
    """How far a rank has come.

    Attributes:
        layer: Layer that comes next.
        digest: Digest of the hidden states that enter it; empty where no layer needs them.
        seen: Largest inputs in the layers before it, by key.
        tokens: Tokens of experts in these layers, by key.
        sums: Digest of the sums of each of these layers.
        kept: Digest of the hidden states at each border up to here, where they are kept.
    """

    layer: int
    digest: str
    seen: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    sums: Sequence[str] = ()
    kept: Sequence[str] = ()


class Workplace:
    """The folder, for one rank. Make it on all ranks at once.

    Args:
        folder: Where it is.
        made_of: Digest of all that the result depends on; kept as an attribute.
        existing: What to do with a calibration that is there.
        groups: This rank's groups.
        anew: Begin anew, rather than refuse, where another one is to be resumed.

    Raises:
        ExportError: On every rank, where :func:`check_workplace` does, for a calibration of
            something else, and where another run is at it.
    """

    def __init__(
        self,
        folder: Path,
        made_of: str,
        existing: Existing,
        groups: Groups,
        anew: bool = False,
    ) -> None:
        self._folder, self.made_of, self._groups, self._anew = folder, made_of, groups, anew
        self._lock: Lock | None = None
        self._walk = ""
        together(groups, lambda: self._claim(existing) if groups.rank == 0 else None)

    def _claim(self, existing: Existing) -> None:
        check_workplace(self._folder, existing)
        with explained(self._folder, "cannot be used"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self._folder)
            begun = _begun(self._folder)
            other = begun is not None and begun != self.made_of
            if other and existing is Existing.RESUME and not self._anew:
                self._lock.release()
                raise ExportError(
                    f"{self._folder} holds the calibration of another run (other ranks, --dtype, "
                    "source, recipe or calibration text); --resume with what it was started with, "
                    "start anew with --overwrite, or choose another --export-dir"
                )
            if other or existing is not Existing.RESUME:
                _clear(self._folder)
            content = json.dumps({"made_of": self.made_of}).encode()
            _replace(self._folder / DOCUMENT, content)

    def for_scales(self) -> "Workplace":
        """Return the same folder for a walk before, which finds scales of inputs alone."""
        found = copy(self)
        found._walk = "scales-"
        return found

    def states(self, layer: int) -> Path:
        """Return this rank's file for the hidden states that enter ``layer``."""
        return self._own(f"layer-{layer}.safetensors")

    def gradients(self, layer: int) -> Path:
        """Return this rank's file for the gradients of what enters ``layer``."""
        return self._own(f"gradients-{layer}.safetensors")

    def changed(self, change: int, layer: int) -> Path:
        """Return this rank's file for what enters ``layer`` under a change of the model."""
        return self._own(f"change-{change}.layer-{layer}.safetensors")

    @property
    def scores(self) -> Path:
        """Return this rank's file for the scores that are there so far."""
        return self._own("scores.safetensors")

    def sums(self, rank: int) -> Path:
        """Return a rank's file for the sums of squares and products of inputs."""
        return self._folder / f"rank-{rank}.sums.safetensors"

    def rounded(self, rank: int) -> Path:
        """Return a rank's file for the weights of a layer that it has rounded."""
        return self._folder / f"rank-{rank}.rounded.safetensors"

    def come(self) -> Come | None:
        """Return how far this rank had come; None where it begins, or cannot read what is there."""
        with suppress(CheckpointError, KeyError, TypeError, ValueError, AttributeError):
            found = read_object(self._file, documents.INDEX)
            if found["made_of"] == self.made_of:
                seen = {str(key): float(value) for key, value in found["seen"].items()}
                tokens = {str(key): int(value) for key, value in found["tokens"].items()}
                sums = [str(digest) for digest in found["sums"]]
                kept = [str(digest) for digest in found["kept"]]
                return Come(
                    layer=int(found["layer"]),
                    digest=str(found["digest"]),
                    seen=seen,
                    tokens=tokens,
                    sums=sums,
                    kept=kept,
                )
        return None

    def save(self, come: Come) -> None:
        """Say how far this rank has come: all of it or nothing, as a kill may come."""
        said = {"made_of": self.made_of, **vars(come)}
        with explained(self._file, "cannot be written"):
            _replace(self._file, json.dumps(said).encode())

    @property
    def _file(self) -> Path:
        return self._own("json")

    def _own(self, ending: str) -> Path:
        return self._folder / f"{self._walk}rank-{self._groups.rank}.{ending}"

    def leave(self) -> None:
        """Let other runs in; what was written stays."""
        if self._lock is not None:
            self._lock.release()

    def remove(self) -> None:
        """Remove what was written, on rank 0, and the folder where nothing else is in it."""
        if self._groups.rank == 0:
            with suppress(OSError):
                _clear(self._folder)
            self.leave()
            with suppress(OSError):
                self._folder.rmdir()


def check_workplace(folder: Path, existing: Existing) -> None:
    """Raise ExportError where ``folder`` is not free for a calibration. Changes nothing."""
    if not os.path.lexists(folder):
        return
    with explained(folder, "cannot be used"):
        names = {path.name for path in folder.iterdir()} - {LOCK}
    strange = sorted(name for name in names if not _OWN.fullmatch(name))
    if strange or (names and not (folder / DOCUMENT).is_file()):
        one = (strange or sorted(names))[0]
        raise ExportError(
            f"{folder}, where the calibration would be kept, holds {one}, "
            "which no calibration has written; move it away or choose another --export-dir"
        )
    if names and existing is Existing.REFUSE:
        raise ExportError(
            f"{folder} holds an unfinished calibration; continue it with --resume, start anew with "
            "--overwrite, or choose another --export-dir"
        )


def _begun(folder: Path) -> str | None:
    """Return what the calibration in ``folder`` says that it is made of; empty if unreadable."""
    if not (folder / DOCUMENT).exists():
        return None
    with suppress(CheckpointError):
        return str(read_object(folder / DOCUMENT).get("made_of"))
    return ""


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    write_file(new, content, fsync=False)
    os.replace(new, path)


def _clear(folder: Path) -> None:
    """Remove what calibrations write; the document last, which says whose the folder is."""
    names = [path.name for path in folder.iterdir() if _OWN.fullmatch(path.name)]
    for name in sorted(names, key=lambda name: name.startswith(DOCUMENT)):
        (folder / name).unlink(missing_ok=True)
