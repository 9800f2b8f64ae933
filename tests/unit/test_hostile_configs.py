"""Any value in a config, a quantization file or a recipe is read, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_quant.ckpt.dialects.detect import dialect_of, quantization_of
from megatron_quant.ckpt.dialects.modelopt import HF_QUANT_CONFIG
from megatron_quant.ckpt.dialects.registry import DIALECTS, get_dialect
from megatron_quant.ckpt.read.logical_tensors import logical, params_of
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.documents import parse_yaml
from megatron_quant.errors import RecipeError
from megatron_quant.models.layout import check_layout
from megatron_quant.models.registry import lookup
from megatron_quant.models.structure import describe_structure
from megatron_quant.recipes.parse import parse_recipe
from tests.unit import exported, tiny
from tests.unit.hostile import outcomes
from tests.unit.test_dialects_modelopt import mixed
from tests.unit.test_packed_sources import CASES

NAMES = tuple(s.module for p in exported.PARAMS for s in p.sources if len(s.shape) == 2)
HERE = Path("checkpoint")
STACKS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def read(config: Any) -> None:
    if not isinstance(config, dict):  # which the door to documents refuses
        return
    quantization = quantization_of(config, HERE)
    if quantization is None:
        return
    dialect = dialect_of(quantization, HERE)
    dialect.read_kv_cache(quantization)
    for module, fmt in dialect.read_config(quantization, NAMES).items():
        assert module in NAMES and fmt.weights.bits in (4, 8)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_value_in_every_key_of_a_quantization_config(name: str) -> None:
    for choice in exported.CELLS.get(name, [])[::3]:
        config = get_dialect(name).quantization_config(exported.written_plan(name, choice))
        taken, refused = outcomes({"quantization_config": config}, read)
        assert taken > 40 and refused > 40
    if name == "mxfp4":
        taken, refused = outcomes({"quantization_config": STACKS}, read)
        assert taken > 5 and refused > 5
    theirs = [c for c in CASES.values() if c["quant_method"] == name]
    for config in theirs[-2:]:
        taken, refused = outcomes({"text_config": {"compression_config": config}}, read)
        assert taken > 20 and refused > 20


MIXED = {
    "gptq": {"+:.*q_proj": {"bits": 8, "group_size": 64}, "-:.*k_proj": {}},
    "auto-round": {".*q_proj": {"bits": 8}, ".k_proj": {"bits": 16}, NAMES[0]: {"sym": True}},
}


@pytest.mark.parametrize(("name", "key"), [("gptq", "dynamic"), ("auto-round", "extra_config")])
def test_every_value_in_what_differs_by_name(name: str, key: str) -> None:
    config = get_dialect(name).quantization_config(exported.plan("int4")) | {key: MIXED[name]}
    taken, refused = outcomes({"quantization_config": config}, read)
    assert taken > 80 and refused > 80


@pytest.mark.parametrize("choice", ["fp8", "nvfp4", "mixed"])
def test_every_value_in_the_files_of_modelopt(choice: str, tmp_path: Path) -> None:
    dialect = get_dialect("modelopt")
    plan = mixed("fp8", "nvfp4") if choice == "mixed" else exported.plan(choice)
    config, files = dialect.quantization_config(plan), dialect.extra_files(plan)
    file = tmp_path / HF_QUANT_CONFIG

    def of_file(document: Any) -> None:
        file.write_text(json.dumps(document))
        found = quantization_of({}, tmp_path)
        if found is not None:
            read({"quantization_config": found})
        if isinstance(document, dict):
            dialect.check_extra_files(config, {HF_QUANT_CONFIG: document})

    taken, refused = outcomes(files[HF_QUANT_CONFIG], of_file)
    assert taken > 50 and refused > 50
    taken, refused = outcomes(
        config, lambda one: isinstance(one, dict) and dialect.check_extra_files(one, files)
    )
    assert taken > 50 and refused > 10


@pytest.mark.parametrize(
    ("file", "config"),
    [
        (
            "quant_config.json",
            {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"},
        ),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}),
    ],
)
def test_every_value_in_older_files(file: str, config: dict[str, Any], tmp_path: Path) -> None:
    def of_file(document: Any) -> None:
        (tmp_path / file).write_text(json.dumps(document))
        found = quantization_of({}, tmp_path)
        if found is not None:
            read({"quantization_config": found})

    taken, refused = outcomes(config, of_file)
    assert taken > 20 and refused > 20


TABLES = (
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "gpt_oss",
    "qwen3",
    "deepseek_v3",
    "llama3",
    "llama_yarn",
)


@pytest.mark.parametrize("name", TABLES)
def test_every_value_in_every_key_of_a_models_config(name: str) -> None:
    config = tiny.config(name)
    shapes = {s.name: s.shape for p in lookup(config).params(config) for s in p.sources}

    def of_model(one: Any) -> None:
        if not isinstance(one, dict):
            return
        found = describe_structure(one, shapes).params
        assert found
        architecture = lookup(one)
        architecture.gpt_config(one)
        check_layout(one, 2, 1, 1)

    taken, refused = outcomes(config, of_model)
    assert taken > 100 and refused > 100


def test_every_value_in_the_config_of_a_checkpoint(tmp_path: Path) -> None:
    directory = exported.export(
        tmp_path / "it", "modelopt", exported.plan("fp8"), exported.source_weights()
    )
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config |= {"num_nextn_predict_layers": 0, "text_config": {"num_hidden_layers": 1}}
    del config["quantization_config"]["ignore"]

    def of_checkpoint(one: Any) -> None:
        file.write_text(json.dumps(one))
        params_of(QuantizedCheckpoint(directory))
        logical(open_source(directory))

    taken, refused = outcomes(config, of_checkpoint)
    assert taken > 100 and refused > 100


RECIPE = {
    "description": "it",
    "kv_cache": "fp8",
    "rules": [
        {
            "quantize": ["*mlp*"],
            "weights": {"format": "int4", "group_size": 64},
            "algorithm": "mse",
        },
    ],
}
EXCLUDES = {"rules": [{"exclude": ["*"]}, {"quantize": ["*"], "weights": "fp8", "inputs": "fp8"}]}


@pytest.mark.parametrize("recipe", [RECIPE, EXCLUDES])
def test_every_value_in_every_key_of_a_recipe(recipe: dict[str, Any]) -> None:
    def of_text(one: Any) -> None:
        text = yaml.safe_dump(one, allow_unicode=True)
        parse_recipe("it", parse_yaml(text, "it", RecipeError))

    taken, refused = outcomes(recipe, of_text)
    assert taken > 3 and refused > 100
