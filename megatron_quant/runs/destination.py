"""Where an export goes, checked alike for every verb that writes one, before and after."""

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
    beside,
    check_apart,
    check_target,
    export,
)
from megatron_quant.dist import Groups, gather, together
from megatron_quant.errors import ExportError
from megatron_quant.mcore.checkpoint import Saved
from megatron_quant.runs.job import Job
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.settings import Write


def existing_of(write: Write) -> Existing:
    """Translate ``--overwrite`` and ``--resume`` into the treatment of files that exist."""
    if write.resume:
        return Existing.RESUME
    return Existing.REPLACE if write.overwrite else Existing.REFUSE


def check_place(directory: Path, *sources: Path, flag: str = "--export-dir") -> None:
    """Raise ExportError where ``directory`` would lie in, or around, what it is made of.

    Nor may it be the directory in which the run stands. flag: that names it.
    """
    if directory.resolve() == Path.cwd():
        raise ExportError(
            f"{flag} {directory} is the directory that the command runs in; give one of its own"
        )
    for source in sources:
        check_apart(directory, source, flag)


def check_places(options: QuantizeOptions) -> None:
    """Raise ExportError unless all that is written has places apart from one another and the rest.

    ``options.hf_model_id`` is a directory, or none.
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
            f"--megatron-save-path {saved} is --export-dir {out}, or one lies in the other; give "
            "each a directory of its own"
        )


def origin_of(job: Job, saved: Saved | None = None) -> Origin:
    """Digest the inputs of an export, alike through a model and without one.

    saved: the Megatron checkpoint that the model comes from. Raises CheckpointError where the
    source cannot be read.
    """
    source = source_digest(job.source) if saved is None else saved.source
    return Origin(recipe_digest(job.recipe), source)


def statistics_digest(job: Job, options: QuantizeOptions, *found: object) -> str:
    """Digest of the scales that were found, and of the flags that say how they become an export's.

    An unfinished export is not continued with others.
    """
    return digest_of([job.expert_scales, options.keep_scales, *found])


def checked_companions(
    job: Job, export_dir: Path, existing: Existing, origin: Origin
) -> Companions:
    """Return the files beside the weights, once it is sure that ``export_dir`` may have them.

    Raises ExportError where they may not.
    """
    assert job.dialect is not None
    check_place(export_dir, job.source)
    files = with_beside(
        companions(job.hf_config, job.quant, job.dialect, job.dtype, origin=origin),
        job.source,
        job.checkpoint,
    )
    check_target(export_dir, files, existing, job.exported)
    return files


def with_beside(files: Companions, source: Path, checkpoint: Weights | None) -> Companions:
    """Add to ``files`` those that lie beside the weights in ``source``.

    checkpoint: the weights; None where they come from elsewhere.
    """
    found = beside(source)
    unread = [
        f"{name}: weights that nothing names" for name in (checkpoint.unread if checkpoint else ())
    ]
    return files.beside(source, found.carried, [*unread, *found.left_out])


def write_shown(
    plan: ExportPlan, groups: Groups, produce: Produce, to: Destination, phases: Phases
) -> None:
    """Write the files, with a phase that shows this rank's bytes. Collective; raises as export."""
    own = sum(part.nbytes for part in plan.parts_of(groups.rank))
    with phases.transfer("export", own) as progress:
        export(plan, groups, produce, to, progress)


def verify_together(
    directory: Path, against: Path | None, groups: Groups, named: Path | None = None
) -> Report:
    """Verify a checkpoint, of whose tensors each rank looks at a share. Collective.

    named: how problems call it, where that is not ``directory``, which may differ between ranks.
    Returns the same report on every rank. Raises what one rank cannot read, on all.
    """

    def look() -> Share:
        found = verify_share(directory, against, groups.rank, groups.size)
        return found.called(named or directory)

    return joined(gather(together(groups, look), groups))


class Verification:
    """Verifies an export before its files have their own names; called on every rank.

    report: what was found, the same on every rank; None where nothing was verified yet.
    """

    def __init__(
        self, export_dir: Path, source: Path | None, groups: Groups, phases: Phases
    ) -> None:
        """``source``: what tensors are compared with; None where that is not at hand."""
        self._phases = phases
        self.report: Report | None = None
        self._named, self._source, self._groups = export_dir, source, groups

    def __call__(self, directory: Path) -> None:
        """Collective. Raises VerifyError, on every rank, for the first problem."""
        with self._phases.time("verify"):
            found = verify_together(directory, self._source, self._groups, self._named)
            together(self._groups, found.raise_for_problems)
        self.report = found


def verification(
    write: Write, export_dir: Path, source: Path | None, groups: Groups, phases: Phases
) -> Verification | None:
    """Return the verification of the export; None with ``--no-verify``."""
    return Verification(export_dir, source, groups, phases) if write.verify else None
