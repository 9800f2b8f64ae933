"""The command line in the ranks of a test: what each rank prints, and what it leaves on disk."""

import contextlib
import io
import re
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
    """The one line that the ranks ended with, without who says it and how many had it."""
    assert [e.status for e in ended] == [1] * len(ended), ended
    (said,) = {rank: e.err for rank, e in enumerate(ended) if e.err}.items()
    rank, line = said
    start = f"[rank {rank}] megatron-quant: error: "
    assert line.startswith(start) and line.count("\n") == 1, line
    return re.sub(r" \(on \d+ ranks\)$", "", line.removeprefix(start).rstrip("\n"))


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
