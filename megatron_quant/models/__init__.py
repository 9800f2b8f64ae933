from megatron_quant.models.architecture import Architecture
from megatron_quant.models.layout import check_layout, copies, local_shape, padded_vocab
from megatron_quant.models.pipeline import Pipeline, Stages
from megatron_quant.models.registry import ARCHITECTURES, lookup
from megatron_quant.models.spec import (
    Box,
    Copy,
    Domain,
    Parallel,
    Param,
    Role,
    Source,
    Stage,
    num_experts,
    num_layers,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Box",
    "Copy",
    "Domain",
    "Parallel",
    "Param",
    "Pipeline",
    "Role",
    "Source",
    "Stage",
    "Stages",
    "check_layout",
    "copies",
    "local_shape",
    "lookup",
    "num_experts",
    "num_layers",
    "padded_vocab",
]
