"""A Hugging Face checkpoint loaded into Megatron at TP 2 x EP 2 computes what transformers does."""

from pathlib import Path

import pytest
import torch

from megatron_quant.models import lookup, num_experts
from tests.unit import tiny

IDS = (torch.arange(2 * 15) * 7 % 50).view(2, 15)


def megatron_logits(
    path: Path, tp: int, ep: int, dtype: torch.dtype, cp: int = 1
) -> torch.Tensor:
    import torch.distributed as dist

    from megatron_quant.ckpt.plan.ranks import Layout
    from megatron_quant.ckpt.read.open import open_source
    from megatron_quant.mcore.model.load import load_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.mcore.model.schedule import full_logits
    from megatron_quant.models import lookup, num_experts, text_config

    checkpoint = open_source(path)
    architecture = lookup(checkpoint.config)
    experts = num_experts(architecture.params(checkpoint.config))
    layout = Layout.simulate(dist.get_world_size(), tp, ep, 1, experts).sharing_sequences(cp)
    groups = start_distributed()
    model = load_model(checkpoint, architecture, layout, groups, dtype, lambda steps: None)
    with torch.no_grad():
        return full_logits(model.module, IDS, text_config(checkpoint.config)["vocab_size"]).clone()


@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path, ranks) -> None:
    reference = tiny.model(name)
    tiny.save(name, tmp_path)
    with torch.no_grad():
        expected = reference(IDS).logits
    config = tiny.config(name)
    ep = 2 if num_experts(lookup(config).params(config)) else 1
    for logits in ranks(4, megatron_logits, tmp_path, 2, ep, torch.float32):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        rounded = reference.to(torch.bfloat16)(IDS).logits
    for logits in ranks(4, megatron_logits, tmp_path, 2, ep, torch.bfloat16):
        # As far from fp32 as transformers' own bf16 is.
        assert distance(logits, expected) < 1.5 * distance(rounded, expected)


def distance(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The median token's relative error: a token that rounding routes otherwise does not count."""
    error = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return error.median()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama_yarn"])
def test_context_parallel_ranks_share_a_sequence(name: str, tmp_path: Path, ranks) -> None:
    """15 tokens at tp 2 and cp 2: padded, cut into four chunks, two on each rank."""
    with torch.no_grad():
        expected = tiny.model(name)(IDS).logits
    tiny.save(name, tmp_path)
    config = tiny.config(name)
    ep = 2 if num_experts(lookup(config).params(config)) else 1
    for logits in ranks(4, megatron_logits, tmp_path, 2, ep, torch.float32, 2):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
