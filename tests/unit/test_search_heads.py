"""Models without an output layer: the one that is given, found beside, or tied."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import megatron_quant as mq
from megatron_quant.dist import Groups
from megatron_quant.errors import CheckpointError, QuantError
from tests.dist import checkpoints

DATA = mq.Calibration(dataset=__file__, size=2, seq_length=16, batch_size=1)


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> Path:
    return checkpoints.save("qwen3", tmp_path_factory.mktemp("causal"))


@pytest.fixture
def base(causal: Path, tmp_path: Path) -> Path:
    """The same model without its output layer."""
    shutil.copytree(causal, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    model = transformers.AutoModel.from_pretrained(causal, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def head(causal: Path, tmp_path: Path) -> Path:
    path = tmp_path / "head.safetensors"
    save_file({"w": load_file(causal / "model.safetensors")["lm_head.weight"]}, path)
    return path


def scores(source: Path, method: str = "gradient", **given: Any) -> dict[str, list[float]]:
    """Scores by place, whose names begin with the layers."""
    auto = mq.AutoQuantize(bits=6.0, formats="nvfp4", method=method, score_size=2, **given)
    found = mq.find_recipe(source, auto, calibration=DATA, groups=Groups())
    return {name.removeprefix("model."): own for name, own in found.choice.scores.items()}


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_a_head_that_is_given_scores_as_that_of_the_whole_model(
    causal: Path, base: Path, head: Path, method: str
) -> None:
    wanted = scores(causal, method)
    assert scores(base, method, head=head) == wanted


def test_a_head_beside_is_found(causal: Path, base: Path, head: Path) -> None:
    shutil.copy(head, base / "lm_head.safetensors")
    assert scores(base) == scores(causal)
    with pytest.raises(CheckpointError, match="has an output layer of its own; leave it out"):
        scores(causal, head=head)


def test_a_tied_head_is_the_embedding(base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no output layer, and config\.json does not"):
        scores(base)
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    assert all(option > 0 and none == 0 for (option, none) in scores(base).values())


def test_heads_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    save_file({"w": torch.zeros(3, 4)}, small)
    with pytest.raises(CheckpointError, match=r"\[\(3, 4\)\]: give one of shape \(258, 128\)"):
        scores(base, head=small)
    small.write_bytes(b"none")
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors"):
        scores(base, head=small)
    with pytest.raises(QuantError, match=r"--auto-quantize-head is for .*: add --stream"):
        mq.quantize_checkpoint(
            base, None, tmp_path / "o", auto=mq.AutoQuantize(bits=5.0, head=small)
        )
