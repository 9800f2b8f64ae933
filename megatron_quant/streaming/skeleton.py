"""transformers' model without its weights: any part of it gets them for as long as it runs.

Nothing here knows how transformers names or fuses what a checkpoint holds. The tensors of a part go
through the conversion and the initialization that ``from_pretrained`` gives to those of a model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from megatron_quant.ckpt.read import Weights, stacked
from megatron_quant.errors import ArchitectureError, CheckpointError
from megatron_quant.models import decoder_of, idle_experts, unstack, whole
from megatron_quant.streaming.model import WITHOUT, one_line, quiet
from megatron_quant.transformers_config import transformers_config


class CannotWalk(Exception):
    """A model cannot be run layer by layer; the message says why."""


@dataclass(frozen=True)
class Headed:
    """A model with its output layer, in place of the base model.

    Attributes:
        model: It, on the meta device.
        module: The output layer's name in the checkpoint; empty where it has none.
        weight: The output layer, [V, K], where it lies outside of the checkpoint.
    """

    model: PreTrainedModel
    module: str = ""
    weight: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """Return the name of the output layer's weight in the model."""
        layer = self.model.get_output_embeddings()
        return next(f"{n}.weight" for n, m in self.model.named_modules() if m is layer)


class Skeleton:
    """A model on the meta device; buffers that no checkpoint stores are real.

    Attributes:
        model: The model, in evaluation mode.
        prefix: Prefix of the text decoder's names in it.
        layers: Its decoder layers, in their order.
    """

    def __init__(self, source: Weights, dtype: torch.dtype, headed: Headed | None = None) -> None:
        """Build the model of the config.

        Args:
            source: The checkpoint, by the names that transformers loads.
            dtype: Dtype of the model.
            headed: The model; None for the base model, which has no output layer.

        Raises:
            CannotWalk: Where this release of transformers cannot do that.
            CheckpointError: Where it has no class for the model.
        """
        self._source, self._dtype, self._headed = source, dtype, headed
        config = transformers_config(source.path, source.config, WITHOUT)
        vars(config).pop("quantization_config", None)  # the weights are read decoded
        try:
            # Here: where this release of transformers lacks it, models are loaded whole.
            from megatron_quant.streaming.part_loading import make_buffers

            self.model = headed.model if headed else _base(config, dtype)
            make_buffers(self.model, dtype)
            parameters = {n: tuple(p.shape) for n, p in self.model.named_parameters()}
            self.prefix = decoder_of(parameters)
            self.layers: list[nn.Module] = list(self._list())
            self._own = decoder_of({n: i.shape for n, i in source.dense().items()})
        except Exception as e:  # transformers raises whatever a model's code does
            raise CannotWalk(one_line(e)) from e

    def _list(self) -> nn.ModuleList:
        found = self.model.get_submodule(f"{self.prefix}layers")
        assert isinstance(found, nn.ModuleList), type(found)
        return found

    def put(self, layers: list[nn.Module]) -> None:
        """Have the model's forward run ``layers`` in place of its own."""
        at = self.prefix.removesuffix(".")
        self.model.get_submodule(at).register_module("layers", nn.ModuleList(layers))

    def fill_layer(self, index: int, source: Weights | None = None) -> None:
        """Load the weights of a decoder layer.

        Args:
            index: Its number.
            source: Where they come from, by any names of the checkpoint's; the checkpoint if None.

        Raises:
            CheckpointError: For one that is missing or has another shape.
        """
        given = source or self._source
        found = {name: self._read(given, name) for name in self.names(given, index)}
        idle = idle_experts(given.config, found)
        self._load(found | {name: torch.zeros_like(found[like]) for name, like in idle.items()})
        missing = self._missing(index)
        if missing:
            self._load(self._stacks(given, index, missing))
            missing = self._missing(index)
        if missing:
            raise CheckpointError(
                f"{self._source.path} has nothing for {self.prefix}layers.{index}.{min(missing)} "
                f"of transformers' model ({len(missing)} such); fetch the checkpoint again, or "
                "pass --weight-only"
            )

    def _missing(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's tensors that are not loaded, by their names in it."""
        layer = self.layers[index]
        stored = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        return {name: tuple(t.shape) for name, t in stored.items() if t.device.type == "meta"}

    def _stacks(
        self, source: Weights, index: int, missing: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """Return stacks of experts of which the source has the single ones, as packed ones do."""
        shapes = {f"{self._own}layers.{index}.{name}": shape for name, shape in missing.items()}
        try:
            views = unstack(source.config, shapes)
        except ArchitectureError:
            return {}
        whole_ones = views.keys() <= set(source)
        return stacked(views, shapes, partial(self._read, source)) if whole_ones else {}

    def fill_rest(self) -> None:
        """Load the weights of the text decoder outside of its layers, its output layer included."""
        tensors = {n: self._read(self._source, n) for n in self.names(self._source, None)}
        if self._headed is not None and self._headed.weight is not None:
            tensors[self._headed.name] = self._headed.weight
        self._load(tensors)
        head = self.model.get_output_embeddings()
        if head is not None and head.weight.device.type == "meta":
            self.model.tie_weights(recompute_mapping=False)

    def empty(self) -> None:
        """Give up every weight that is loaded."""
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if tensor.device.type == "meta":
                continue
            at, _, leaf = name.rpartition(".")
            module, meta = self.model.get_submodule(at), torch.empty_like(tensor, device="meta")
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(leaf, nn.Parameter(meta, requires_grad=False))
            else:
                module.register_buffer(leaf, meta)

    def names(self, source: Weights, layer: int | None) -> Iterator[str]:
        """Yield the tensors of a layer by their names in ``source``; of the rest where None."""
        at = f"{self._own}layers."
        head = f"{self._headed.module}." if self._headed and self._headed.module else None
        for name in source:
            if layer is not None:
                if name.startswith(f"{at}{layer}."):
                    yield name
            elif (name.startswith(self._own) and not name.startswith(at)) or (
                head is not None and name.startswith(head)
            ):
                yield name

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        from megatron_quant.streaming.part_loading import load_part

        try:
            odd = load_part(self.model, tensors, self._dtype)
            self.model.requires_grad_(False)
        except Exception as e:  # transformers raises whatever a conversion does
            raise CheckpointError(
                f"{self._source.path}: transformers cannot load the model ({one_line(e)}); pass "
                "--weight-only"
            ) from e
        for name, found, wanted in odd:
            raise CheckpointError(
                f"{self._source.path}: {name} is {list(found)}, transformers' model has "
                f"{list(wanted)}; fetch the checkpoint again, or pass --weight-only"
            )

    def _read(self, source: Weights, name: str) -> torch.Tensor:
        info = source.info(name)
        assert info is not None, name
        found = source.read(name, whole(info.shape))
        return found.to(self._dtype) if info.decoded else found


def _base(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the base model on the meta device."""
    with quiet(), torch.device("meta"):
        model: PreTrainedModel = AutoModel.from_config(
            config, dtype=dtype, trust_remote_code=False, experts_implementation="eager"
        ).eval()
    return model
