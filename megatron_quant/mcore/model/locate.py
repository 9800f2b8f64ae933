"""Find where a rank's model keeps its share of the logical parameters."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules
from torch import nn

from megatron_quant.ckpt.plan import Layout, regions
from megatron_quant.layers import LocalWeight
from megatron_quant.models import DRAFTS, Domain, Param, Role, Stage, local_shape

LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
"""The layer's number in the name of a parameter of the decoder."""
_INNER = ".transformer_layer."
_NEWER = ".mtp_model_layer."
_RENAMES = "mtp_model_layer" in MultiTokenPredictionLayerSubmodules.__annotations__
"""Whether this release calls so what older ones call ``transformer_layer``."""
_OUTPUT = "output_layer.weight"
VOCABULARY = ("embedding.word_embeddings.weight", _OUTPUT)
"""Parameters with a row for each token, by their names in a chunk."""


@dataclass(frozen=True, kw_only=True)
class LocalParam:
    """This rank's shard ``shard_rank`` of ``shard_size`` of ``param``.

    name: its name in the rank's chunk number ``chunk``, which counts its layers and experts from 0.
    """

    param: Param
    name: str
    shard_rank: int
    shard_size: int
    chunk: int = 0

    def tensor(self, model: nn.Module) -> torch.Tensor:
        """Return the live parameter of the chunk that holds it (a buffer, if it stays float32).

        Of one that holds more, return its rows.
        """
        if self.param.fp32:
            return model.get_buffer(self.name)
        found, inside = model.get_parameter(self.name), self.param.inside
        if inside is None:
            return found
        return found.narrow(0, inside.before // self.shard_size, self.rows)

    @property
    def rows(self) -> int:
        """Return how many rows of its parameter it has."""
        return local_shape(self.param, self.shard_rank, self.shard_size)[0]

    @property
    def weight(self) -> LocalWeight:
        """Return this place in the form that the quantized layers take."""
        module, _, attribute = self.name.rpartition(".")
        held = regions(self.param, self.shard_rank, self.shard_size)
        regions_ = tuple(region for _, region in held)
        inside = self.param.inside
        is_linear = self.param.role in (Role.LINEAR, Role.DRAFT_LINEAR)
        assert inside is None or not (is_linear and inside.before), "it has the first rows"
        rows = None if inside is None else self.rows
        if self.param.role is Role.OUTPUT:  # without the vocabulary's padding
            rows = sum(region.size[0] for region in regions_)
        return LocalWeight(
            slot=self.param.name, module=module, attribute=attribute, regions=regions_, rows=rows
        )


def local_params(params: Sequence[Param], layout: Layout, rank: int) -> list[LocalParam]:
    """Return those of ``params`` that ``rank`` holds, in order."""
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
        yield LocalParam(
            param=param, name=name, shard_rank=shard[0], shard_size=shard[1], chunk=chunk
        )


def _name_in_chunk(param: Param, layout: Layout, pp: int, chunk: int) -> str:
    if param.stage is Stage.ENDS and pp > 0:
        return _OUTPUT  # on the last stage, the embedding is only the output layer
    if param.role in DRAFTS and _RENAMES:
        return param.live.replace(_INNER, _NEWER, 1)
    if param.layer is None or not layout.stages:
        return param.live
    number = layout.stages[pp][chunk].index(param.layer)
    return LAYER.sub(str(number), param.live, count=1)
