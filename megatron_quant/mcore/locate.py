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
from megatron_quant.models.spec import Domain, Param


@dataclass(frozen=True)
class LocalParam:
    """This rank's shard ``shard_rank`` of ``shard_size`` of ``param``, as the model names it."""

    param: Param
    name: str
    shard_rank: int
    shard_size: int

    def tensor(self, model: nn.Module) -> torch.Tensor:
        """The live parameter."""
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
    first: dict[str, int] = {}  # module -> the lowest global expert that the rank holds
    for param in params:
        shard = layout.shard_of(param, rank)
        if shard is None:
            continue
        name = param.name
        if param.domain is Domain.EXPERT:
            assert param.expert is not None
            local = param.expert - first.setdefault(param.module, param.expert)
            name = re.sub(r"\d+$", str(local), name)
        yield LocalParam(param, name, *shard)


def check_model(model: nn.Module, local: Sequence[LocalParam]) -> None:
    """Raise ArchitectureError unless the model's parameters are exactly ``local``."""
    named = {name for name, _ in model.named_parameters()}
    expected = {p.name for p in local}
    if extra := sorted(named - expected):
        raise ArchitectureError(
            f"the Megatron model has a parameter {extra[0]} that its table does not describe "
            f"({len(extra)} in all): this megatron-core release differs, report it"
        )
    if missing := sorted(expected - named):
        raise ArchitectureError(
            f"the Megatron model has no parameter {missing[0]} ({len(missing)} missing in all): "
            "build it with the Transformer Engine layer spec and grouped experts"
        )
