"""vLLM under its own Python, from tests that run under this project's."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_quant.evaluation import decoded

PYTHON = os.environ.get("MEGATRON_QUANT_VLLM_PYTHON", "")
NEEDED = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="make test-vllm makes vLLM's environment"),
]
"""The marks of a module that needs vLLM."""
PROMPT = [1, 5, 9, 13, 40, 80, 33, 21, 7, 66, 120, 3, 90, 14, 200, 31]
Answer = tuple[list[int], torch.Tensor]
"""A greedy continuation of PROMPT, and log-probabilities at its positions [T - 1, V]."""


def start(script: str, *arguments: object, **env: str) -> subprocess.Popen[str]:
    """Start a script of this folder."""
    env = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # what stands in for a kernel is in this process
        **env,
    }
    command = [PYTHON, str(Path(__file__).with_name(script)), *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=env, **pipes)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for its end, which must be a good one."""
    said, _ = process.communicate()
    assert process.returncode == 0, said[-6000:]


def answer(found: dict[str, list[Any]]) -> Answer:
    """What serve.py and refit.py write."""
    return found["tokens"], torch.tensor(found["log_probs"])


def served(directory: Path) -> Answer:
    out = directory.with_suffix(".json")
    finish(start("serve.py", directory, json.dumps(PROMPT), out))
    return answer(json.loads(out.read_text()))


def error(log_probs: torch.Tensor, directory: Path) -> float:
    """How far they are from those of the decoded checkpoint: of centred ones, relative."""
    logits = decoded(directory, torch.bfloat16)(torch.tensor(PROMPT))
    expected = logits[:-1].float().log_softmax(-1)
    centred = [x - x.mean(-1, keepdim=True) for x in (log_probs, expected)]
    return float((centred[0] - centred[1]).norm() / centred[1].norm())
