"""Where a rank's model keeps its share of the logical parameters."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_quant.ckpt.layout import Layout
from megatron_quant.ckpt.regions import regions
from megatron_quant.errors import ArchitectureError
from megatron_quant.layers.install import LocalWeight
from megatron_quant.models.spec import Domain, Param, Stage

LAYER = re.compile(r"(?<=\blayers\.)\d+")
"""The number of a layer in the name of what it owns."""


@dataclass(frozen=True)
class LocalParam:
    """This rank's shard ``shard_rank`` of ``shard_size`` of ``param``.

    name: as the rank's chunk number ``chunk`` of the model has it, which counts its own layers and
    experts from 0.
    """

    param: Param
    name: str
    shard_rank: int
    shard_size: int
    chunk: int = 0

    def tensor(self, model: nn.Module) -> torch.Tensor:
        """The live parameter (a buffer, if it stays in float32) of the chunk that holds it."""
        if self.param.fp32:
            return model.get_buffer(self.name)
        return model.get_parameter(self.name)

    @property
    def weight(self) -> LocalWeight:
        """The same place, as the quantized layers are told it."""
        module, _, attribute = self.name.rpartition(".")
        held = regions(self.param, self.shard_rank, self.shard_size)
        return LocalWeight(self.param.name, module, attribute, tuple(region for _, region in held))


def local_params(params: Sequence[Param], layout: Layout, rank: int) -> list[LocalParam]:
    """Those of ``params`` that ``rank`` holds, in order."""
    return list(_local_params(params, layout, rank))


def _local_params(params: Sequence[Param], layout: Layout, rank: int) -> Iterator[LocalParam]:
    pp = layout.coords[rank].pp
    first: dict[str, int] = {}  # module -> the lowest global expert that the rank holds
    for param in params:
        shard = layout.shard_of(param, rank)
        if shard is None:
            continue
        chunk = dict(layout.places(param))[pp]
        name = _name_in_chunk(param, layout, pp, chunk)
        if param.domain is Domain.EXPERT:
            assert param.expert is not None
            local = param.expert - first.setdefault(param.module, param.expert)
            name = re.sub(r"\d+$", str(local), name)
        yield LocalParam(param, name, *shard, chunk)


def _name_in_chunk(param: Param, layout: Layout, pp: int, chunk: int) -> str:
    if param.stage is Stage.ENDS and pp > 0:
        return "output_layer.weight"  # the last stage has the embedding as its output layer alone
    if param.layer is None or not layout.stages:
        return param.name
    number = layout.stages[pp][chunk].index(param.layer)
    return LAYER.sub(str(number), param.name, count=1)


_NORMED_QUERIES = ".self_attention.linear_q_proj.layer_norm_weight"
"""What releases from 0.19 on give latent attention whose queries are not compressed."""


def check_model(chunks: Sequence[nn.Module], local: Sequence[LocalParam]) -> None:
    """Raise ArchitectureError unless the parameters of this rank's chunks are exactly ``local``."""
    for number, chunk in enumerate(chunks):
        _check_chunk(chunk, [p for p in local if p.chunk == number])


def _check_chunk(chunk: nn.Module, local: Sequence[LocalParam]) -> None:
    named = {name for name, _ in chunk.named_parameters()}
    expected = {p.name for p in local if not p.param.fp32}
    extra = sorted(named - expected)
    if any(name.endswith(_NORMED_QUERIES) for name in extra):
        raise ArchitectureError(
            "q_lora_rank=None in config.json: this megatron-core release normalizes the inputs of "
            "such queries twice, the model once; use megatron-core 0.16, or --stream"
        )
    if extra:
        raise ArchitectureError(
            f"the Megatron model has a parameter {extra[0]} that its table does not describe "
            f"({len(extra)} in all): this megatron-core release differs, report it"
        )
    named |= {name for name, _ in chunk.named_buffers()}
    if missing := sorted({p.name for p in local} - named):
        raise ArchitectureError(
            f"the Megatron model has no parameter {missing[0]} ({len(missing)} missing in all): "
            "build it with the Transformer Engine layer spec and grouped experts"
        )
