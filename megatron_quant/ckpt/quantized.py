"""A Hugging Face checkpoint with its weights decoded, read with safetensors alone."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from megatron_quant.ckpt.dialects import DIALECTS
from megatron_quant.ckpt.dialects.base import INPUT_SCALE, Dialect, ModuleFormat, Stored
from megatron_quant.ckpt.reader import Checkpoint, open_directory
from megatron_quant.errors import CheckpointError
from megatron_quant.formats import decode
from megatron_quant.models.spec import Box

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""In which a tensor that is not quantized may be stored."""


class QuantizedCheckpoint:
    """A checkpoint directory; plain ones are read as well.

    modules: what the checkpoint's own config says of each quantized module (Hugging Face name).
    dialect: the convention that it is in; None where nothing is quantized.

    Iterating yields the tensor names of the unquantized model. Tensors are read when asked for,
    one at a time.
    """

    def __init__(self, directory: Path):
        """Read the config and the headers of ``directory``.

        Raises CheckpointError where a file is missing or broken, or the config is not known.
        """
        files = open_directory(directory)
        weights = [n.rpartition(".") for n, t in files.tensors.items() if len(t.shape) == 2]
        modules = [module for module, _, leaf in weights if leaf in ("weight", "weight_packed")]
        self._open(files, modules)

    @classmethod
    def over(cls, files: Checkpoint, modules: Iterable[str]) -> "QuantizedCheckpoint":
        """The checkpoint in ``files``, of whose ``modules`` the config says which are quantized.

        For verification: their tensors may be missing or malformed.
        """
        checkpoint = cls.__new__(cls)
        checkpoint._open(files, modules)
        return checkpoint

    def _open(self, files: Checkpoint, modules: Iterable[str]) -> None:
        self.directory = files.path
        self.config = files.config
        self.tensors = files.tensors
        self.dialect, self.modules = _read_config(files, tuple(modules))
        self._files = files

    def stored(self, module: str) -> tuple[Stored, ...]:
        """The tensors that a quantized module should have on disk."""
        assert self.dialect is not None
        fmt = self.modules[module]
        return self.dialect.stored(fmt.weights, fmt.inputs)

    def __iter__(self) -> Iterator[str]:
        for name in self.tensors:
            module, _, suffix = name.rpartition(".")
            suffixes = [s.suffix for s in self.stored(module)] if module in self.modules else []
            if suffix not in suffixes:
                yield name
            elif suffix == suffixes[0]:
                yield f"{module}.weight"

    def raw(self, name: str) -> torch.Tensor:
        """A tensor as it is stored. Raises CheckpointError where there is none of that name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory}: no tensor {name}")
        shape = self.tensors[name].shape
        return self._files.read(name, Box((0,) * len(shape), shape))

    def weight(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor that the unquantized model calls ``name``, decoded, in ``dtype``.

        Raises CheckpointError where one of its stored tensors is missing, or has a companion that
        this library does not know (such as a scale of the inputs folded into the weight).
        """
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self.modules:
            return self._plain(name).to(dtype)
        self._refuse_companions(module)
        weights = self.modules[module].weights
        known = {field.name for field in weights.fields}
        parts = {s: self.raw(f"{module}.{s.suffix}") for s in self.stored(module)}
        self._check_parts(module, parts)
        fields = {s.field: s.from_disk(part) for s, part in parts.items() if s.field in known}
        return decode(fields, weights, dtype)

    def input_scale(self, module: str) -> float | None:
        """Tensor scale of a module's inputs (multiply to dequantize); None where it has none."""
        if module not in self.modules:
            return None
        for stored in self.stored(module):
            if stored.field == INPUT_SCALE:
                return stored.from_disk(self.raw(f"{module}.{stored.suffix}")).item()
        return None

    def _plain(self, name: str) -> torch.Tensor:
        tensor = self.raw(name)
        if tensor.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                f"{self.directory}: {name} is {tensor.dtype}, but its quantization_config "
                "does not say that it is quantized"
            )
        return tensor

    def _check_parts(self, module: str, parts: dict[Stored, torch.Tensor]) -> None:
        """Raise CheckpointError unless the tensors of a module fit one another and its format."""
        elements, first = next(iter(parts.items()))
        blocks = elements.block if first.dim() == 2 else (0, 0)
        rows, cols = (n * b for n, b in zip(first.shape, blocks, strict=False))
        for stored, part in parts.items():
            wanted = stored.dtype, stored.shape(rows, cols)
            if (part.dtype, tuple(part.shape)) != wanted:
                raise CheckpointError(
                    f"{self.directory}: {module}.{stored.suffix} is {part.dtype} "
                    f"{list(part.shape)}, but the config means {wanted[0]} {list(wanted[1])}"
                )

    def _refuse_companions(self, module: str) -> None:
        for suffix in ("pre_quant_scale", "weight_zero_point", "weight_g_idx"):
            if f"{module}.{suffix}" in self.tensors:
                raise CheckpointError(f"{self.directory}: {module}.{suffix} is not read")


def _read_config(
    files: Checkpoint, modules: tuple[str, ...]
) -> tuple[Dialect | None, dict[str, ModuleFormat]]:
    quantization = files.config.get("quantization_config")
    if quantization is None:
        return None, {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in DIALECTS:
        raise CheckpointError(
            f"{files.path}: quant_method {method!r} in config.json is not read; "
            f"known: {', '.join(DIALECTS)}"
        )
    dialect = DIALECTS[method]
    return dialect, dialect.read_config(quantization, modules)
