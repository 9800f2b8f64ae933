"""Read gpt-oss's stacks of MXFP4 experts by the names of single experts.

Each layer has on disk ``experts.gate_up_proj_blocks`` uint8 [E, 2I, H/32, 16] (two E2M1 codes per
byte, the even column in the low nibble), ``gate_up_proj_scales`` uint8 [E, 2I, H/32] (E8M0) and
``gate_up_proj_bias`` [E, 2I]; and the same for ``down_proj`` with [E, H, I]. Rows of gate_up
alternate: gate, up, gate, up. transformers' ``integrations/mxfp4.py`` decodes them like this.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_quant.ckpt.dialects import BLOCKS, GROUP, SCALES, StackPlace, stack_name, stack_place
from megatron_quant.ckpt.read.checks import PLAIN_DTYPES
from megatron_quant.ckpt.read.directory import Checkpoint
from megatron_quant.ckpt.read.source import Listed, TensorInfo
from megatron_quant.errors import CheckpointError
from megatron_quant.models import Box

_BLOCKS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)_blocks")
_STACK = re.compile(r".*\.experts\.(gate_up_proj|down_proj)_(blocks|scales|bias)")
_BYTES = GROUP // 2
_LINEARS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True, kw_only=True)
class ExpertStacks(Listed):
    """A checkpoint directory whose experts are stacks in MXFP4.

    Its experts' tensors have the names of single ones: ``...experts.3.gate_proj.weight_blocks``
    uint8 [I, H/2], ``.weight_scales`` [I, H/32] and ``.bias`` [I], the same for ``up_proj``, and
    ``down_proj``. All other tensors keep their names. Iterating yields the names.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: Checkpoint

    @property
    def unread(self) -> tuple[str, ...]:
        """Return the files' own unread tensors."""
        return self.files.unread

    @property
    def is_bare(self) -> bool:
        """Return whether the files' names lack ``model.``."""
        return self.files.is_bare

    def read(self, name: str, box: Box) -> Tensor:
        """Read ``box`` of tensor ``name``, in its stored dtype: only what the files have of it."""
        place = stack_place(name)
        if place is None:
            return self.files.read(name, box)
        stored = stack_name(place.stack, place.leaf)
        if place.leaf != BLOCKS:
            return self._rows(place, stored, box)
        first, end = box.start[1] // _BYTES, -(-(box.start[1] + box.size[1]) // _BYTES)
        outer = Box((box.start[0], first, 0), (box.size[0], end - first, _BYTES))
        skipped = box.start[1] - first * _BYTES
        return self._rows(place, stored, outer).flatten(1)[:, skipped : skipped + box.size[1]]

    def _rows(self, place: StackPlace, stored: str, box: Box) -> Tensor:
        """Read a tensor's rows out of those of its stack."""
        start = (place.expert, box.start[0] * place.turns, *box.start[1:])
        size = (1, box.size[0] * place.turns, *box.size[1:])
        rows = self.files.read(stored, Box(start, size))[0]
        return rows[place.turn :: place.turns].contiguous()


def packed_experts(files: Checkpoint) -> Listed:
    """Return ``files`` by names of single experts; unchanged where they have no such stacks.

    Raises CheckpointError if the headers of the stacks contradict one another.
    """
    stacks = [m for name in files.tensors if (m := _BLOCKS.fullmatch(name))]
    if not stacks:
        return files
    tensors = {n: info for n, info in files.tensors.items() if not _STACK.fullmatch(n)}
    for match in stacks:
        tensors |= _of_stack(files, match[1], match[2])
    return ExpertStacks(path=files.path, config=files.config, tensors=tensors, files=files)


def _of_stack(files: Checkpoint, module: str, linear: str) -> Iterator[tuple[str, TensorInfo]]:
    stack, names = f"{module}.{linear}", _LINEARS[linear]
    blocks = files.tensors[f"{stack}_blocks"]
    _check(files, stack, blocks)
    experts, rows, groups, _ = blocks.shape
    count = rows // len(names)
    shapes = {BLOCKS: (count, groups * _BYTES), SCALES: (count, groups), "bias": (count,)}
    for expert in range(experts):
        for name in names:
            for leaf, shape in shapes.items():
                info = files.tensors.get(stack_name(stack, leaf))
                if info is not None:
                    yield (
                        f"{module}.{expert}.{name}.{leaf}",
                        TensorInfo(info.dtype, shape, info.file),
                    )


def _check(files: Checkpoint, stack: str, blocks: TensorInfo) -> None:
    """Raise CheckpointError unless the tensors of a stack fit one another."""
    shape = blocks.shape
    odd = stack.endswith("gate_up_proj") and len(shape) == 4 and shape[1] % 2
    if len(shape) != 4 or 0 in shape or shape[3] != _BYTES or blocks.dtype != torch.uint8 or odd:
        raise CheckpointError(
            f"{files.path}: {stack}_blocks is {blocks.dtype} {list(shape)}, not uint8 [experts, "
            f"rows, groups of {GROUP}, {_BYTES}]; fetch the checkpoint again"
        )
    wanted = {
        "scales": ((torch.uint8, torch.float8_e8m0fnu), shape[:3]),
        "bias": (PLAIN_DTYPES, shape[:2]),
    }
    for suffix, (dtypes, expected) in wanted.items():
        info = files.tensors.get(f"{stack}_{suffix}")
        if info is None and suffix == "bias":
            continue
        if info is None or info.shape != expected or info.dtype not in dtypes:
            found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(
                f"{files.path}: {stack}_{suffix} is {found}, but {stack}_blocks needs"
                f" {dtypes[0]} {list(expected)}; fetch the checkpoint again"
            )
