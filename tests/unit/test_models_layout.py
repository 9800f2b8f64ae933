"""How parameters are cut: every element is on exactly one shard, in Megatron's order."""

from typing import Any

import pytest
import torch

from megatron_quant.errors import LayoutError
from megatron_quant.models import (
    Copy,
    Parallel,
    Param,
    Role,
    check_layout,
    copies,
    local_shape,
    lookup,
    padded_vocab,
)
from tests.unit import tiny


def _params(name: str) -> tuple[Param, ...]:
    config = tiny.config(name)
    return lookup(config).params(config)


def _param(name: str, part: str) -> Param:
    return next(p for p in _params(name) if part in p.name)


def _count(shape: tuple[int, ...], boxes: list[Any]) -> torch.Tensor:
    seen = torch.zeros(shape, dtype=torch.int32)
    for box in boxes:
        assert all(o + n <= d for o, n, d in zip(box.start, box.size, shape, strict=True))
        seen[box.index] += 1
    return seen


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_element_is_held_once(name: str, size: int) -> None:
    for param in _params(name):
        shards = [copies(param, rank, size) for rank in range(size)]
        holders = size if param.parallel is Parallel.REPLICATED else 1
        for source in param.sources:
            boxes = [c.src for shard in shards for c in shard if c.source == source]
            assert (_count(source.shape, boxes) == holders).all(), param.name


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_local_element_is_written_once(name: str, size: int) -> None:
    for param in _params(name):
        padding = 0
        for rank in range(size):
            found = copies(param, rank, size)
            assert all(c.src.size == c.dst.size for c in found)
            seen = _count(local_shape(param, rank, size), [c.dst for c in found])
            assert seen.max() <= 1
            padding += int((seen == 0).sum())
        vocabulary = param.role in (Role.EMBEDDING, Role.OUTPUT)
        rows = padded_vocab(param.shape[0], size) - param.shape[0] if vocabulary else 0
        assert padding == rows * param.shape[-1], param.name


def _assemble(param: Param, tensors: dict[str, torch.Tensor], rank: int, size: int) -> torch.Tensor:
    local = torch.zeros(local_shape(param, rank, size))
    found: tuple[Copy, ...] = copies(param, rank, size)
    for copy in found:
        local[copy.dst.index] = tensors[copy.source.name][copy.src.index]
    return local


def _random(param: Param) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {s.name: torch.rand(s.shape) for s in param.sources}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_qkv_rows_follow_the_query_groups(size: int) -> None:
    param = _param("qwen3", "linear_qkv.weight")
    tensors = _random(param)
    q, k, v = (t.view(4, -1, t.shape[1]) for t in tensors.values())
    whole = torch.cat([q, k, v], dim=1).flatten(0, 1)
    shards = [_assemble(param, tensors, rank, size) for rank in range(size)]
    torch.testing.assert_close(torch.cat(shards), whole, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("part", ["mlp.linear_fc1.weight", "experts.linear_fc1.weight2"])
def test_a_shard_of_gate_and_up_holds_both(part: str, size: int) -> None:
    param = _param("qwen3_moe_mixed", part)
    tensors = _random(param)
    gate, up = tensors.values()
    for rank in range(size):
        expected = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
        assert torch.equal(_assemble(param, tensors, rank, size), expected)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("part", ["linear_proj.weight", "experts.linear_fc2.weight1"])
def test_a_row_parallel_shard_is_a_run_of_columns(part: str, size: int) -> None:
    param = _param("mixtral", part)
    tensors = _random(param)
    (whole,) = tensors.values()
    for rank in range(size):
        assert torch.equal(_assemble(param, tensors, rank, size), whole.chunk(size, 1)[rank])


def test_vocabulary_rows_are_padded_at_the_end() -> None:
    param = _param("llama", "word_embeddings")
    tensors = _random(param)
    (whole,) = tensors.values()
    shards = torch.cat([_assemble(param, tensors, rank, 4) for rank in range(4)])
    assert shards.shape == (52, 32)
    assert torch.equal(shards[:50], whole)
    assert not shards[50:].any()


def test_a_shard_may_hold_padding_alone() -> None:
    param = _param("llama", "output_layer")
    small = Param(
        name=param.name,
        sources=param.sources,
        shape=(1, 32),
        role=param.role,
        parallel=param.parallel,
    )
    assert copies(small, 1, 2) == ()
    assert local_shape(small, 1, 2) == (1, 32)


@pytest.mark.parametrize(("vocab", "tp", "rows"), [(50, 1, 50), (50, 4, 52), (52, 4, 52)])
def test_padded_vocab_is_the_smallest_multiple(vocab: int, tp: int, rows: int) -> None:
    assert padded_vocab(vocab, tp) == rows


@pytest.mark.parametrize(
    ("part", "size", "message"),
    [
        ("linear_qkv.weight", 8, r"--tp 8 does not divide the query groups of .*\(4\)"),
        ("linear_proj.weight", 3, r"--tp 3 does not divide the columns of .*\(64\)"),
        (
            "experts.linear_fc1.weight0",
            3,
            r"--etp 3 does not divide the rows of .*gate_proj.*\(16\)",
        ),
        ("experts.linear_fc2.weight0", 3, r"--etp 3 does not divide the columns of .*\(16\)"),
        ("mlp.linear_fc1.weight", 5, r"--tp 5 does not divide the rows of .*\(48\)"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(part: str, size: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        copies(_param("qwen3_moe_mixed", part), 0, size)


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("qwen3_moe", (3, 1, 1), r"--tp 3 does not divide the attention heads \(8\); use one of 1"),
        ("qwen3_moe", (8, 1, 1), r"--tp 8 does not divide the key-value heads \(4\); .* 1, 2, 4$"),
        ("qwen3_moe", (1, 3, 1), r"--ep 3 does not divide the experts of a layer \(4\)"),
        ("qwen3_moe", (1, 1, 5), r"--etp 5 does not divide the intermediate size of an expert"),
        ("qwen3_moe", (0, 1, 1), "--tp is 0: give at least 1"),
        ("gpt_oss", (2, 2, 2), "--etp 2: experts of GptOssForCausalLM have biases.* --stream"),
        ("llama", (1, 2, 1), "--ep 2 --etp 1: LlamaForCausalLM has no experts; leave both at 1"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    name: str, layout: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        check_layout(tiny.config(name), *layout)


def test_tp_must_divide_the_dense_intermediate_size_only_where_it_is_used() -> None:
    config = {**tiny.config("qwen3_moe"), "intermediate_size": 49}
    check_layout(config, 2, 4, 2)
    with pytest.raises(LayoutError, match=r"--tp 2 does not divide the intermediate size \(49\)"):
        check_layout({**config, "mlp_only_layers": [1]}, 2, 1, 1)
