"""Read rectangles of quantized weights, decoded, from only the stored cells that they touch.

Groups and blocks count from the first column of the logical tensor. So a slice decodes to the same
slice of the decoded tensor, wherever it begins. If a checkpoint gives each column's group
(``g_idx``, GPTQ's activation order) and columns are not in their natural order, every column uses
the scale and zero point of its own group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm

import torch
from torch import Tensor

from megatron_quant.ckpt.dialects import (
    INPUT_SCALE,
    SHAPE,
    WEIGHT_SCALE,
    StorageScheme,
    Stored,
    packings,
)
from megatron_quant.ckpt.read.checks import PLAIN_DTYPES, beside
from megatron_quant.ckpt.read.shared_exponents import check_e8m0, is_e8m0
from megatron_quant.ckpt.read.source import TensorInfo, TensorSource
from megatron_quant.errors import CheckpointError
from megatron_quant.formats import Format, decode, lost, lost_between, regrouped
from megatron_quant.models import Box, whole
from megatron_quant.native import WHOLE

GROUP_INDEX = ("g_idx", "weight_g_idx")
"""Suffixes of the tensor with each column's group, int32 [K]: GPTQ's, compressed-tensors'."""
_OF_WEIGHTS = (
    *("qweight", "qzeros", "scales", "weight_packed", "weight_zero_point"),
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"),
)
"""Suffixes of the tensors that dialects store for a weight."""
COLUMN_SCALE = "pre_quant_scale"
"""Suffix of the factors on a module's inputs, [K]: ModelOpt's AWQ and SmoothQuant. Multiplying the
weight's columns by them gives the same products with plain inputs."""
_SCALAR = (WHOLE, WHOLE)
_WEIGHT_SHAPE = "weight_shape"
_INTEGERS = (torch.int32, torch.int64)
_Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The quantized weight of ``module`` in the files of a checkpoint.

    fmt: its format. stored: its tensors, as the dialect stores them; tensors of activations, and
    those that follow from the shape, are not read. shape: [N, K] of the weight.
    """

    files: TensorSource
    module: str
    fmt: Format
    stored: tuple[Stored, ...]
    shape: tuple[int, int]

    def read(self, box: Box) -> Tensor:
        """Read the rectangle ``box`` of the weight, fp32.

        Raises CheckpointError if the stored tensors do not fit the module's format.
        """
        outer = self._aligned(box)
        fields, fmt = self.fields(outer), self.fmt
        if self.group_of_column is not None:
            fields, fmt = self._per_column(fields, outer), regrouped(fmt, 1)
        w_NK = decode(fields, fmt, torch.float32, (outer.start[0], outer.start[1]))
        inner = zip(box.start, outer.start, box.size, strict=True)
        found = w_NK[tuple(slice(a - o, a - o + n) for a, o, n in inner)]
        scale_K = self.column_scale
        return found if scale_K is None else found * scale_K[box.index[1]]

    @cached_property
    def column_scale(self) -> Tensor | None:
        """Return the factors on the inputs, fp32 [K]; None where they are plain.

        Raises CheckpointError if they are no finite numbers of that many.
        """
        name = f"{self.module}.{COLUMN_SCALE}"
        info = self.files.info(name)
        if info is None:
            return None
        fits = info.shape == self.shape[1:] and info.dtype in PLAIN_DTYPES
        found = self.files.read(name, whole(info.shape)).float() if fits else None
        if found is None or not bool(found.isfinite().all()):
            raise CheckpointError(
                f"{self.files.path}: {name} is {info.dtype} {list(info.shape)}, not "
                f"{self.shape[1]} finite factors; fetch the checkpoint again"
            )
        return found

    def lost(self, w_NK: Tensor, box: Box) -> tuple[float, float]:
        """Return (sum of w^2, sum of (w - decoded)^2) in fp64; ``w_NK`` is the original of ``box``.

        They equal those of ``lost_between`` with the result of :meth:`read`; it raises the same.
        """
        cut = box.size != self.shape and self._aligned(box) != box
        padded = box.size[1] % self.fmt.fields[0].block[1]
        plain = self.group_of_column is None and self.column_scale is None
        if cut or padded or not plain:
            return lost_between(w_NK, self.read(box))
        return lost(w_NK, self.fields(box), self.fmt, (box.start[0], box.start[1]))

    def fields(self, box: Box) -> dict[str, Tensor]:
        """Read the codec's fields of the blocks that ``box`` touches.

        ``box`` must split no packed element. If the columns are not in their natural order, the
        scales are those of all groups.
        """
        return {s.field: self._field(s, box) for s in self._coded}

    def scales(self, box: Box) -> dict[str, Tensor]:
        """Read the codec's fields, without elements, of all blocks that ``box`` touches."""
        outer = self._aligned(box)
        assert self.group_of_column is None, self.module
        found = {}
        for stored in self.stored:
            field = next((f for f in self.fmt.fields[1:] if f.name == stored.field), None)
            if field is None:
                continue
            value = self._field(stored, outer)
            if field.block != _SCALAR:
                extents = zip(
                    box.start, box.size, outer.start, field.block, self.shape, strict=True
                )
                value = value[tuple(_within(*extent) for extent in extents)]
            found[field.name] = value
        return found

    @cached_property
    def group_of_column(self) -> Tensor | None:
        """Return each column's group, int64 [K]; None if they are in their natural order."""
        names = (f"{self.module}.{suffix}" for suffix in GROUP_INDEX)
        name = next((name for name in names if self.files.info(name) is not None), "")
        if not name or not self.fmt.group_sizes:
            return None
        cols = self.shape[1]
        size = self.fmt.group_size if self.fmt.group_size > 0 else cols
        found = self.files.read(name, Box((0,), (cols,))).long()
        count = -(-cols // size)
        low, high = (int(end) for end in torch.aminmax(found))
        if low < 0 or high >= count:
            raise CheckpointError(
                f"{self.files.path}: {name} holds {low if low < 0 else high}, but the weight has "
                f"groups 0 to {count - 1}; fetch the checkpoint again"
            )
        natural = torch.arange(cols) // size
        return None if torch.equal(found, natural) else found

    def whole(self) -> Tensor:
        """Read all of the weight, fp32 [N, K]."""
        return self.read(whole(self.shape))

    @cached_property
    def _coded(self) -> tuple[Stored, ...]:
        """Return the tensors of the codec's fields; CheckpointError for wrong constants."""
        self._check_constants()
        names = {field.name for field in self.fmt.fields}
        return tuple(s for s in self.stored if s.field in names)

    @cached_property
    def _steps(self) -> tuple[int, int]:
        """Return the multiples of rows and columns that packing keeps together."""
        steps = (1, 1)
        for _, packing in packings(StorageScheme(self.stored, self.fmt), self.shape):
            steps = (lcm(steps[0], packing[0]), lcm(steps[1], packing[1]))
        return steps

    def _aligned(self, box: Box) -> Box:
        """Return the smallest rectangle around ``box`` that splits nothing packed together."""
        spans = [
            (o // b * b, min(-(-(o + n) // b) * b, length))
            for o, n, b, length in zip(box.start, box.size, self._steps, self.shape, strict=True)
        ]
        return Box(tuple(a for a, _ in spans), tuple(e - a for a, e in spans))

    def _field(self, stored: Stored, box: Box) -> Tensor:
        name = f"{self.module}.{stored.suffix}"
        info = _info(self.files, name)
        if stored.block == _SCALAR:
            value = self._numbers(stored, name, self.files.read(name, whole(info.shape)))
            return stored.from_disk(value.float().reshape(stored.scalar_shape))
        extents = zip(box.start, box.size, stored.block, self.shape, strict=True)
        rows, cols = (_cells(o, n, b or length) for o, n, b, length in extents)
        if self.group_of_column is not None and stored.field != self.fmt.fields[0].name:
            cols = _cells(0, self.shape[1], stored.block[1] or self.shape[1])
        where = Box(
            stored.on_disk((rows[0], cols[0]), 0),
            stored.on_disk((rows[1] - rows[0], cols[1] - cols[0]), 1),
        )
        return stored.from_disk(self._numbers(stored, name, self.files.read(name, where)))

    def _numbers(self, stored: Stored, name: str, part: Tensor) -> Tensor:
        """Return ``part`` as its field holds it: E8M0 as codes, or as fp32 if that is stored."""
        if not is_e8m0(part, self.fmt, stored.field):
            return part
        check_e8m0(self.files.path, name, part)
        as_float = stored.dtype.is_floating_point and stored.dtype != part.dtype
        return part.float() if as_float else part.view(torch.uint8)

    def _per_column(self, fields: Mapping[str, Tensor], box: Box) -> dict[str, Tensor]:
        elements = self.fmt.fields[0].name
        assert self.group_of_column is not None
        packed, (first, size) = self.fmt.fields[0].block[1], (box.start[1], box.size[1])
        columns = torch.arange(first, first - -size // packed * packed)  # whole words
        own = self.group_of_column[columns.clamp(max=self.shape[1] - 1)]
        return {n: f if n == elements else f.index_select(1, own) for n, f in fields.items()}

    def _check_constants(self) -> None:
        """Raise CheckpointError unless the tensors that follow from the shape are right.

        They are the zero points of symmetric weights. Other values would mean another format.
        """
        for stored in self.stored:
            name = f"{self.module}.{stored.suffix}"
            if stored.field != SHAPE or stored.suffix in GROUP_INDEX:
                continue
            if stored.optional and self.files.info(name) is None:
                continue
            info = _info(self.files, name)
            found = self.files.read(name, whole(info.shape))
            if not torch.equal(found, stored.constant(*self.shape).to(found.dtype)):
                raise CheckpointError(
                    f"{self.files.path}: {name} does not fit the config and the shape "
                    f"{list(self.shape)} of a {self.fmt.name} weight; correct sym, bits or "
                    "checkpoint_format in quantization_config, or fetch the checkpoint again"
                )


def open_packed(
    files: TensorSource, module: str, fmt: Format, stored: tuple[Stored, ...]
) -> Packed:
    """Open the weight of ``module``, and check that all its tensors fit ``fmt``.

    It reads headers, and tensors that follow from the shape. Raises CheckpointError for the first
    tensor that is missing, or that contradicts the format or the others.
    """
    own = tuple(s for s in stored if s.field not in (INPUT_SCALE, WEIGHT_SCALE))
    for s in own:
        if not s.optional and files.info(f"{module}.{s.suffix}") is None:
            raise CheckpointError(_missing(files, module, s, fmt, own))
    shape = _shape(files, module, own)
    for s in own:
        _check_form(files, f"{module}.{s.suffix}", s, fmt, shape)
    for suffix in GROUP_INDEX:
        info = files.info(f"{module}.{suffix}")
        if info is not None and (info.shape != shape[1:] or info.dtype not in _INTEGERS):
            raise CheckpointError(
                f"{files.path}: {module}.{suffix} is {info.dtype} {list(info.shape)}, but the "
                f"weight has {shape[1]} columns; fetch the checkpoint again"
            )
    return Packed(files=files, module=module, fmt=fmt, stored=own, shape=shape)


def _info(files: TensorSource, name: str) -> TensorInfo:
    """Return what is known of a tensor that is there."""
    info = files.info(name)
    assert info is not None, name
    return info


def _missing(
    files: TensorSource, module: str, lacked: Stored, fmt: Format, stored: tuple[Stored, ...]
) -> str:
    """Describe a missing tensor, and the tensors that are there instead."""
    said = (
        f"{files.path}: no tensor {module}.{lacked.suffix}, though config.json says that "
        f"{module} is {fmt.name}"
    )
    plain = files.info(f"{module}.weight")
    if plain is not None and plain.dtype in PLAIN_DTYPES:
        return f"{said}: its weight is plain ({plain.dtype}); list it as not quantized"
    suffixes = {s.suffix for s in stored}
    found = {name.rpartition(".")[2] for name in beside(files, module)}
    others = sorted(found.intersection(_OF_WEIGHTS) - suffixes)
    if others:
        return f"{said}: it has {', '.join(others)}; correct quantization_config"
    return f"{said}; fetch the checkpoint again"


def _shape(files: TensorSource, module: str, stored: tuple[Stored, ...]) -> tuple[int, int]:
    """Return [N, K], as stored if it is stored: columns may fill their last word in part."""
    elements = stored[0]
    on_disk = _info(files, f"{module}.{elements.suffix}").shape
    if len(on_disk) != 2:
        raise CheckpointError(
            f"{files.path}: {module}.{elements.suffix} has shape {list(on_disk)}, not two dims; "
            "fetch the checkpoint again"
        )
    rows, cols = elements.weight_shape(on_disk)
    name = f"{module}.{_WEIGHT_SHAPE}"
    info = files.info(name)
    if info is None or info.shape != (2,):
        return rows, cols
    found = files.read(name, Box((0,), (2,))).tolist()
    fits = elements.shape(*found) == on_disk if min(found) > 0 else False
    return (found[0], found[1]) if fits else (rows, cols)


def _check_form(
    files: TensorSource, name: str, stored: Stored, fmt: Format, shape: tuple[int, int]
) -> None:
    info = files.info(name)
    if info is None:
        return
    if not stored.fits(info.dtype, info.shape, shape):
        groups = f" in groups of {fmt.group_size}" if fmt.group_size > 1 else ""
        raise CheckpointError(
            f"{files.path}: {name} is {info.dtype} {list(info.shape)}, but the config means "
            f"{stored.dtype} {list(stored.shape(*shape))} for a {fmt.name} weight "
            f"{list(shape)}{groups}; "
            "correct quantization_config"
        )


def _cells(start: int, size: int, block: int) -> _Span:
    return start // block, -(-(start + size) // block)


def _within(start: int, size: int, outer: int, block: int, length: int) -> slice:
    """Return the blocks that ``size`` elements from ``start`` on touch, counted from ``outer``."""
    first, stop = _cells(start, size, block or length)
    skipped = outer // (block or length)
    return slice(first - skipped, stop - skipped)


def with_scale_dtype(fmt: Format, dtype: torch.dtype) -> Format:
    """Return ``fmt`` with its group scales in ``dtype``."""
    fields = (f.in_dtype(dtype) if f.name == "scale" else f for f in fmt.fields)
    return replace(fmt, fields=tuple(fields))
