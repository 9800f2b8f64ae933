"""Open a source: a checkpoint to quantize, which may be quantized already."""

from pathlib import Path

from megatron_quant.ckpt.dialects import quantization_of
from megatron_quant.ckpt.read.directory import open_directory
from megatron_quant.ckpt.read.head import with_own_head
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint, matrices
from megatron_quant.ckpt.read.single_experts import single_experts
from megatron_quant.ckpt.read.source import Weights
from megatron_quant.ckpt.read.stack_views import unstacked
from megatron_quant.models import has_table


def open_source(path: Path) -> Weights:
    """Open directory ``path`` for loading: names and values of the dense model.

    If a model without a table stores its experts in stacks, they stay stacks here.

    Raises CheckpointError if it is broken, or quantized in an unknown way.
    """
    checkpoint = with_own_head(open_directory(path))
    if quantization_of(checkpoint.config, path) is not None:
        files = single_experts(checkpoint)
        return QuantizedCheckpoint.over(files, matrices(files))
    return unstacked(checkpoint) if has_table(checkpoint.config) else checkpoint


def open_stored(path: Path) -> Weights:
    """Open directory ``path`` by the names that transformers' own loader knows; dense values.

    Raises CheckpointError where :func:`open_source` does.
    """
    checkpoint = open_directory(path)
    packed = quantization_of(checkpoint.config, path) is not None
    return open_source(path) if packed else checkpoint
