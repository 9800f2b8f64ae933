"""Whole runs of the command line, as processes of their own: on this host's GPU, or without."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.gpu.gloo_rank")


def quantize(
    source: Path,
    out: Path,
    *options: str,
    entry: tuple[str, ...] = ("-m", "megatron_quant"),
    environment: Mapping[str, str] | None = None,
) -> Path:
    """``out``, filled from ``source``; CalledProcessError where the run fails."""
    paths = ("quantize", "--hf-model-id", str(source), "--export-dir", str(out))
    subprocess.run(
        [sys.executable, *entry, *paths, *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
        check=True,
    )
    return out


def digests(directory: Path) -> dict[str, str]:
    """File name to the hash of what it holds."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}
