"""The tables read config.json, or refuse it."""

from typing import Any

import pytest

from megatron_quant.errors import ArchitectureError
from megatron_quant.models import ARCHITECTURES, lookup
from tests.unit import tiny

_LLAMA3 = tiny.MODELS["llama3"][1]["rope_parameters"]
_YARN = tiny.MODELS["llama_yarn"][1]["rope_parameters"]


def _gpt(config: dict[str, Any]) -> dict[str, object]:
    return lookup(config).gpt_config(config)


@pytest.mark.parametrize("named", [None, [], ["GPT2LMHeadModel"], "LlamaForCausalLM"])
def test_an_unknown_architecture_lists_the_known(named: Any) -> None:
    known = f"{', '.join(ARCHITECTURES)}, or pass --stream"
    with pytest.raises(ArchitectureError, match=known):
        lookup({"architectures": named})


_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": None}, "no 'hidden_size'"),
    ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers='2' .* whole number above 0"),
    ("llama", {"vocab_size": True}, "vocab_size=True"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps=0 .* number above 0"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no' .* true or false"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' .* only 'silu' is"),
    ("llama", {"attention_bias": True}, "attention_bias=True .* only False is"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3 .* does not divide"),
    ("llama", {"head_dim": None, "hidden_size": 33}, "does not divide hidden_size=33"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]},
        "sliding_window=8 .* set it to null",
    ),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
        | {"layer_types": None},
        "sliding_window=8",
    ),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8"),
    ("mixtral", {"sliding_window": 8}, "sliding_window=8"),
    ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 .* exceeds the 4 experts"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "visits 2 experts or more"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    ("gpt_oss", {"attention_bias": False}, "attention_bias=False .* only True is"),
    ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5 .* only 1.702 is"),
    ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit=0 .* number above 0"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types=.* each of 2 layers"),
    ("gpt_oss", {"layer_types": ["linear_attention"] * 2}, "one of sliding_attention and full"),
    ("gpt_oss", {"sliding_window": 0}, "sliding_window=0"),
    ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers='0' .* list of layer numbers"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "leave no layer with experts; .*Qwen3ForCausalLM"),
    ("qwen3_moe", {"decoder_sparse_step": 3}, "decoder_sparse_step=3"),
]


@pytest.mark.parametrize(("name", "changes", "message"), _REFUSED)
def test_what_a_table_does_not_describe_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    config = {**tiny.config(name), **changes}
    with pytest.raises(ArchitectureError, match=message) as caught:
        lookup(config).params(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"sliding_window": 64}),  # as long as the model's context
        ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 8}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]},
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
            | {"layer_types": None},
        ),
    ],
)
def test_a_window_that_hides_nothing_is_accepted(name: str, changes: dict[str, Any]) -> None:
    config = {**tiny.config(name), **changes}
    assert lookup(config).params(config)


def test_absent_keys_have_transformers_defaults() -> None:
    config = tiny.config("qwen3")
    for key in ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings"):
        config.pop(key, None)
    shape = lookup(config).megatron_config(config)
    assert (shape["kv_channels"], shape["num_query_groups"]) == (128, 8)
    assert _gpt(config)["rotary_base"] == 10000.0
    mixtral = tiny.config("mixtral")
    del mixtral["rope_parameters"]
    assert _gpt(mixtral)["rotary_base"] == 1000000.0


def test_windows_of_gpt_oss() -> None:
    config = tiny.config("gpt_oss")
    for kinds, layers in [
        (None, [1, 0]),
        (["full_attention", "sliding_attention"], [0, 1]),
    ]:
        found = lookup(config).megatron_config({**config, "layer_types": kinds})
        assert (found["window_size"], found["window_attn_skip_freq"]) == ((5, 0), layers)
    for changes in ({"sliding_window": None}, {"layer_types": ["full_attention"] * 2}):
        assert "window_size" not in lookup(config).megatron_config({**config, **changes})


def test_yarn() -> None:
    config = tiny.config("gpt_oss")
    found = lookup(config).config_attributes(config)
    assert found["yarn_rotary_scaling_factor"] == 4.0
    assert found["yarn_correction_range_round_to_int"] is False
    assert _gpt(config)["position_embedding_type"] == "yarn"
    scaled = _old_style({**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5})
    for rope, scales in [(_YARN, (None, None)), (scaled["rope_scaling"], (1.0, 0.5))]:
        found = lookup(scaled).config_attributes({**scaled, "rope_scaling": rope})
        assert (found["yarn_mscale"], found["yarn_mscale_all_dim"]) == scales
        assert found["yarn_correction_range_round_to_int"] is True
    assert lookup(scaled).config_attributes(tiny.config("llama")) == {}


def _old_style(rope_scaling: Any) -> dict[str, Any]:
    config = {**tiny.config("llama"), "rope_theta": 7e5, "rope_scaling": rope_scaling}
    del config["rope_parameters"]
    return config


def test_rope_in_both_spellings() -> None:
    old = {k: v for k, v in _LLAMA3.items() if k != "rope_theta"}
    for config in (tiny.config("llama3"), {**_old_style(old), "rope_theta": 500000.0}):
        found = _gpt(config)
        assert (found["rotary_base"], found["rope_scaling"]) == (500000.0, True)
        assert found["rope_scaling_factor"] == 4.0
    plain = _gpt(_old_style(None))
    assert (plain["rotary_base"], plain["rope_scaling"]) == (7e5, False)
    linear = _gpt(_old_style({"type": "linear", "factor": 4}))
    assert (linear["seq_len_interpolation_factor"], linear["rope_scaling"]) == (4.0, False)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, "rope_type='longrope' .* remove rope_scaling"),
        ({"rope_type": "yarn", "factor": 4.0}, "no 'original_max_position_embeddings'"),
        ({**_YARN, "factor": None}, "no 'factor'"),
        ({**_YARN, "attention_factor": 1.5}, "attention_factor=1.5 .* remove it if"),
        ({"type": "dynamic", "factor": 2.0}, "rope_type='dynamic'"),
        ({"rope_type": "linear"}, "no 'factor'"),
        ({**_LLAMA3, "high_freq_factor": 2.0}, "high_freq_factor=2.0 .* only has 4"),
        ({**_LLAMA3, "original_max_position_embeddings": 4096}, "=4096 .* only has 8192"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"full_attention": {"rope_type": "default"}}, "one object for all layers"),
        (["yarn"], "one object for all layers"),
    ],
)
def test_a_rope_that_megatron_does_not_have_is_refused(rope: Any, message: str) -> None:
    config = _old_style(rope)
    with pytest.raises(ArchitectureError, match=message):
        lookup(config).params(config)
