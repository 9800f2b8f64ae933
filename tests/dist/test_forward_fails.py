"""An error in one rank's forward, amid Megatron's own collectives, ends all ranks and is told."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.dist import checkpoints
from tests.dist.command import Ended, command, quantize_argv, tree
from tests.dist.pool import Ranks

OOM = "CUDA out of memory. Tried to allocate 20.00 GiB"
CALIBRATED: dict[str, Any] = {
    "export_quant_cfg": "fp8",
    "export_format": "compressed-tensors",
    "weight_only": None,
    "calib_dataset": __file__,
    "calib_size": 4,
    "calib_seq_length": 32,
    "cold_experts": "layer-max",
}
SCRIPT = f"""
import os
import sys

from megatron_quant import cpu
from megatron_quant.cli.main import main

if __name__ == "__main__":
    cpu.use_cpu()
    from megatron_quant.mcore.model import schedule

    step = schedule._step

    def fails(*args, **keys):
        if os.environ["RANK"] == "1":
            raise RuntimeError("{OOM}")
        return step(*args, **keys)

    schedule._step = fails
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3", tmp_path_factory.mktemp("source"))


def failing(argv: list[str], victim: int, stuck: bool = False) -> Ended:
    """The command, in which the forward of ``victim`` fails. stuck: the others never notice."""
    from megatron_quant import rendezvous
    from megatron_quant.mcore.model import schedule

    step = schedule._step

    def fails(*args: Any, **keys: Any) -> Any:
        if dist.get_rank() == victim:
            raise RuntimeError(OOM)
        if stuck:
            time.sleep(600)
        return step(*args, **keys)

    schedule._step = fails
    rendezvous._LOOK_SECONDS, rendezvous._GRACE_SECONDS = 0.05, 0.2 if stuck else 60.0
    ended = command(*argv)
    if dist.get_rank() == victim and not stuck:
        os._exit(1)  # as a process does that ends: its connections close
    return ended


def test_others_tell_the_error_of_the_rank_that_failed(
    source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    argv = quantize_argv(source, tmp_path / "out", **{**CALIBRATED, "tp": 4, "ep": 1})
    errors = ranks.errors(4, told, argv, 2, timeout=60)
    assert str(errors.pop(2)) == "the process died"
    for error in errors:
        assert str(error).startswith(f"('RankError', 'rank 2 failed: RuntimeError: {OOM}; this rank")
    assert tree(tmp_path) == {}


def told(argv: list[str], victim: int) -> None:
    """Raises what the command would tell."""
    from megatron_quant.cli import main

    def raised(error: BaseException, trace: bool) -> int:
        if dist.get_rank() == victim:
            return 1
        raise ValueError(type(error).__name__, str(error))

    main.fail = raised
    failing(argv, victim)


def test_a_rank_that_waits_for_good_ends(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    argv = quantize_argv(source, tmp_path / "out", **{**CALIBRATED, "tp": 2, "ep": 1})
    errors = ranks.errors(2, failing, argv, 1, True, timeout=60)
    assert str(errors[0]) == "the process died"
    assert tree(tmp_path) == {}


def test_torchrun_ends_all_ranks_with_one_line(source: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = quantize_argv(source, out, **{**CALIBRATED, "ep": 1})
    ended = subprocess.run(
        [*run, str(script), *argv], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode != 0
    said = re.findall(r"^\[rank (\d)\] megatron-quant: error: (.*)$", ended.stderr, re.MULTILINE)
    ((rank, line),) = said
    assert rank == "1" and line.startswith(f"RuntimeError: {OOM}; this rank has too little memory")
    assert not out.exists()
