"""Fill a Megatron model from a Hugging Face checkpoint. Every rank reads the slices it owns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn

from megatron_quant.ckpt.plan import Layout
from megatron_quant.ckpt.read import TensorSource, Weights, fill
from megatron_quant.dist import Groups, gather, together
from megatron_quant.errors import ArchitectureError, CheckpointError
from megatron_quant.formats import amax
from megatron_quant.mcore.model.build import build_model
from megatron_quant.mcore.model.check import check_model, check_place
from megatron_quant.mcore.model.drafts import live_drafts
from megatron_quant.mcore.model.locate import LAYER, VOCABULARY, LocalParam, local_params
from megatron_quant.mcore.model.parallel import megatron_layout, shards, start_megatron
from megatron_quant.mcore.model.settings import check_settings
from megatron_quant.models import (
    Architecture,
    Copy,
    Param,
    Role,
    copies,
    num_experts,
    num_layers,
    padded_vocab,
)


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """A live Megatron model with the meaning of its parameters.

    chunks: this rank's part, as Megatron's schedules take it: one GPTModel, or one for each virtual
    pipeline stage. params: the logical parameters of the whole model; local: this rank's shards of
    them.
    """

    chunks: tuple[GPTModel, ...]
    params: tuple[Param, ...]
    local: tuple[LocalParam, ...]
    layout: Layout
    groups: Groups

    @property
    def module(self) -> GPTModel:
        """Return the only chunk of a rank without virtual stages."""
        (module,) = self.chunks
        return module

    def tensor(self, local: LocalParam) -> torch.Tensor:
        """Return the live parameter of one of ``local``."""
        return local.tensor(self.chunks[local.chunk])

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of its linear weights, which unquantized tensors of exports get too."""
        linear = next(local for local in self.local if local.param.role is Role.LINEAR)
        return self.tensor(linear).dtype

    def global_name(self, chunk: int, name: str) -> str:
        """Return a chunk's ``name`` with the layer's number in the whole model.

        Experts keep their numbers on this rank.
        """
        if not self.layout.stages:
            return name
        held = self.layout.stages[self.layout.coords[self.groups.rank].pp][chunk]
        return LAYER.sub(lambda match: str(held[int(match[0])]), name, count=1)


def wrap_model(
    module: nn.Module | Sequence[nn.Module],
    architecture: Architecture,
    hf_config: Mapping[str, Any],
    groups: Groups,
) -> LiveModel:
    """Wrap a GPTModel that lives in Megatron's present process groups.

    module: this rank's part; with virtual pipeline stages, its chunks in order. Wrappers
    (Float16Module, DistributedDataParallel) are looked through.

    Collective. Raises ArchitectureError, on every rank alike and before anything is changed, if
    the model's settings, layers, parameters or shapes are not the config's. The vocabulary may be
    padded to any number of rows.
    """
    given = (module,) if isinstance(module, nn.Module) else tuple(module)

    def understood() -> tuple[tuple[GPTModel, ...], tuple[Param, ...]]:
        described = architecture.megatron_config(hf_config)
        chunks = tuple(_checked(chunk, described) for chunk in given)
        count = live_drafts(chunks[0].config, architecture, hf_config)
        return chunks, architecture.with_drafts(hf_config, count)

    chunks, params = together(groups, understood)
    layout = megatron_layout(groups, num_experts(params), chunks)
    together(groups, lambda: check_place(chunks, layout, num_layers(params)))
    params = _padded(params, chunks, layout, groups)
    local = together(groups, lambda: local_params(params, layout, groups.rank))
    together(groups, lambda: check_model(chunks, local))
    return LiveModel(
        chunks=chunks,
        params=params,
        local=tuple(local),
        layout=layout,
        groups=replace(groups, shards=shards(groups.device)),
    )


def _checked(wrapped: nn.Module, described: Mapping[str, Any]) -> GPTModel:
    chunk = _unwrapped(wrapped)
    check_settings(chunk.config, described)
    return chunk


def _unwrapped(chunk: nn.Module) -> GPTModel:
    while not isinstance(chunk, GPTModel):
        inner = getattr(chunk, "module", None)
        if not isinstance(inner, nn.Module):
            raise ArchitectureError(
                f"{type(chunk).__name__} is no GPTModel of megatron-core and wraps none: give the "
                "language model alone"
            )
        chunk = inner
    return chunk


