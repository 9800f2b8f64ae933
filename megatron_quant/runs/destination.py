"""Where an export goes: every verb that writes one checks it here, before and after."""

import os
from pathlib import Path

from megatron_quant.ckpt.plan import (
    Companions,
    ExportPlan,
    Origin,
    companions,
    digest_of,
    recipe_digest,
    source_digest,
)
from megatron_quant.ckpt.read import Weights
from megatron_quant.ckpt.storage import overlap
from megatron_quant.ckpt.verify import Report, Share, joined, verify_share
from megatron_quant.ckpt.write import (
    Destination,
    Existing,
    Produce,
    WriteOptions,
    beside,
    check_apart,
    check_target,
    export,
)
from megatron_quant.dist import Groups, gather, together
from megatron_quant.errors import ExportError
from megatron_quant.folding import DOCUMENT
from megatron_quant.mcore.checkpoint import PlainWeights, Saved
from megatron_quant.runs.job import Job
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.settings import Write


def existing_of(write: Write) -> Existing:
    """Translate ``--overwrite`` and ``--resume`` into what happens to files that exist."""
    if write.resume:
        return Existing.RESUME
    return Existing.REPLACE if write.overwrite else Existing.REFUSE


def check_place(directory: Path, *sources: Path, flag: str = "--export-dir") -> None:
    """Raise ExportError if ``directory`` is in or around one of ``sources``.

    It may not be the working directory either. flag: the one that names ``directory``.
    """
    if directory.resolve() == Path.cwd():
        raise ExportError(
            f"{flag} {directory} is the directory that the command runs in; give another directory"
        )
    for source in sources:
        check_apart(directory, source, flag)


def check_places(options: QuantizeOptions) -> None:
    """Raise ExportError if an output lies in another output or in an input.

    ``options.hf_model_id`` must be a directory or None.
    """
    out, saved = options.export_dir, options.megatron_save_path
    named = (options.hf_model_id, options.megatron_load_path)
    sources = [Path(source) for source in named if source is not None]
    if out is not None:
        check_place(out, *sources)
    if saved is not None:
        check_place(saved, *sources, flag="--megatron-save-path")
    if out is not None and saved is not None and overlap(out, saved):
        raise ExportError(
            f"--megatron-save-path {saved} and --export-dir {out} are the same, or one lies in the "
            "other; give each a directory of its own"
        )
    check_calibration_file(options)


def check_calibration_file(options: QuantizeOptions) -> None:
    """Raise ExportError where ``--save-calibration`` could not be written after the work."""
    path = options.calibration.save
    if path is None:
        return
    made = [p for p in (options.export_dir, options.megatron_save_path) if p is not None]
    source = [Path(options.hf_model_id)] if options.hf_model_id else []
    if any(overlap(path, folder) for folder in (*made, *source)):
        raise ExportError(
            f"--save-calibration {path} is, or lies in, --export-dir, --megatron-save-path or the "
            "source checkpoint; choose another place"
        )
    folder = path.resolve().parent
    if any(folder in out.resolve().parents for out in made):  # it is made with the export
        folder = next(at for at in (folder, *folder.parents) if at.exists())
    reason = ""
    if path.is_dir():
        reason = "is a directory"
    elif not folder.is_dir():
        reason = f"is in {folder}, which is no directory"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        reason = "may not be written"
    if reason:
        raise ExportError(f"--save-calibration {path} {reason}; choose another place")


def origin_of(job: Job, saved: Saved | None = None) -> Origin:
    """Digest the inputs of an export; the digests are equal with a model and without one.

    saved: the Megatron checkpoint that the model comes from. Raises CheckpointError if the source
    cannot be read.
    """
    if saved is not None:
        source = saved.source
    elif isinstance(job.checkpoint, PlainWeights):
        source = job.checkpoint.digest
    else:
        source = source_digest(job.source)
    return Origin(recipe_digest(job.recipe), source)


def statistics_digest(job: Job, options: QuantizeOptions, *found: object) -> str:
    """Digest the scales that were found, and the flags that shape them for the export.

    An unfinished export is continued only with the same ones.
    """
    return digest_of([job.expert_scales, options.keep_scales, *found])


def checked_companions(
    job: Job, export_dir: Path, existing: Existing, origin: Origin
) -> Companions:
    """Return the files beside the weights, after checking that they may go to ``export_dir``.

    Raises ExportError if they may not.
    """
    assert job.dialect is not None
    check_place(export_dir, job.source)
    files = with_beside(
        companions(job.hf_config, job.quant, job.dialect, job.dtype, origin=origin),
        job.source,
        job.checkpoint,
    )
    if job.places.folded:  # its content is found by the calibration
        files = files.with_document(DOCUMENT, {})
    check_target(export_dir, files, existing, job.exported)
    return files


def with_beside(files: Companions, source: Path, checkpoint: Weights | None) -> Companions:
    """Add to ``files`` those that lie beside the weights in ``source``.

    checkpoint: the weights; None if they come from elsewhere.
    """
    found = beside(source)
    unread = [
        f"{name}: weights that nothing names" for name in (checkpoint.unread if checkpoint else ())
    ]
    return files.beside(source, found.carried, [*unread, *found.left_out])


def write_shown(
    plan: ExportPlan, groups: Groups, produce: Produce, to: Destination, phases: Phases
) -> None:
    """Write the files in a phase that shows this rank's bytes. Collective; raises as ``export``."""
    own = sum(part.nbytes for part in plan.parts_of(groups.rank))
    with phases.transfer("export", own) as progress:
        export(plan, groups, produce, to, progress)


def verify_together(
    directory: Path, against: Path | Weights | None, groups: Groups, named: Path | None = None
) -> Report:
    """Verify a checkpoint; each rank looks at a share of its tensors. Collective.

    named: the path that messages show, if not ``directory``, which may differ between ranks.
    Returns the same report on every rank. An error of one rank is raised on all.
    """

    def look() -> Share:
        found = verify_share(directory.absolute(), against, groups.rank, groups.size)
        return found.called(named or directory)

    return joined(gather(together(groups, look), groups))


class Verification:
    """Verifies an export before its files get their names. Every rank calls it.

    report: the findings, the same on every rank; None until the first call.
    """

    def __init__(
        self, export_dir: Path, source: Path | Weights | None, groups: Groups, phases: Phases
    ) -> None:
        """Set up; ``source`` is the checkpoint to compare with, None if there is none."""
        self._phases = phases
        self.report: Report | None = None
        self._named, self._source, self._groups = export_dir, source, groups

    def __call__(self, directory: Path) -> None:
        """Verify. Collective. Raises VerifyError, on every rank, for the first problem."""
        with self._phases.time("verify"):
            found = verify_together(directory, self._source, self._groups, self._named)
            together(self._groups, found.raise_for_problems)
        self.report = found


def verification(
    write: Write, export_dir: Path, source: Path | Weights | None, groups: Groups, phases: Phases
) -> Verification | None:
    """Return the verification of the export; None with ``--no-verify``."""
    return Verification(export_dir, source, groups, phases) if write.verify else None


def destination(
    write: Write, directory: Path, files: Companions, check: Verification | None
) -> Destination:
    """Return where and how ``write`` puts an export, whose ``files`` lie beside the weights."""
    return Destination(
        directory=directory,
        companions=files,
        existing=existing_of(write),
        options=WriteOptions(write.io_threads, write.fsync),
        check=check,
    )
