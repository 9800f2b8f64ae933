"""A head that the config says is the embedding: values decide, and no head is dropped."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_quant.ckpt.read import head
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.runs.job import prepare_job
from megatron_quant.runs.options import QuantizeOptions
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.unit import hf_models, sources

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(params=["qwen3", "gemma4"])
def other_head(request, untied: Path, tmp_path: Path) -> Path:
    """Under a config that says tied; with a table and without, where the config has it nested."""
    source = tmp_path / "source"
    source.mkdir()
    if request.param == "qwen3":
        sources.write(source, sources.tensors(untied))
        (source / "config.json").write_bytes((untied / "config.json").read_bytes())
        sources.config(source, tie_word_embeddings=True)
    else:
        hf_models.save("gemma4", source)
        sources.edit(source, lambda t: {**t, HEAD: torch.full((258, 64), 0.5).bfloat16()})
        text = sources.config(source)["text_config"]
        sources.config(
            source, tie_word_embeddings=True, text_config={**text, "tie_word_embeddings": True}
        )
    return source


def test_another_head_is_kept_and_the_config_says_so(other_head: Path, tmp_path: Path) -> None:
    sources.run(other_head, tmp_path / "out")
    out = sources.tensors(tmp_path / "out")
    assert torch.equal(out[HEAD], sources.tensors(other_head)[HEAD])
    config = sources.config(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", {}).get("tie_word_embeddings", False) is False
    assert not verify(tmp_path / "out", other_head).problems


def test_a_dropped_head_is_seen_against_the_source(other_head: Path, tmp_path: Path) -> None:
    sources.run(other_head, tmp_path / "out")
    sources.edit(tmp_path / "out", lambda t: {n: w for n, w in t.items() if n != HEAD})
    names = sources.tensors(tmp_path / "out")
    sources.index(tmp_path / "out", {sources.WEIGHTS: names})
    sources.config(tmp_path / "out", tie_word_embeddings=True)
    problems = verify(tmp_path / "out", other_head).problems
    assert problems == (f"{HEAD}: missing, though {other_head} has it",)


def test_a_head_equal_to_the_embedding_is_one_with_it(untied: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    found = sources.tensors(untied)
    sources.write(source, {**found, HEAD: found[EMBEDDING].clone()})
    (source / "config.json").write_bytes((untied / "config.json").read_bytes())
    sources.config(source, tie_word_embeddings=True)
    sources.run(source, tmp_path / "out")
    assert HEAD not in sources.tensors(tmp_path / "out")
    assert sources.config(tmp_path / "out")["tie_word_embeddings"] is True
    assert not verify(tmp_path / "out", source).problems


def test_the_last_row_decides_too(untied: Path, tmp_path: Path, monkeypatch) -> None:
    found = sources.tensors(untied)
    head = found[EMBEDDING].clone()
    head[-1, -1] += 1
    sources.write(tmp_path, {**found, HEAD: head})
    (tmp_path / "config.json").write_bytes((untied / "config.json").read_bytes())
    sources.config(tmp_path, tie_word_embeddings=True)
    monkeypatch.setattr("megatron_quant.ckpt.read.head._ELEMENTS", 1000)
    source = open_source(tmp_path)
    assert source.config["tie_word_embeddings"] is False and HEAD in source.dense()


def test_a_megatron_model_is_planned_untied(untied: Path, tmp_path: Path) -> None:
    sources.write(tmp_path, sources.tensors(untied))
    (tmp_path / "config.json").write_bytes((untied / "config.json").read_bytes())
    sources.config(tmp_path, tie_word_embeddings=True)
    options = QuantizeOptions.from_flags(
        hf_model_id=str(tmp_path), export_quant_cfg="int4", export_dir=tmp_path / "out"
    )
    job = prepare_job(options, 1, None, open_source)
    assert "output_layer.weight" in {p.name for p in job.params}
    assert job.architecture is not None
    assert not job.architecture.gpt_config(job.hf_config)["share_embeddings_and_output_weights"]


def compares(source: Path, out: Path) -> int:
    """How often this rank compares a block of head and embedding, in a run of all ranks."""
    count = 0
    real = torch.equal

    def counted(*pair: torch.Tensor) -> bool:
        nonlocal count
        count += 1
        return real(*pair)

    head.torch = SimpleNamespace(equal=counted)
    sources.run(source, out)
    return count


def test_one_rank_compares_and_once(untied: Path, tmp_path: Path, ranks: Ranks) -> None:
    source = tmp_path / "source"
    source.mkdir()
    found = sources.tensors(untied)
    sources.write(source, {**found, HEAD: found[EMBEDDING].clone()})
    (source / "config.json").write_bytes((untied / "config.json").read_bytes())
    sources.config(source, tie_word_embeddings=True)
    first, second = ranks(2, compares, source, tmp_path / "out")
    assert (first, second) == (1, 0)
    assert HEAD not in sources.tensors(tmp_path / "out")


def test_a_head_that_was_replaced_is_compared_again(untied: Path, tmp_path: Path) -> None:
    found = sources.tensors(untied)
    (tmp_path / "config.json").write_bytes((untied / "config.json").read_bytes())
    sources.config(tmp_path, tie_word_embeddings=True)
    for second, same in enumerate((True, False, True)):
        sources.write(tmp_path, {**found, HEAD: found[EMBEDDING] + (0 if same else 1)})
        os.utime(tmp_path / sources.WEIGHTS, (second, second))
        assert (HEAD in open_source(tmp_path).dense()) is not same
