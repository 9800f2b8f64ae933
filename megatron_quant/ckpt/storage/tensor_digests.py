"""Combine digests of the boxes that ranks write into digests of whole file tensors."""

from collections.abc import Iterable, Mapping

from megatron_quant.ckpt.storage.box_bytes import is_of_leaves
from megatron_quant.ckpt.storage.safetensors_header import TensorEntry
from megatron_quant.ckpt.storage.tree_digest import DIGEST_BYTES, Hashed, count_leaves, root
from megatron_quant.models import Box

Written = tuple[TensorEntry, Box, Hashed]
"""A box of a file tensor that is on disk."""


class TensorDigests:
    """The known digests of each tensor. A box that is not made of whole leaves tells nothing.

    Attributes:
        complete: Digests by name.
        some: Leaves of tensors that are not complete.
    """

    def __init__(self) -> None:
        self.complete: dict[str, str] = {}
        self.some: dict[str, list[Hashed]] = {}

    def add(self, written: Iterable[Written]) -> None:
        """Add boxes, each of them once."""
        for entry, box, found in written:
            if box.size == entry.shape:
                self.complete[entry.name] = found.digest
            elif is_of_leaves(entry, box):
                self._add_leaves(entry, [found])

    def merge(self, other: "TensorDigests", entries: Mapping[str, TensorEntry]) -> None:
        """Add the digests that another rank knows.

        Args:
            other: Digests of that rank.
            entries: All tensors, by name.
        """
        self.complete |= other.complete
        for name, found in other.some.items():
            self._add_leaves(entries[name], found)

    def _add_leaves(self, entry: TensorEntry, found: list[Hashed]) -> None:
        known = self.some.setdefault(entry.name, [])
        known += found
        if sum(len(some.leaves) for some in known) == DIGEST_BYTES * count_leaves(entry.nbytes):
            ordered = sorted(self.some.pop(entry.name), key=lambda some: some.first)
            self.complete[entry.name] = root(b"".join(some.leaves for some in ordered))
