"""All sources of tensors keep one protocol: what ``info`` says is what ``read`` gives."""

import pytest
import torch

from megatron_quant.ckpt.read.directory import Checkpoint, open_directory
from megatron_quant.ckpt.read.logical_tensors import logical
from megatron_quant.ckpt.read.mxfp4_stacks import ExpertStacks, packed_experts
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.read.read_once import ReadOnce
from megatron_quant.ckpt.read.source import TensorSource
from megatron_quant.ckpt.read.stack_views import Viewed
from megatron_quant.models.spec import Box
from tests.unit import exported, hf_models

KINDS = (Checkpoint, ExpertStacks, QuantizedCheckpoint, ReadOnce, Viewed)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[TensorSource]:
    """One of each class."""
    root = tmp_path_factory.mktemp("sources")
    _, released = hf_models.save_gpt_oss(root)
    plan, weights = exported.written_plan("modelopt", "nvfp4"), exported.source_weights()
    quantized = exported.export(root / "quantized", "modelopt", plan, weights)
    return [
        open_directory(released),
        packed_experts(open_directory(released)),
        QuantizedCheckpoint(quantized),
        ReadOnce(open_directory(quantized)),
        logical(open_source(hf_models.save("llama4", root / "stacks")))[0],
    ]


def middle(shape: tuple[int, ...]) -> Box:
    """All but the first and the last of each dim that is long enough, on an even start."""
    starts = tuple(2 if n > 4 else 0 for n in shape)
    return Box(starts, tuple(n - 2 * s for n, s in zip(shape, starts, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_info_says_what_read_gives(kind: type, sources: list[TensorSource]) -> None:
    (source,) = (found for found in sources if type(found) is kind)
    names = list(source)
    assert len(names) == len(set(names)) > 10
    for name in names:
        info = source.info(name)
        assert info is not None
        whole = source.read(name, Box((0,) * len(info.shape), info.shape))
        assert (whole.dtype, tuple(whole.shape)) == (info.dtype, info.shape), name
        box = middle(info.shape)
        part = source.read(name, box)
        assert part.dtype == info.dtype
        bits = (t.contiguous().view(torch.uint8) for t in (part, whole[box.index]) if t.dim())
        assert len({t.numpy().tobytes() for t in bits}) <= 1, name
    assert source.info("no.such.weight") is None


def test_a_tensor_that_was_read_whole_is_not_read_again(sources: list[TensorSource]) -> None:
    source = ReadOnce(sources[0])
    name = next(name for name in source if len(source.info(name).shape) == 2)
    first = source.raw(name)
    assert source.raw(name) is first
    part = source.read(name, middle(tuple(first.shape)))
    assert part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
