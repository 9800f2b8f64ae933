"""Quantized classes for Transformer Engine's grouped linears, as ModelOpt's registry takes them.

The registry makes subclasses of Megatron's ``TEColumnParallelGroupedLinear`` and
``TERowParallelGroupedLinear``, and so of TE's ``GroupedLinear``. It calls them ``Quant`` + the
base's name: ``QuantTEColumnParallelGroupedLinear`` and ``QuantTERowParallelGroupedLinear``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.parallel_state as mpu
import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEDotProductAttention,
    TERowParallelGroupedLinear,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from modelopt.torch.opt import ModeloptStateManager
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry
from modelopt.torch.utils.distributed import ParallelState
from torch import nn
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_quant.errors import QuantError
from megatron_quant.layers.grouped import QuantGroupedLinear
from megatron_quant.layers.sharded import Place, quantizer_state, reserve_amaxes
from megatron_quant.layers.stand_in import follow

COLUMN, ROW = TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
ATTENTION, DENSE_MLP = TEDotProductAttention, MLP


class _QuantTEGroupedLinear(QuantGroupedLinear):
    """Adapts a grouped linear to Transformer Engine's options and ModelOpt's calibration."""

    parallel_state: ParallelState | None

    def _setup(self) -> None:
        _check_options(self)
        # Off, because ModelOpt's formats may mask gradients; `fusion_kept` restores it for ours.
        self.fuse_wgrad_accumulation = False
        if self.parallel_state is None:
            self.parallel_state = ParallelState(
                mpu.get_expert_data_parallel_group(),
                tensor_parallel_group=mpu.get_expert_tensor_parallel_group(),
                expert_model_parallel_group=mpu.get_expert_model_parallel_group(),
            )
        super()._setup()

        _drop_modelopt_state(self)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Add the quantizers' amaxes, by global expert index, to the base class's state."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        singleton = bool((metadata or {}).get("singleton_local_shards", False))
        return {**state, **quantizer_state(self, prefix, sharded_offsets, singleton, _place(self))}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        reserve_amaxes(self, (name for name in state_dict if name.startswith(prefix)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def layer_sync_moe_local_experts_amax(self, sync_weight_amax: bool) -> None:
        """Merge a shared weight amax over expert-parallel ranks. ModelOpt's calibration calls it.

        ``max_calibrate`` calls it before it merges other amaxes, and itself merges an expert's only
        over data and tensor parallelism. A shared amax covers all experts of the layer.
        """
        amax = self.weight_quantizer.amax
        if amax is not None and amax.numel() == 1 and not self.per_expert:
            assert self.parallel_state is not None
            group = self.parallel_state.expert_model_parallel_group
            self.weight_quantizer.sync_amax_across_distributed_group(group)


def _drop_modelopt_state(module: nn.Module) -> None:
    """Leave ``_extra_state`` to Transformer Engine.

    ModelOpt gives the instance methods that put a pickle of all quantizers there for each expert.
    """
    for name in ("get_extra_state", "set_extra_state"):
        vars(module).pop(name, None)


@contextmanager
def mode_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore, on exit, the model's list of ModelOpt modes, which is mostly empty.

    If the list has a mode, Megatron-LM writes ``modelopt_state/`` (for single chunks only), and on
    resuming builds the model through ModelOpt, which does not know our layers.
    """
    names = (ModeloptStateManager._state_key, ModeloptStateManager._state_version_key)
    before = {name: list(vars(model)[name]) for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)


def _place(module: QuantGroupedLinear) -> Place:
    return Place(
        mpu.get_expert_tensor_parallel_rank(),
        mpu.get_expert_model_parallel_rank(),
        mpu.get_expert_data_parallel_rank(),
        mpu.get_expert_model_parallel_world_size() * module.num_gemms,
    )


