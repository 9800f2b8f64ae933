"""Factors that were moved, and a tensor's values with them."""

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_quant.errors import CheckpointError
from megatron_quant.fields import Fields
from megatron_quant.models import Box

DOCUMENT = "megatron_quant_folding.json"
"""File of an export that has the factors, so that it can be compared with its source."""
_TABLES = ("values", "rows", "columns")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Key of vectors in the document -> dtype in which they are there; most factors fit the first."""


@dataclass(frozen=True)
class Fold:
    """The factors in a model's tensors, by their Hugging Face names.

    Attributes:
        vectors: Factors, or values of a norm, fp32 [K], by a name of their own.
        values: Norm -> the vector that takes its place.
        rows: Tensor -> the vector whose elements divide its rows, or its elements.
        columns: Tensor -> the vector whose elements multiply its columns.
    """

    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)

    def changes(self, name: str) -> bool:
        """Return whether the tensor of this name has other values."""
        return name in self.values or name in self.rows or name in self.columns

    def apply(self, name: str, box: Box, part: Tensor) -> Tensor:
        """Return the part ``box`` of tensor ``name``, given as the source has it, in its dtype."""
        if name in self.values:
            return self._part(self.values[name], box, 0, part).to(part.dtype).view(part.shape)
        if not self.changes(name):
            return part
        folded = part.float()
        if name in self.columns:
            folded = folded * self._part(self.columns[name], box, 1, part)
        if name in self.rows:
            factors = self._part(self.rows[name], box, 0, part)
            folded = folded / factors.view(-1, *(1 for _ in box.size[1:]))
        return folded.to(part.dtype)

    def needs(self) -> Iterator[tuple[str, int, int]]:
        """Yield tensor, dim and the length that its vector has, of every change."""
        for table, dim in ((self.values, 0), (self.rows, 0), (self.columns, 1)):
            yield from ((name, dim, len(self.vectors[vector])) for name, vector in table.items())

    def _part(self, vector: str, box: Box, dim: int, like: Tensor) -> Tensor:
        return self.vectors[vector][box.index[dim]].to(like.device)

    def inputs(self, name: str) -> Tensor | None:
        """Return the factors by which the inputs of weight ``name`` are divided; None if none."""
        return self.vectors[self.columns[name]] if name in self.columns else None

    def document(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""
        document: dict[str, dict[str, str]] = {"bf16": {}, "fp32": {}}
        for name, vector in sorted(self.vectors.items()):
            dtype = "bf16" if torch.equal(vector.bfloat16().float(), vector) else "fp32"
            document[dtype][name] = _encoded(vector, _DTYPES[dtype])
        return document | {table: dict(sorted(vars(self)[table].items())) for table in _TABLES}


def joined(folds: Sequence[Fold]) -> Fold:
    """Put the folds of several processes together."""
    found: dict[str, dict[str, Any]] = {name: {} for name in ("vectors", *_TABLES)}
    for fold in folds:
        for name, table in found.items():
            table.update(vars(fold)[name])
    return Fold(**found)


def parse_fold(document: Mapping[str, Any], where: str) -> Fold:
    """Return the fold of which :meth:`Fold.document` made ``document``.

    Raises:
        CheckpointError: For anything else; ``where`` begins the message.
    """
    top = Fields(document, where)
    tables = {table: _names(top.part(table)) for table in _TABLES}
    vectors = {
        name: _decoded(text, dtype, f"{where}: vector {name}")
        for key, dtype in _DTYPES.items()
        for name, text in _names(top.part(key)).items()
    }
    for table in tables.values():
        for vector in table.values():
            if vector not in vectors:
                raise CheckpointError(f"{where}: there is no vector {vector}; fetch the file again")
    return Fold(vectors, **tables)


def _names(table: Fields) -> dict[str, str]:
    return {name: table.text(name) for name in table.values}


def _encoded(vector: Tensor, dtype: torch.dtype) -> str:
    data = vector.cpu().to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    return base64.b64encode(data).decode()


def _decoded(text: str, dtype: torch.dtype, where: str) -> Tensor:
    with suppress(binascii.Error, ValueError):
        data = bytearray(base64.b64decode(text, validate=True))
        if data and len(data) % dtype.itemsize == 0:
            vector = torch.frombuffer(data, dtype=dtype).float()
            if bool(vector.isfinite().all()):
                return vector
    raise CheckpointError(f"{where} is no vector of finite numbers; fetch the file again")
