"""The tables against the checkpoints that transformers writes."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_quant.ckpt.read.checks import check_weights
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.models import ARCHITECTURES, Domain, Role, lookup
from tests.unit import tiny

TOWERS = {
    "kimi_k25": ("vision_tower.", "mm_projector.", "model.mm_projector."),
    "qwen3_5_moe_vl": ("model.visual.",),
}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_sources_are_exactly_the_saved_tensors(name: str, tmp_path: Path) -> None:
    checkpoint = open_source(tiny.save(name, tmp_path))
    params = lookup(checkpoint.config).params(checkpoint.config)
    sources = [s for p in params for s in p.sources]
    assert max(Counter(s.name for s in sources).values()) == 1
    rest = check_weights(checkpoint, params)
    assert all(n.startswith(TOWERS.get(name, ())) for n in rest)
    own = [n for n in checkpoint if n not in rest]
    assert {s.name: s.shape for s in sources} == {n: checkpoint.info(n).shape for n in own}


def test_every_architecture_has_a_tiny_model() -> None:
    named = {tiny.config(name)["architectures"][0] for name in tiny.MODELS}
    assert named == set(ARCHITECTURES)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_source_s_elements_are_the_parameter_s(name: str) -> None:
    config = tiny.config(name)
    for param in lookup(config).params(config):
        assert param.shape[0] == sum(s.shape[0] for s in param.sources)
        assert all(s.shape[1:] == param.shape[1:] for s in param.sources)


def test_roles_domains_and_indices_of_a_mixture_of_experts() -> None:
    config = tiny.config("qwen3_moe")
    params = {p.name: p for p in lookup(config).params(config)}
    fc1 = params["decoder.layers.1.mlp.experts.linear_fc1.weight3"]
    assert (fc1.layer, fc1.expert, fc1.domain, fc1.role) == (1, 3, Domain.EXPERT, Role.LINEAR)
    assert [s.module for s in fc1.sources] == [
        "model.layers.1.mlp.experts.3.gate_proj",
        "model.layers.1.mlp.experts.3.up_proj",
    ]
    router = params["decoder.layers.0.mlp.router.weight"]
    assert (router.role, router.domain, router.expert) == (Role.ROUTER, Domain.DENSE, None)
    assert params["output_layer.weight"].role is Role.OUTPUT
    assert params["decoder.final_layernorm.weight"].layer is None


def test_only_chosen_layers_have_experts() -> None:
    config = {**tiny.config("qwen3_moe"), "num_hidden_layers": 6}
    config.update(decoder_sparse_step=2, mlp_only_layers=[3])
    params = lookup(config).params(config)
    assert {p.layer for p in params if p.expert is not None} == {1, 5}
    assert lookup(config).megatron_config(config)["moe_layer_freq"] == [0, 1, 0, 0, 0, 1]


def test_a_tied_model_has_no_output_layer() -> None:
    config = tiny.config("qwen3_tied")
    names = {p.name for p in lookup(config).params(config)}
    assert "output_layer.weight" not in names
    assert lookup(config).gpt_config(config)["share_embeddings_and_output_weights"] is True


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_names_of_the_number_of_experts(key: str) -> None:
    config = tiny.config("qwen3_moe")
    for old in ("num_experts", "num_local_experts"):
        config.pop(old, None)
    config[key] = 6
    assert lookup(config).megatron_config(config)["num_moe_experts"] == 6


def test_the_tables_need_neither_torch_nor_megatron() -> None:
    heavy = "{'torch', 'megatron', 'transformers', 'transformer_engine'}"
    code = f"import sys, megatron_quant.models; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