def _padded(
    params: tuple[Param, ...], chunks: Sequence[GPTModel], layout: Layout, groups: Groups
) -> tuple[Param, ...]:
    """Pad the vocabularies of ``params`` to as many rows as the live model has. Collective."""
    named = [dict(chunk.named_parameters()) for chunk in chunks]
    own = {len(held[name]) for held in named for name in VOCABULARY if name in held}
    found = sorted({rows * layout.tp_size for of_rank in gather(own, groups) for rows in of_rank})
    vocab = next(p.shape[0] for p in params if p.role is Role.EMBEDDING)
    if len(found) != 1 or found[0] < vocab:
        raise ArchitectureError(
            f"the Megatron model's vocabulary has {' or '.join(map(str, found))} rows, padding "
            f"included, but config.json has a vocab_size of {vocab}: give the config.json of this "
            "very model"
        )
    if found[0] == padded_vocab(vocab, layout.tp_size):
        return params
    ends = (Role.EMBEDDING, Role.OUTPUT)
    return tuple(replace(p, padded=found[0]) if p.role in ends else p for p in params)


def empty_model(
    architecture: Architecture,
    hf_config: Mapping[str, Any],
    layout: Layout,
    groups: Groups,
    dtype: torch.dtype,
    mtp: int = 0,
) -> LiveModel:
    """Build the model at ``layout``, with weights not yet filled. Collective.

    mtp: layers for speculation.
    """
    start_megatron(layout, groups.minutes)
    build = partial(build_model, architecture, hf_config, layout, dtype, mtp)
    # with several stages, Megatron's talk to one another while they are built
    chunks = together(groups, build) if layout.pp_size == 1 else build()
    return wrap_model(chunks, architecture, hf_config, groups)


def load_model(
    checkpoint: Weights,
    architecture: Architecture,
    layout: Layout,
    groups: Groups,
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> LiveModel:
    """Build the model at ``layout`` and fill it. Collective.

    progress: called with 1 for each parameter that this rank has read.
    Raises CheckpointError, on every rank alike, for a weight that is not finite in ``dtype``.
    """
    model = empty_model(architecture, checkpoint.config, layout, groups, dtype)
    fill_model(model, checkpoint, progress)
    return model


def fill_model(
    model: LiveModel, source: TensorSource, progress: Callable[[int], None] = lambda count: None
) -> None:
    """Give a live model the weights of ``source``, each rank its share. Collective.

    progress: called with 1 for each parameter that this rank has read. Raises CheckpointError, on
    every rank alike, for a weight that is not finite in its dtype.
    """
    together(model.groups, lambda: _fill(model, source, progress))


@torch.no_grad()
def _fill(model: LiveModel, checkpoint: TensorSource, progress: Callable[[int], None]) -> None:
    for local in model.local:
        if local.param.copy_of:
            progress(1)
            continue
        tensor = model.tensor(local)
        tensor.zero_()  # padding rows of the vocabulary stay zero
        pieces = copies(local.param, local.shard_rank, local.shard_size)
        fill(tensor, pieces, checkpoint)
        if local.param.shift:
            tensor += local.param.shift
        if not torch.isfinite(amax(tensor)):
            _explain_not_finite(tensor.dtype, pieces, checkpoint)
        progress(1)


def _explain_not_finite(
    dtype: torch.dtype, pieces: Sequence[Copy], checkpoint: TensorSource
) -> NoReturn:
    """Raise CheckpointError for the tensor that gave a parameter NaN or Inf in ``dtype``."""
    for piece in pieces:
        name, stored = piece.source.name, checkpoint.read(piece.source.name, piece.src)
        if not torch.isfinite(amax(stored)):
            raise CheckpointError(
                f"{checkpoint.path}: {name} has NaN or Inf; repair the checkpoint or fetch it again"
            )
        if not torch.isfinite(amax(stored.to(dtype))):
            raise CheckpointError(
                f"{checkpoint.path}: {name} has values beyond {dtype}; choose a wider --dtype"
            )
    raise AssertionError("every piece is finite, their parameter is not")
