"""Read GPT-OSS's stacks of MXFP4 experts as one decoded matrix per expert.

Each layer has on disk ``experts.gate_up_proj_blocks`` uint8 [E, 2I, H/32, 16] (two E2M1 codes per
byte, the even column in the low nibble), ``gate_up_proj_scales`` uint8 [E, 2I, H/32] (E8M0) and
``gate_up_proj_bias`` [E, 2I]; and the same for ``down_proj`` with [E, H, I]. Rows of gate_up
alternate: gate, up, gate, up. transformers' ``integrations/mxfp4.py`` decodes them like this.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_quant.ckpt.read.checks import PLAIN_DTYPES
from megatron_quant.ckpt.read.directory import Checkpoint
from megatron_quant.ckpt.read.shared_exponents import check_e8m0
from megatron_quant.ckpt.read.source import Listed, TensorInfo
from megatron_quant.errors import CheckpointError
from megatron_quant.formats import decode, get_format
from megatron_quant.models import Box

_BLOCKS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)_blocks")
_STACK = re.compile(r".*\.experts\.(gate_up_proj|down_proj)_(blocks|scales|bias)")
_NAME = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
_FIRST = {"gate_proj": 0, "up_proj": 1}
_GROUP = 32


class ExpertStacks(Listed):
    """A checkpoint directory whose experts are stacks in MXFP4.

    Its experts' tensors have the names that other models give to single experts:
    ``...experts.3.gate_proj.weight`` [I, H] and ``.bias`` [I], the same for ``up_proj``, and
    ``down_proj`` [H, I] and [H]. All other tensors keep their names. Iterating yields the names.
    """

    def __init__(self, files: Checkpoint):
        """Raise CheckpointError if the headers of ``files`` contradict one another."""
        self._files = files
        self.path, self.config = files.path, files.config
        self.tensors = dict(self._logical())

    @property
    def unread(self) -> tuple[str, ...]:
        """Return the files' own unread tensors."""
        return self._files.unread

    def read(self, name: str, box: Box) -> Tensor:
        """Read ``box`` of tensor ``name``: an expert's weight in fp32, else in its stored dtype.

        It reads only those rows and blocks of the expert that the rectangle touches.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            return self._files.read(name, box)
        module, expert, projection, leaf = match.groups()
        rows = _Rows(projection, box.start[0], box.size[0])
        stack = f"{module}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"
        if leaf == "bias":
            outer = Box((int(expert), rows.start), (1, rows.size))
            return rows.own(self._files.read(f"{stack}_bias", outer)[0])
        return self._weight(stack, int(expert), rows, box)

    def _weight(self, stack: str, expert: int, rows: "_Rows", box: Box) -> Tensor:
        first = box.start[1] // _GROUP
        count = -(-(box.start[1] + box.size[1]) // _GROUP) - first
        start, size = (expert, rows.start, first), (1, rows.size, count)
        blocks = self._files.read(f"{stack}_blocks", Box((*start, 0), (*size, _GROUP // 2)))
        scales = self._files.read(f"{stack}_scales", Box(start, size))
        check_e8m0(self.path, f"{stack}_scales", scales)
        fields = {
            "elements": rows.own(blocks[0]).flatten(1).contiguous(),
            "scale": rows.own(scales[0]).contiguous().view(torch.uint8),
        }
        w_NK = decode(fields, get_format("mxfp4"), torch.float32)
        skipped = box.start[1] - first * _GROUP
        return w_NK[:, skipped : skipped + box.size[1]]

    def _logical(self) -> Iterator[tuple[str, TensorInfo]]:
        for name, info in self._files.tensors.items():
            match = _BLOCKS.fullmatch(name)
            if match is not None:
                yield from self._of_stack(match[1], match[2], info)
            elif _STACK.fullmatch(name) is None:
                yield name, info

    def _of_stack(
        self, module: str, projection: str, blocks: TensorInfo
    ) -> Iterator[tuple[str, TensorInfo]]:
        stack = f"{module}.{projection}"
        fused = projection == "gate_up_proj"
        self._check(stack, blocks)
        experts, rows, groups, _ = blocks.shape
        shape = (rows // 2 if fused else rows, groups * _GROUP)
        bias = self._files.tensors.get(f"{stack}_bias")
        for expert in range(experts):
            for own in _FIRST if fused else ("down_proj",):
                name = f"{module}.{expert}.{own}"
                yield f"{name}.weight", TensorInfo(torch.float32, shape, blocks.file, decoded=True)
                if bias is not None:
                    yield f"{name}.bias", TensorInfo(bias.dtype, shape[:1], bias.file)

    def _check(self, stack: str, blocks: TensorInfo) -> None:
        """Raise CheckpointError unless the tensors of a stack fit one another."""
        shape = blocks.shape
        odd = stack.endswith("gate_up_proj") and len(shape) == 4 and shape[1] % 2
        if (
            len(shape) != 4
            or 0 in shape
            or shape[3] != _GROUP // 2
            or blocks.dtype != torch.uint8
            or odd
        ):
            raise CheckpointError(
                f"{self.path}: {stack}_blocks is {blocks.dtype} {list(shape)}, not uint8 [experts, "
                f"rows, groups of {_GROUP}, {_GROUP // 2}]; fetch the checkpoint again"
            )
        wanted = {
            "scales": ((torch.uint8, torch.float8_e8m0fnu), shape[:3]),
            "bias": (PLAIN_DTYPES, shape[:2]),
        }
        for suffix, (dtypes, expected) in wanted.items():
            info = self._files.tensors.get(f"{stack}_{suffix}")
            if info is None and suffix == "bias":
                continue
            if info is None or info.shape != expected or info.dtype not in dtypes:
                found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
                raise CheckpointError(
                    f"{self.path}: {stack}_{suffix} is {found}, but {stack}_blocks needs"
                    f" {dtypes[0]} {list(expected)}; fetch the checkpoint again"
                )


class _Rows:
    """The rows of a stack that belong to one projection: every second one if two alternate."""

    def __init__(self, projection: str, start: int, size: int):
        self._first = _FIRST.get(projection, 0)
        self._step = 2 if projection in _FIRST else 1
        self.start, self.size = start * self._step, size * self._step

    def own(self, rows: Tensor) -> Tensor:
        """Pick the projection's rows out of the stack's rows from ``start`` on."""
        return rows[self._first :: self._step]
