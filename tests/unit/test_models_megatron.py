"""The tables against real GPTModels: parameter names, shapes, and transformers' logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_quant.ckpt.read.open import open_source
from megatron_quant.ckpt.read.source import fill
from megatron_quant.models import Domain, copies, local_shape, lookup, padded_vocab
from tests.dist.pool import Ranks
from tests.unit import tiny


def _gpt_model(config: dict[str, Any], tp: int) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_transformer_block_with_experimental_attention_variant_spec,
    )
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    from megatron_quant import cpu

    etp = _etp(config, tp)
    parallel_state.initialize_model_parallel(tp, expert_tensor_parallel_size=etp)
    host = {} if torch.cuda.is_available() else cpu.transformer_config_overrides()
    described = lookup(config).megatron_config(config)
    kind = MLATransformerConfig if "multi_latent_attention" in described else TransformerConfig
    transformer = kind(
        **described,
        **host,
        tensor_model_parallel_size=tp,
        expert_tensor_parallel_size=etp,
        sequence_parallel=tp > 1,
        params_dtype=torch.float32,
        perform_initialization=False,
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall",
    )
    vars(transformer).update(lookup(config).config_attributes(config))
    if "experimental_attention_variant" in described:
        spec = get_transformer_block_with_experimental_attention_variant_spec(transformer)
    elif "num_moe_experts" in described:
        spec = get_gpt_decoder_block_spec(transformer, use_transformer_engine=True)
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=transformer.qk_layernorm)
    arguments = lookup(config).gpt_config(config)
    arguments["vocab_size"] = padded_vocab(int(arguments["vocab_size"]), tp)
    return GPTModel(transformer, spec, **arguments).eval()


def _etp(config: dict[str, Any], tp: int) -> int:
    """Megatron-Core cuts no experts that have biases."""
    return 1 if lookup(config).decoder(config).biased else tp


def _names_and_shapes(config: dict[str, Any], tp: int) -> list[tuple[str, tuple[int, ...]]]:
    model = _gpt_model(config, tp)
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]


_BUILT = [
    "qwen3_moe",
    "qwen3_moe_mixed",
    "qwen2_moe",
    "mixtral",
    "qwen3_tied",
    "llama",
    "deepseek_v3",
    "deepseek_v3_plain",
    "gpt_oss",
]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", _BUILT)
def test_a_real_model_has_these_parameters_in_this_order(ranks: Ranks, name: str, tp: int) -> None:
    config = tiny.config(name)
    params = lookup(config).params(config)
    sizes = {Domain.DENSE: tp, Domain.EXPERT: _etp(config, tp)}
    for rank, found in enumerate(ranks(tp, _names_and_shapes, config, tp)):
        # what stays in float32 is a buffer
        shards = [(p, sizes[p.domain]) for p in params if not p.fp32]
        assert found == [(p.name, local_shape(p, rank % size, size)) for p, size in shards]


def _logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    checkpoint = open_source(directory)
    model = _gpt_model(checkpoint.config, 1)
    params = {p.name: p for p in lookup(checkpoint.config).params(checkpoint.config)}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for tensor in tensors.values():
        tensor.data.fill_(torch.nan)
    for param in params.values():
        tensor, inside = tensors[param.live].data, param.inside
        tensor = tensor[inside.before :][: param.shape[0]] if inside else tensor
        fill(tensor, copies(param, 0, 1), checkpoint)
        tensor += param.shift
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    with torch.no_grad():
        return model(ids, positions, mask)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_are_those_of_transformers(ranks: Ranks, name: str, tmp_path: Path) -> None:
    tiny.save(name, tmp_path)
    ids = (torch.arange(2 * 40) * 7 % 50).view(2, 40)
    with torch.no_grad():
        expected = tiny.model(name)(ids).logits
    (found,) = ranks(1, _logits, tmp_path, ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4 * float(expected.std()))


def test_experts_alone_are_in_the_expert_domain() -> None:
    config = tiny.config("mixtral")
    for param in lookup(config).params(config):
        assert (param.domain is Domain.EXPERT) == (".mlp.experts." in param.name)
