"""Mixtures of experts in vLLM, up to the product of codes: its log-probabilities are right.

A CPU has no kernel for quantized experts. vLLM loads, fuses and stacks them; plain.py decodes what
it holds, and its own layers go on with that (weight-only exports).
"""

import json
from pathlib import Path

import pytest

from tests.vllm import accepted
from tests.vllm.accepted import KINDS
from tests.vllm.engine import NEEDED, PROMPT, answer, error, finish, start

pytestmark = NEEDED
ROUNDING = 0.03
_, NVFP4, INT4 = KINDS


@pytest.mark.parametrize(("name", "kind"), [("qwen3_moe", NVFP4), ("mixtral", INT4)])
def test_experts_are_those_of_the_decoded_model(
    name: str, kind: accepted.Kind, tmp_path: Path
) -> None:
    directory = accepted.exported(tmp_path, [name])[f"{name}/{kind.title}"]
    assert isinstance(directory, Path)
    out = tmp_path / "found.json"
    finish(start("serve_plain.py", directory, json.dumps(PROMPT), out))
    _, log_probs = answer(json.loads(out.read_text()))
    assert error(log_probs, directory) < ROUNDING
