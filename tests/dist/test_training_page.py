"""The snippets of docs/training.md, run as they stand there on a tiny model."""

from pathlib import Path
from typing import Any

import pytest

from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.unit import pages

SIZES = {"num_experts": 4, "moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


def snippets() -> list[str]:
    """All but the step that learns scales, which test_train_qat.py runs in examples/train_qat.py."""
    found = pages.blocks(pages.ROOT / "docs" / "training.md", "python")
    return [block for block in found if "optimizer.step()" not in block]


def run_page(source: Path, out: Path) -> tuple[list[str], bool]:
    """All snippets in one namespace; before each that prepares a model, a fresh one."""
    import torch

    import megatron_quant as mq
    from megatron_quant.mcore.model import run_through
    from tests.dist import live, training

    def forward_loop(model: Any) -> None:
        run_through(model, [torch.arange(256).view(4, 64)])

    calibrated = training.build(source, live.Parallelism(1, 1))
    mq.save(mq.quantize(calibrated, "nvfp4", forward_loop, hf_model=source), out)
    names: dict[str, Any] = {}
    recipes = []
    for number, snippet in enumerate(snippets()):
        if "prepare(" in snippet:
            names["model"] = training.build(source, live.Parallelism(1, 1))
        text = snippet.replace('"PATH"', repr(str(source))).replace('"SAVED"', repr(str(out)))
        text = text.replace('"RUN"', repr(str(out.parent / "run")))
        exec(compile(text, f"docs/training.md, snippet {number}", "exec"), names)
        handle = mq.quantized(names["model"])
        recipes.append(handle.recipe.name)
    names["callback"].start(names["model"])
    return recipes, handle.stored is not None


def test_the_page(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    assert len(snippets()) == 4
    assert ranks(1, run_page, source, tmp_path / "saved") == [(["nvfp4"] * 4, True)]
