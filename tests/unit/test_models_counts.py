"""A config's counts are compared with the tensors before anything counts to them."""

import re

import pytest

from megatron_quant.errors import ArchitectureError
from megatron_quant.models.counts import check_counts
from megatron_quant.models.registry import lookup
from megatron_quant.models.speculation import is_draft
from megatron_quant.models.structure import recognise
from tests.unit import tiny
from tests.unit.test_stream_models import CONFIG, SHAPES

COUNTS = ("num_hidden_layers", "num_experts", "n_routed_experts", "num_nextn_predict_layers")


@pytest.mark.parametrize("key", COUNTS)
def test_more_than_there_are_tensors_is_refused(key: str) -> None:
    said = re.escape(f"{key}=1000000 in config.json, but the checkpoint has 6 tensors")
    with pytest.raises(ArchitectureError, match=said):
        check_counts({**CONFIG, key: 10**6}, SHAPES.values())
    with pytest.raises(ArchitectureError, match=f"{key}=7 in text_config of config.json"):
        check_counts({"text_config": {**CONFIG, key: 7}}, SHAPES.values())
    check_counts({**CONFIG, key: 6}, SHAPES.values())  # two stacks of two experts
    with pytest.raises(ArchitectureError, match="has 7 tensors"):
        check_counts({key: 8}, [*SHAPES.values(), (10**9, 0, 4)])


def test_a_number_of_drafts_is_not_counted_to() -> None:
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 10**12}
    assert is_draft(config, "model.layers.5.mtp.weight")
    assert not is_draft(config, "model.norm.weight")
    assert not is_draft({**config, "num_nextn_predict_layers": True}, "model.layers.2.x")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 10**6, "at most 10000"),
        ("num_hidden_layers", True, "num_hidden_layers=True in config.json must be a whole number"),
        ("n_routed_experts", 10**9, "at most 10000"),
        ("vocab_size", 10**30, "at most 2147483647"),
    ],
)
def test_a_table_counts_to_no_more_than_any_model_has(key: str, value: object, said: str) -> None:
    config = {**tiny.config("deepseek_v3"), key: value}
    with pytest.raises(ArchitectureError, match=said):
        lookup(config).params(config)


def test_experts_of_all_layers_together_are_limited() -> None:
    config = tiny.config("deepseek_v3")
    config |= {"num_hidden_layers": 5000, "n_routed_experts": 8000}
    with pytest.raises(ArchitectureError, match="4999 layers with 8000 experts each"):
        lookup(config).params(config)


def test_numbers_in_names_are_ones_that_count() -> None:
    digits = "9" * 5000
    strange = {f"model.layers.{n}.norm.weight": (4,) for n in ("²", digits, "x")}
    found = recognise(CONFIG, {**SHAPES, **strange})
    assert {p.name for p in found.params} >= set(strange)
    with pytest.raises(ArchitectureError, match="looks like an expert"):
        recognise(CONFIG, {**SHAPES, f"model.layers.0.experts.{digits}.up_proj.weight": (3, 4)})
