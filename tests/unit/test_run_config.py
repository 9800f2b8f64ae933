"""The model that a training run says it has, without --hf-model-id."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_quant.errors import CheckpointError
from megatron_quant.mcore.checkpoint import model_of_run
from megatron_quant.models import lookup
from tests.unit import tiny

NAMES = ["qwen3_moe", "qwen3_moe_raw", "mixtral", "qwen3", "qwen3_tied", "llama"]


def said_of(name: str, **changes: Any) -> dict[str, Any]:
    """The model section that Megatron-Bridge writes of one of the tiny models."""
    config = tiny.config(name)
    architecture = lookup(config)
    megatron = {**architecture.megatron_config(config), **architecture.gpt_config(config)}
    megatron["activation_func"] = {"_target_": "torch.nn.functional.silu", "_call_": False}
    megatron |= {"seq_length": megatron.pop("max_sequence_length"), "mtp_num_layers": None}
    return {"_target_": "megatron.bridge.models.GPTModelProvider", **megatron, **changes}


def run_of(folder: Path, model: dict[str, Any], tokenizer: object) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"model": model, "tokenizer": {"tokenizer_model": str(tokenizer)}}
    (folder / "run_config.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_table(name: str, tmp_path: Path) -> None:
    """The same parameters and the same Megatron model as from the model's own config.json."""
    folder, config = model_of_run(run_of(tmp_path / "run", said_of(name), tmp_path))
    assert folder == tmp_path
    own = tiny.config(name)
    wanted, found = lookup(own), lookup(config)
    assert found.name == wanted.name
    assert found.params(config) == wanted.params(own)
    assert found.megatron_config(config) == wanted.megatron_config(own)
    assert found.gpt_config(config) == wanted.gpt_config(own)


def test_a_folder_of_the_run_wins(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", said_of("llama"), tmp_path)
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text(json.dumps(tiny.config("qwen3")))
    assert model_of_run(run) == (run / "hf", tiny.config("qwen3"))


def test_a_config_beside_the_tokenizer_wins(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("llama")))
    found = model_of_run(run_of(tmp_path / "run", said_of("llama"), tmp_path))
    assert found == (tmp_path, tiny.config("llama"))
    run_of(tmp_path / "run", said_of("llama", layernorm_epsilon=0.5), tmp_path)
    with pytest.raises(CheckpointError, match=r"layernorm_epsilon=0.5 in the Transf"):
        model_of_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multi_latent_attention": True}, "multi_latent_attention=True has no counterpart"),
        ({"rope_scaling": True}, "rope_scaling=True has no counterpart"),
        (
            {"moe_shared_expert_intermediate_size": 8},
            "moe_shared_expert_intermediate_size=8 has no",
        ),
        ({"moe_layer_freq": [0, 1]}, r"moe_layer_freq=\[0, 1\] has no counterpart"),
        ({"hidden_size": None}, "does not say hidden_size of the model"),
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm' in the"),
        ({"qk_l2_norm": True}, "qk_l2_norm=True in the TransformerConfig computes what no"),
        (
            {"activation_func": {"_target_": "torch.nn.functional.gelu"}},
            "activation_func='gelu' in",
        ),
        ({"num_layers": "2"}, "num_hidden_layers='2' in config.json must be a whole number"),
    ],
)
def test_what_has_no_counterpart(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", said_of("qwen3_moe", **changes), tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        model_of_run(run)
    assert "\n" not in str(caught.value) and "run_config.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no hf folder with config.json and the tokenizer, and no run_config.yaml: say"),
        ("", "names no folder on this host"),
        ("- 1", "names no folder on this host"),
        ("model: 3", "model=3 in .*run_config.yaml must be"),
        ("model: {hf_model_id: Qwen/Qwen3-0.6B}", "names no folder on this host"),
        ("model: !!python/object/apply:os.system [a]", "is not valid YAML"),
    ],
)
def test_documents_that_say_nothing(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run_config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        model_of_run(tmp_path)
    assert "\n" not in str(caught.value)
