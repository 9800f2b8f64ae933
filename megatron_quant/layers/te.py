"""The quantized classes on Transformer Engine's grouped linears, registered with ModelOpt.

``QuantTEColumnParallelGroupedLinear`` and ``QuantTERowParallelGroupedLinear`` are subclasses of
Megatron's ``TEColumnParallelGroupedLinear`` / ``TERowParallelGroupedLinear``, that is of TE's
``GroupedLinear``; ModelOpt's registry makes them (its naming: ``Quant`` + the base's name).
"""

import megatron.core.parallel_state as mpu
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TERowParallelGroupedLinear,
)
from modelopt.torch.quantization.nn import QuantModuleRegistry
from modelopt.torch.utils.distributed import ParallelState

from megatron_quant.layers.backend import register_backend
from megatron_quant.layers.grouped import QuantGroupedLinear


class _QuantTEGroupedLinear(QuantGroupedLinear):
    """Tells ModelOpt's own calibration over which ranks an expert linear's amaxes merge."""

    def _setup(self) -> None:
        if self.parallel_state is None:
            self.parallel_state = ParallelState(
                mpu.get_expert_data_parallel_group(),
                tensor_parallel_group=mpu.get_expert_tensor_parallel_group(),
                expert_model_parallel_group=mpu.get_expert_model_parallel_group(),
            )
        super()._setup()


class _Column(_QuantTEGroupedLinear):
    _is_column_parallel = True


class _Row(_QuantTEGroupedLinear):
    _is_row_parallel = True


def _register() -> None:
    """Put our classes in the place of ModelOpt's entries for the grouped linears."""
    for base, quantized, key in (
        (TEColumnParallelGroupedLinear, _Column, "megatron_quant_TEColumnParallelGroupedLinear"),
        (TERowParallelGroupedLinear, _Row, "megatron_quant_TERowParallelGroupedLinear"),
    ):
        if base in QuantModuleRegistry:
            QuantModuleRegistry.unregister(base)
        QuantModuleRegistry.register({base: key})(quantized)


register_backend()
_register()

QuantTEColumnParallelGroupedLinear = QuantModuleRegistry[TEColumnParallelGroupedLinear]
QuantTERowParallelGroupedLinear = QuantModuleRegistry[TERowParallelGroupedLinear]
