"""Where engines that load experts as stacks alone look for a single expert's tensors.

A layer has one tensor for all experts. ``gate_up_proj`` has rows of gate and up in turn. In bf16 it
is [E, H, 2I], ``down_proj`` [E, I, H], and ``gate_up_proj_bias`` [E, 2I]. In MXFP4 there are
``gate_up_proj_blocks`` [E, 2I, H/32, 16] and ``gate_up_proj_scales`` [E, 2I, H/32], and the same
for ``down_proj`` with [E, H, I]. gpt-oss has them so in transformers, vLLM and SGLang.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROUP = 32
"""Columns that share a scale; a row must have whole groups."""
BLOCKS, SCALES = "weight_blocks", "weight_scales"
"""Suffixes under which a single expert's codes and scales are known here."""
_NAME = re.compile(r"(.*\bexperts)\.(\d{1,9})\.(gate_proj|up_proj|down_proj)\.(\w+)")
_BYTES = GROUP // 2
_TURNS = {"gate_proj": ("gate_up_proj", 0, 2), "up_proj": ("gate_up_proj", 1, 2)}


@dataclass(frozen=True, kw_only=True)
class StackPlace:
    """The place of a single expert's tensor in a stack.

    Attributes:
        experts: Module of the layer's experts.
        stack: Name of the stack without what tells codes, scales and bias apart.
        expert: Index in the stack.
        turn: First row that is the tensor's own.
        turns: Rows from one of its rows to the next.
        leaf: Last part of the tensor's name: ``weight`` or ``bias``.
    """

    experts: str
    stack: str
    expert: int
    turn: int
    turns: int
    leaf: str


def stack_place(name: str) -> StackPlace | None:
    """Return where a stack has the tensor ``name``; None where it is no routed expert's."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    linear, turn, turns = _TURNS.get(match[3], (match[3], 0, 1))
    return StackPlace(
        experts=match[1],
        stack=f"{match[1]}.{linear}",
        expert=int(match[2]),
        turn=turn,
        turns=turns,
        leaf=match[4],
    )


def stack_name(stack: str, suffix: str) -> str:
    """Return the file's name of the stack of all tensors with ``suffix``."""
    return f"{stack}_bias" if suffix == "bias" else f"{stack}{suffix.removeprefix('weight')}"


def stack_shape(suffix: str, shape: Sequence[int], experts: int, turns: int) -> tuple[int, ...]:
    """Return the shape of the stack of tensors that have ``suffix`` and ``shape``."""
    rows, inner = turns * shape[0], tuple(shape[1:])
    if suffix == BLOCKS:
        return experts, rows, inner[0] // _BYTES, _BYTES
    return (experts, *inner, rows) if suffix == "weight" else (experts, rows, *inner)


def stacked_rows(suffix: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return one expert's part of a stack, made of the tensors whose rows it has in turn."""
    rows: torch.Tensor = torch.stack(tuple(tensors), 1).flatten(0, 1)
    if suffix == BLOCKS:
        return rows.view(len(rows), -1, _BYTES)
    return rows.t() if suffix == "weight" else rows
