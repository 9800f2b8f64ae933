"""Checkpoints that a bare model saved: names without ``model.``, read by their published ones."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from megatron_quant.ckpt.read.open import open_source
from megatron_quant.ckpt.read.published import published_names
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.errors import CheckpointError
from tests.dist import checkpoints
from tests.unit import hf_models, sources

HEAD = "lm_head.weight"


def bare(source: Path, saved_by: str) -> Path:
    """The checkpoint as the class ``saved_by`` saves it, without a head."""
    model = getattr(transformers, saved_by).from_pretrained(source, dtype=torch.bfloat16)
    directory = source.with_name("bare")
    model.save_pretrained(directory)
    checkpoints.tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("name", "saved_by", "embedding", "architecture"),
    [
        ("qwen3_moe", "Qwen3MoeModel", "embed_tokens.weight", "Qwen3MoeForCausalLM"),
        ("qwen3_moe", "Qwen3MoeModel", "embed_tokens.weight", "Qwen3MoeModel"),
        ("gemma4", "Gemma4Model", "language_model.embed_tokens.weight", "Gemma4Model"),
    ],
)
def test_a_bare_model_is_exported_under_the_published_names(
    name: str, saved_by: str, embedding: str, architecture: str, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    if name == "gemma4":
        hf_models.save(name, whole)
    else:
        checkpoints.save(name, whole, tie_word_embeddings=True)
    source = bare(whole, saved_by)
    assert embedding in sources.tensors(source)
    assert sources.config(source)["architectures"] == [saved_by]
    sources.config(source, architectures=[architecture])
    for recipe in ("fp8_channel", "int8_group"):
        if recipe == "int8_group" and name == "gemma4":
            continue  # its rows fill no group
        sources.run(whole, tmp_path / f"a-{recipe}", export_quant_cfg=recipe)
        sources.run(source, tmp_path / f"b-{recipe}", export_quant_cfg=recipe)
        wanted, found = (sources.tensors(tmp_path / f"{of}-{recipe}") for of in "ab")
        assert sorted(found) == sorted(wanted)
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
        stated = sources.config(tmp_path / f"b-{recipe}")["quantization_config"]
        assert stated == sources.config(tmp_path / f"a-{recipe}")["quantization_config"]
        assert not verify(tmp_path / f"b-{recipe}", source).problems


def test_what_is_beside_the_bare_model_keeps_its_name() -> None:
    names = ["embed_tokens.weight", "layers.0.x.weight", HEAD, "mtp.fc.weight"]
    assert published_names(names, {}) == {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "layers.0.x.weight": "model.layers.0.x.weight",
        HEAD: HEAD,
        "mtp.fc.weight": "mtp.fc.weight",
    }
    assert published_names(["model.embed_tokens.weight", HEAD], {}) == {}
    assert published_names(["language_model.embed_tokens.weight"], {}) == {}
    assert published_names(["embed.weight", "layers.0.attn.wq_a.weight"], {}) == {}  # DeepSeek-V4


def test_a_bare_model_without_a_head_is_told_so(tmp_path: Path) -> None:
    checkpoints.save("qwen3", tmp_path / "whole")
    source = bare(tmp_path / "whole", "Qwen3Model")
    sources.config(source, architectures=["Qwen3ForCausalLM"])
    with pytest.raises(CheckpointError, match=rf"tensor {HEAD} is missing, and tie_word_embedd"):
        sources.run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_bare_model_is_read_where_both_names_mean_the_same(tmp_path: Path) -> None:
    checkpoints.save("qwen3", tmp_path / "whole", tie_word_embeddings=True)
    export = tmp_path / "export"
    sources.run(tmp_path / "whole", export)
    wanted = sources.tensors(export)
    sources.edit(export, lambda t: {n.removeprefix("model."): w for n, w in t.items()})
    (export / "model.safetensors.index.json").unlink()
    weight = "model.layers.0.self_attn.o_proj.weight"
    info = open_source(export).info(weight)
    assert info is not None and info.shape == wanted[weight].shape and info.decoded

    stated = sources.config(export)["quantization_config"]
    ignored = [*stated["ignore"], "re:model\\.layers\\.0\\..*"]
    sources.config(export, quantization_config={**stated, "ignore": ignored})
    said = re.escape("names of tensors lack 'model.'")
    with pytest.raises(CheckpointError, match=said):
        open_source(export)
    assert json.loads((export / "config.json").read_text())["tie_word_embeddings"]
