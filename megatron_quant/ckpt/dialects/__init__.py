"""On-disk conventions, by name."""

from megatron_quant.ckpt.dialects.base import Dialect
from megatron_quant.ckpt.dialects.compressed_tensors import CompressedTensors
from megatron_quant.ckpt.dialects.modelopt import ModelOpt
from megatron_quant.errors import FormatError

DIALECTS: dict[str, Dialect] = {d.name: d for d in (ModelOpt(), CompressedTensors())}


def get_dialect(name: str) -> Dialect:
    """The dialect called ``name``; FormatError lists the known ones."""
    if name not in DIALECTS:
        raise FormatError(f"unknown export format {name!r}; known: {', '.join(DIALECTS)}")
    return DIALECTS[name]