@contextmanager
def fusion_kept(model: nn.Module) -> Iterator[None]:
    """Keep layers adding weight gradients to ``main_grad`` after ModelOpt converts them.

    ModelOpt turns that off, because its gradients may be masked. Ours are not: a quantizer's result
    stands in for the weight, ``main_grad`` and flags included. A failed conversion keeps it on too.
    """
    fused: list[Any] = [m for m in model.modules() if getattr(m, "fuse_wgrad_accumulation", False)]
    for module in fused:
        module.fuse_wgrad_accumulation = False  # or ModelOpt warns
    try:
        yield
    finally:
        for module in fused:
            module.fuse_wgrad_accumulation = True
            quantizer = getattr(module, "weight_quantizer", None)
            if quantizer is not None and not isinstance(module, QuantGroupedLinear):
                quantizer.register_forward_hook(follow)


def refuse_fp8(module: nn.Module, args: object) -> None:
    """Raise QuantError within Transformer Engine's fp8 autocast; a forward pre-hook."""
    if FP8GlobalStateManager.is_fp8_enabled():
        raise QuantError(
            f"a quantized {type(module).__name__} was called within Transformer Engine's fp8 "
            "autocast, which rounds its quantizers' results again: train without fp8 (--fp8-format"
            ", TransformerConfig.fp8, te.autocast), or without quantizers"
        )


_RECORDED = (
    "a CUDA graph repeats one recorded forward, so quantizers could neither go from calibration to "
    "fake quant nor take new ranges"
)


def refuse_capture(module: nn.Module, args: object) -> None:
    """Raise QuantError while the stream records a CUDA graph; a forward pre-hook."""
    if torch.cuda.is_current_stream_capturing():
        raise QuantError(
            f"a quantized {type(module).__name__} was called while a CUDA graph was recorded: "
            f"{_RECORDED}; run it without graphs"
        )


def refuse_cuda_graphs(model: nn.Module) -> None:
    """Raise QuantError if Megatron's configuration asks for CUDA graphs."""
    config = getattr(model, "config", None)
    asked = getattr(config, "cuda_graph_impl", "none")
    if asked not in (None, "none"):
        raise QuantError(
            f"cuda_graph_impl={asked!r} cannot be used with quantizers: {_RECORDED}; set it to "
            "'none' (Megatron-LM: leave --cuda-graph-impl out)"
        )


def _check_options(module: Any) -> None:
    if module.wgrad_store.delay_wgrad_compute():
        raise QuantError(
            "delay_wgrad_compute=True gives a quantized grouped linear no weight gradients: "
            "set it to False in the TransformerConfig"
        )
    if getattr(module, "single_grouped_weight", False):
        raise QuantError(
            "single_grouped_weight=True gives a grouped linear one weight for all experts, not one "
            "each: build the model without it"
        )


class Column(_QuantTEGroupedLinear):
    """A linear whose shards are rows of the weight [N, K]."""

    _is_column_parallel = True


class Row(_QuantTEGroupedLinear):
    """A linear whose shards are columns of the weight [N, K]."""

    _is_row_parallel = True


def attention() -> type[QuantModule]:
    """Make ModelOpt's quantized attention save its sinks whole in a distributed checkpoint.

    The base is the registry's present class, so call it before that entry is replaced.
    """
    modelopts: Any = QuantModuleRegistry[TEDotProductAttention].__bases__[0]

    class _Attention(modelopts):
        def sharded_state_dict(
            self,
            prefix: str = "",
            sharded_offsets: tuple[tuple[int, int, int], ...] = (),
            metadata: dict[str, Any] | None = None,
        ) -> dict[str, Any]:
            """Return Megatron's own state if heads have sinks: ModelOpt's saves a shard as all."""
            owner = modelopts
            if self.config.softmax_type == "learnable":
                owner, metadata = TEDotProductAttention, ensure_metadata_has_dp_cp_group(metadata)
            state: dict[str, Any]
            state = owner.sharded_state_dict(self, prefix, sharded_offsets, metadata)
            return state

    return _Attention
