"""The command line in the ranks of a test: what each rank prints, and what it leaves on disk."""

import contextlib
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.dist.pool import Ranks

WEIGHTS = "model.safetensors"
Flags = dict[str, object]


@dataclass(frozen=True)
class Ended:
    """How the command ended in one process."""

    status: object
    out: str
    err: str


def command(*argv: str) -> Ended:
    """``megatron-quant ARGV`` in this process."""
    from megatron_quant.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: object = main(argv)
        except SystemExit as e:  # argparse
            status = e.code
    return Ended(status, out.getvalue(), err.getvalue())


def quantize_argv(source: Path, out: Path, **flags: object) -> list[str]:
    """``quantize`` of ``source`` into ``out`` at tp 2 x ep 2, weights only.

    flags: by name; True is a flag without a value, and None one that is left out.
    """
    chosen: Flags = {"hf_model_id": source, "export_quant_cfg": "nvfp4", "tp": 2, "ep": 2}
    chosen |= {"weight_only": True, "export_dir": out, **flags}
    argv = ["quantize"]
    for name, value in chosen.items():
        if value is not None:
            argv += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return argv


def message(ended: Sequence[Ended]) -> str:
    """The one line that every rank ended with, without the rank's number."""
    messages = set()
    for rank, e in enumerate(ended):
        assert e.status == 1, f"rank {rank}: {e}"
        start = f"[rank {rank}] megatron-quant: error: "
        assert e.err.startswith(start) and e.err.count("\n") == 1, f"rank {rank}: {e.err}"
        messages.add(e.err.removeprefix(start).rstrip("\n"))
    (only,) = messages
    return only


def refused(ranks: Ranks, folder: Path, argv: Sequence[str], world: int = 2) -> str:
    """The message of a run that must fail on all ranks and change nothing in ``folder``."""
    before = tree(folder)
    said = message(ranks(world, command, *argv, timeout=60))
    assert tree(folder) == before
    return said


def tree(folder: Path) -> dict[str, bytes]:
    """Every path below ``folder``, with the bytes of what is a file."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in sorted(folder.rglob("*"))
    }


def copy(source: Path, to: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a checkpoint of one file, with ``changes`` of its tensors; None removes one."""
    shutil.copytree(source, to)
    if changes:
        tensors = {**load_file(to / WEIGHTS), **changes}
        kept = {name: t for name, t in tensors.items() if t is not None}
        save_file(kept, to / WEIGHTS, metadata={"format": "pt"})
    return to


def spoiled(source: Path, to: Path, name: str, value: float) -> Path:
    """A copy whose tensor ``name`` has ``value`` as its last element."""
    tensor = load_file(source / WEIGHTS)[name]
    tensor.view(-1)[-1] = value
    return copy(source, to, **{name: tensor})
