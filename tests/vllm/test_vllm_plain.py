"""Mixtures of experts in vLLM, up to the product of codes: its log-probabilities are right.

A CPU has no kernel for quantized experts. vLLM loads, fuses and stacks them; plain.py decodes what
it holds, and its own layers go on with that (weight-only exports).
"""

from pathlib import Path

from tests.vllm import served
from tests.vllm.engine import NEEDED

pytestmark = NEEDED


def test_the_page_says_whose_log_probabilities_are_equal(tmp_path: Path) -> None:
    assert served.page(served.compared(tmp_path)) in served.PAGE.read_text()
