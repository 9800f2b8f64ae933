"""Write parts to files: the next one is encoded while the last ones are hashed and written.

The caller's thread encodes. A few threads hash and write. One more makes sure that bytes reach the
disk before the journal notes them. The amount that is encoded and not yet written is bounded.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import local

from megatron_quant.ckpt.storage import (
    OutputFile,
    StagingBuffer,
    TensorDigests,
    TensorEntry,
    Written,
    explained,
    give_back,
    hashed,
    leaves_of,
    placed,
)
from megatron_quant.ckpt.write.journal import Journal
from megatron_quant.errors import ExportError
from megatron_quant.models import Box

_SEAL_BYTES = 256 << 20  # bytes between two notes in the journal: what a kill may cost a rank
_BATCH_BYTES = 4 << 20  # bytes that a thread hashes and writes at a time: few enough for caches
_GIVE_BACK_BYTES = 64 << 20  # bytes freed before memory is given back to the system

Encoded = tuple[TensorEntry, Box, memoryview]
"""A file tensor, a box of it, and the box's bytes."""
Progress = Callable[[int], None]
"""Called on every rank with the number of bytes that it wrote since the last call."""


@dataclass(frozen=True)
class WriteOptions:
    """How files are written.

    io_threads: threads per rank that hash and write while it encodes.
    fsync: whether everything is on stable storage before the index appears, so that a power cut
        leaves a whole checkpoint or none. A killed process loses nothing either way.

    Raises ExportError for less than one thread.
    """

    io_threads: int = 2
    fsync: bool = True

    def __post_init__(self) -> None:
        if self.io_threads < 1:
            raise ExportError(f"--io-threads is {self.io_threads}: give at least 1")


class WritePipeline:
    """One rank's writes in progress; a context that ends when everything has reached the files.

    An error in a thread is raised by :meth:`reserve`, :meth:`write` or the end of the context.
    """

    def __init__(
        self, journal: Journal, options: WriteOptions, max_bytes: int, progress: Progress
    ) -> None:
        """Start the threads. ``max_bytes``: most bytes that are encoded and not yet written."""
        self.digests = TensorDigests()
        self._journal, self._options = journal, options
        self._max_bytes, self._progress = max_bytes, progress
        self._writers = ThreadPoolExecutor(options.io_threads, "write")
        self._sealer = ThreadPoolExecutor(1, "seal")
        self._own = local()
        self._writing: deque[tuple[Future[list[Written]], int]] = deque()
        self._sealing: deque[Future[list[Written]]] = deque()
        self._held = self._freed = 0
        self._file: _File | None = None

    def __enter__(self) -> "WritePipeline":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._seal()  # write and note what is encoded, whatever failed
            self._writers.shutdown()
            self._sealer.shutdown()
            self._journal.close()

    def reserve(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more may be encoded."""
        while self._held and self._held + nbytes > self._max_bytes:
            if not self._writing:
                self._submit()
            self._wait_for_write()
        while self._sealing and self._sealing[0].done():
            self._wait_for_seal()
        if self._freed >= min(_GIVE_BACK_BYTES, self._max_bytes // 2):
            self._freed = 0
            give_back()

    def write(self, path: Path, pieces: list[Encoded]) -> None:
        """Hash and write pieces of the file ``path`` later.

        Their bytes must not change until then. The list is emptied. Call :meth:`reserve` before
        making them.
        """
        if self._file is None or self._file.out.path != path:
            self._seal()
            with explained(path, "cannot be opened"):
                self._file = _File(out=OutputFile(path, direct=self._options.fsync))
        nbytes = sum(len(data) for _, _, data in pieces)
        self._file.batch += pieces
        self._file.batched += nbytes
        self._held += nbytes
        pieces.clear()
        if self._file.batched >= min(_BATCH_BYTES, self._max_bytes // 4):
            self._submit()
        if self._file.nbytes >= _SEAL_BYTES:
            self._seal()

    def _submit(self) -> None:
        """Give the batch to a thread; hashing pieces together is faster."""
        file = self._file
        if file is None or not file.batch:
            return
        future = self._writers.submit(self._write, file.out, file.batch)
        self._writing.append((future, file.batched))
        file.written.append(future)
        file.nbytes += file.batched
        file.batch, file.batched = [], 0

    def _write(self, out: OutputFile, pieces: list[Encoded]) -> list[Written]:
        """Hash and write the pieces; empty the list, because the pool keeps it for longer."""
        each = hashed([leaves_of(*piece) for piece in pieces])
        written = [(entry, box, it) for (entry, box, _), it in zip(pieces, each, strict=True)]
        pieces.sort(key=lambda piece: (piece[0].offset, piece[1].start))
        with explained(out.path, "cannot be written"):
            out.write((run for piece in pieces for run in placed(*piece)), self._stage())
        pieces.clear()
        return written

    def _stage(self) -> StagingBuffer:
        """Return the calling thread's buffer."""
        if not hasattr(self._own, "stage"):
            self._own.stage = StagingBuffer()
        stage: StagingBuffer = self._own.stage
        return stage

    def _finish(self) -> None:
        self._seal()
        while self._writing:
            self._wait_for_write()
        while self._sealing:
            self._wait_for_seal()

    def _wait_for_write(self) -> None:
        future, nbytes = self._writing.popleft()
        future.result()
        self._held -= nbytes
        self._freed += nbytes
        self._progress(nbytes)

    def _wait_for_seal(self) -> None:
        self.digests.add(self._sealing.popleft().result())

    def _seal(self) -> None:
        self._submit()
        if self._file is not None:
            self._sealing.append(self._sealer.submit(self._seal_now, self._file))
            self._file = None

    def _seal_now(self, file: "_File") -> list[Written]:
        """Sync what is written to the disk, and then note it in the journal."""
        written: list[Written] = []
        try:
            for future in file.written:
                written += future.result()
            if self._options.fsync:
                with explained(file.out.path, "cannot be written"):
                    file.out.sync()
        finally:
            file.out.close()
        self._journal.add(written, self._options.fsync)
        return written


@dataclass(eq=False, kw_only=True)
class _File:
    """A file that is being written, until it is sealed; ``batch`` waits for a thread."""

    out: OutputFile
    written: list[Future[list[Written]]] = field(default_factory=list)
    nbytes: int = 0
    batch: list[Encoded] = field(default_factory=list)
    batched: int = 0
