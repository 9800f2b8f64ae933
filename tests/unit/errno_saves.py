"""Saves to ``--megatron-save-path`` of which each call fails; Megatron's own writer is left out.

What that writes are files of Python's here: it writes from processes of its own.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_quant.ckpt.write import Existing
from megatron_quant.dist import Groups
from megatron_quant.errors import ExportError, QuantError
from tests.dist.command import tree
from tests.host import ready
from tests.unit.errno_calls import CALLS, arm, disarm, seen

NAME = "saved"
MEGATRONS = ("__0_0.distcp", "__0_1.distcp", ".metadata", "common.pt", "metadata.json")


@dataclass(frozen=True)
class FailedSave:
    """One save, and the one after it.

    older: whether another checkpoint was there. told: the error, or empty. looks: "new" or "old" if
    that is what lies at its place, whole; empty if nothing does. left: other names beside it.
    again, left_again: the same of the next save.
    """

    older: bool
    call: str
    number: int
    told: str
    looks: str
    left: list[str]
    again: str
    left_again: list[str]


def save(folder: Path, source: Path, existing: Existing, text: str) -> None:
    """What a run does for a model whose tensors are ``text``."""
    from megatron_quant.runs import saving

    def files(chunks: object, place: Path, groups: Groups) -> None:
        try:
            for name in MEGATRONS:
                (place / name).write_text(text)
        except OSError as error:  # as the real one turns it
            raise ExportError(f"{place} cannot be written: {error.strerror}") from error

    saving.store = SimpleNamespace(save=files)  # type: ignore[assignment]
    place = saving.SavePlace(folder / NAME, existing, {"recipe": text})
    model: Any = SimpleNamespace(chunks=())
    saving.check_save_path(place)
    saving.save_model(model, place, source, {"of": text}, Groups())


def looks_like(folder: Path, whole: dict[str, dict[str, bytes]]) -> str:
    found = tree(folder / NAME)
    return next(
        (name for name, files in whole.items() if files == found), "neither" if found else ""
    )


def beside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*") if p.name != NAME)


def fail_saves(folder: Path, source: Path) -> list[FailedSave]:
    """Each call of a save, and of one that replaces another, fails once."""
    ready()
    whole: dict[str, dict[str, bytes]] = {}
    for text in ("old", "new"):
        save(folder / text, source, Existing.REFUSE, text)
        whole[text] = tree(folder / text / NAME)
    found: list[FailedSave] = []
    for older in (False, True):
        for call in CALLS:
            number = count = 1
            while number <= count:
                at = folder / f"save-{older}-{call}-{number}"
                if older:
                    save(at, source, Existing.REFUSE, "old")
                told, existing = "", Existing.REPLACE if older else Existing.RESUME
                arm(at, call, number)
                try:
                    save(at, source, existing, "new")
                    count = max(count, seen())
                except QuantError as error:
                    told = str(error)
                    count = max(count, number + 1)
                disarm()
                first = looks_like(at, whole), beside(at)
                save(at, source, existing, "new")
                again = looks_like(at, whole), beside(at)
                found.append(FailedSave(older, call, number, told, *first, *again))
                shutil.rmtree(at)
                number += 1
    return found
