"""Values of a live model's TransformerConfig, against those of config.json."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_quant.errors import ArchitectureError
from megatron_quant.mcore.model.settings import check_settings
from megatron_quant.models import lookup

from . import tiny


def check(name: str, **changes: Any) -> None:
    """``check_settings`` of a config that fits, but for ``changes``."""
    hf = tiny.config(name)
    described = lookup(hf).megatron_config(hf)
    defaults = {"activation_func_clamp_value": None, "glu_linear_offset": 0.0}
    defaults |= {"softmax_type": "vanilla", "num_moe_experts": None}
    check_settings(SimpleNamespace(**(defaults | described | changes)), described)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Another definition of the activation that a table names."""
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"layernorm_epsilon": np.float64(1e-6)}),
        ("qwen3_moe", {"layernorm_epsilon": np.float32(1e-6)}),
        ("qwen3_moe", {"layernorm_epsilon": torch.tensor(1e-6)}),
        ("qwen3_moe", {"num_attention_heads": np.int64(8), "gated_linear_unit": 1}),
        ("qwen3_moe", {"activation_func": torch.nn.SiLU()}),
        ("qwen3_moe", {"activation_func": "silu"}),
        ("qwen3_moe", {"activation_func": torch.jit.script(F.silu)}),
        ("gpt_oss", {"activation_func": quick_gelu, "glu_linear_offset": 1}),
        ("gpt_oss", {"activation_func": torch.jit.script(quick_gelu)}),
        ("deepseek_v3", {"moe_router_pre_softmax": True}),  # of no effect with a sigmoid
    ],
)
def test_equal_values_of_other_types(name: str, changes: dict[str, Any]) -> None:
    check(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3_moe_raw", {"moe_router_pre_softmax": False}, "config.json makes it True"),
        ("qwen3_moe", {"moe_router_pre_softmax": True}, "config.json makes it False"),
        ("qwen3_moe", {"layernorm_epsilon": np.float32(1.01e-6)}, "layernorm_epsilon="),
        ("qwen3_moe", {"activation_func": torch.nn.GELU()}, "activation_func=GELU"),
        ("qwen3_moe", {"activation_func": quick_gelu}, "config.json makes it silu"),
        ("gpt_oss", {"activation_func": F.silu}, "config.json makes it quick_gelu"),
    ],
)
def test_other_values_are_refused(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ArchitectureError, match=words):
        check(name, **changes)
