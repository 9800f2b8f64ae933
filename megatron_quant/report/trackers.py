"""``--log-to``: the facts of a run in a tracker of experiments."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_quant.documents import check_output_file
from megatron_quant.errors import QuantError
from megatron_quant.report.events import write_events
from megatron_quant.report.facts import Facts

FLAG = "--log-to"
TRACKERS = ("mlflow", "tensorboard")
_FOLDER, _ANY = "runs", "events"


@dataclass(frozen=True)
class Tracker:
    """A tracker: its name, and its URI or folder; empty for its default."""

    name: str
    place: str

    @property
    def folder(self) -> Path:
        """Return where event files go."""
        return Path(self.place or _FOLDER)


def tracker_of(text: str) -> Tracker:
    """Parse ``mlflow``, ``mlflow:URI``, ``tensorboard`` or ``tensorboard:DIR``.

    Raises:
        QuantError: For another tracker, or one that is not installed.
    """
    name, _, place = text.partition(":")
    if name not in TRACKERS:
        known = "mlflow[:URI] or tensorboard[:DIR]"
        raise QuantError(f"{FLAG} {text!r} names no tracker: give {known}")
    if name == "mlflow" and importlib.util.find_spec("mlflow") is None:
        raise QuantError(f"{FLAG} {text} needs MLflow: pip install mlflow-skinny, or leave it out")
    return Tracker(name, place)


def check_tracker(tracker: Tracker) -> None:
    """Raise QuantError, before the work, for a place that could not be logged to after it."""
    if tracker.name == "mlflow":
        from megatron_quant.report.mlflow_run import check_uri

        with _explained(tracker, "give another URI"):
            check_uri(tracker.place)
        return
    folder = tracker.folder
    if folder.exists() and not folder.is_dir():
        raise QuantError(f"{FLAG} tensorboard:{folder} is no directory; choose another")
    there = next(at for at in (folder, *folder.absolute().parents) if at.is_dir())
    check_output_file(FLAG, there / _ANY)


def log_facts(tracker: Tracker, facts: Facts) -> None:
    """Log the facts of a run that is done.

    Raises:
        QuantError: For what the tracker or the disk refuses.
    """
    with _explained(tracker, "the run itself is done, and so is its report"):
        if tracker.name == "mlflow":
            from megatron_quant.report.mlflow_run import log_run

            log_run(tracker.place, facts)
        else:
            tracker.folder.mkdir(parents=True, exist_ok=True)
            write_events(tracker.folder, facts)


@contextmanager
def _explained(tracker: Tracker, more: str) -> Iterator[None]:
    """Turn any error of a tracker into one line: a client of a server may raise anything."""
    try:
        yield
    except Exception as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise QuantError(f"{FLAG} {tracker.name}: {reason}; {more}") from e
