"""The snippets of docs/api.md, run as they stand there on a model that megatron-core built."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.dist import checkpoints
from tests.dist.pool import Ranks

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
SIZES = {"num_experts": 4, "moe_intermediate_size": 128, "mlp_only_layers": [1]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run_page(source: Path, out: Path) -> dict[str, Any]:
    """Run every snippet in one namespace; its paths are put in, and sizes made small."""
    import torch

    from megatron_quant.mcore.model import run_through
    from tests.dist import bare

    def forward_loop(model: Any) -> None:
        run_through(model, [torch.arange(256).view(4, 64)])

    (out / "corpus.jsonl").write_text('{"text": "%s"}\n' % ("a b c d " * 400))
    (out / "text.txt").write_text("a b c d e f g h " * 400)
    sent: dict[str, torch.Tensor] = {}
    names: dict[str, Any] = {
        "another_model": bare.built(source, 1, 1),
        "forward_loop": forward_loop,
        "send": sent.__setitem__,
    }
    for number, snippet in enumerate(snippets()):
        text = snippet.replace('"PATH"', repr(str(source)))
        for name in ("CONVERTED", "STREAMED", "OUT", "SAVED", "corpus.jsonl", "text.txt"):
            where = f"{number}-{name}" if name == "OUT" else name
            text = text.replace(f'"{name}"', repr(str(out / where)))
        text = text.replace("size=512, seq_length=2048", "size=8, seq_length=64")
        text = text.replace("tp=2, ep=2", "tp=1, ep=1")  # one rank runs it
        if "mq.quantize(model" in text:
            names["model"] = bare.filled(bare.built(source, 1, 1), source)
        if "mq.stream(" in text:  # the page's lines stand for alternatives
            text = text.replace("mq.use_cpu()", "")
        exec(compile(text, f"docs/api.md, snippet {number}", "exec"), names)
    return {"sent": len(sent), "files": sorted(p.name for p in out.iterdir())}


def test_the_page(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    assert len(snippets()) == 5
    (found,) = ranks(1, run_page, source, tmp_path)
    assert found["sent"] > 20
    assert {"0-OUT", "4-OUT", "STREAMED", "CONVERTED", "SAVED"} <= set(found["files"])
