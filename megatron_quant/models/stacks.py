"""View experts that a checkpoint stores as one 3-D parameter as the matrices that engines load."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from megatron_quant.documents import shown
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.config import Config
from megatron_quant.models.spec import Box

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_STACK = re.compile(r"(.*\bexperts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(_bias)?(\.weight)?")


class Halves(Enum):
    """Where gate and up lie among the output features of a linear that fuses them."""

    AFTER = "gate first, then up"
    ALTERNATING = "gate and up in turn"


@dataclass(frozen=True, kw_only=True)
class View:
    """A matrix [N, K] or vector [N] inside a stored stack, seen as a tensor of its own.

    Row n is row ``start + step * n`` of the stack.

    Attributes:
        stored: Name of the stack, [E, N', K], [E, K, N'] where ``transposed``, or [E, N'].
        shape: Logical shape.
        expert: Index in the stack.
        start: First row in the stack.
        step: Rows of the stack from one row to the next.
        transposed: Whether the stack keeps inputs before outputs.
    """

    stored: str
    shape: Shape
    expert: int
    start: int = 0
    step: int = 1
    transposed: bool = False

    def box(self, box: Box) -> Box:
        """Return the box of the stack that holds ``box``, and the rows between its rows.

        Args:
            box: A box of the matrix or vector.
        """
        rows = (self.start + self.step * box.start[0], self.step * (box.size[0] - 1) + 1)
        spans = [rows, *zip(box.start[1:], box.size[1:], strict=True)]
        spans = [(self.expert, 1), *(reversed(spans) if self.transposed else spans)]
        start, size = zip(*spans, strict=True)
        return Box(start, size)


@dataclass(frozen=True)
class _Layout:
    transposed: bool = False
    halves: Halves = Halves.AFTER


# model_type -> how transformers 5.23 lays its experts out. All others are like Gemma-4.
_LAYOUTS = {
    "gpt_oss": _Layout(True, Halves.ALTERNATING),
    "llama4": _Layout(True),
    "llama4_text": _Layout(True),
}


_EITHER = ("qwen3_vl_moe", "qwen3_vl_moe_text")
"""Models that have [E, H, 2I] and [E, I, H] on the hub, while transformers saves them as
[E, 2I, H] and [E, H, I]."""


def _turned(config: Config, shapes: Shapes) -> dict[str, bool]:
    """Map the module of a layer's stacks to whether they are transposed.

    Shapes of one module's stacks decide together.

    Raises:
        ArchitectureError: Where they leave it open.
    """
    text = text_config(config)
    hidden, inner = text.get("hidden_size"), text.get("moe_intermediate_size")
    if not isinstance(hidden, int) or not isinstance(inner, int):
        return {}
    plain = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    found: dict[str, set[bool]] = {}
    for name, shape in shapes.items():
        match = _STACK.fullmatch(name)
        if match is None or match[3] or match[2] not in plain:
            continue
        wanted, own = plain[match[2]], tuple(shape[1:])
        fits = {turned for turned in (False, True) if own == (wanted[::-1] if turned else wanted)}
        found[match[1]] = found.get(match[1], {False, True}) & fits
    for module, fits in found.items():
        if len(fits) != 1:
            raise ArchitectureError(
                f"{module}: the shapes of its stacks do not tell rows from columns where "
                f"hidden_size is {hidden} and moe_intermediate_size {inner} in config.json; "
                "correct config.json, or store single experts"
            )
    return {module: fits.pop() for module, fits in found.items()}


def text_config(config: Config) -> Config:
    """Return the part of config.json that describes the text decoder."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def unstack(config: Config, shapes: Shapes) -> dict[str, View]:
    """Map a tensor name that engines load to its place, for every expert of every stack.

    Args:
        config: Content of config.json.
        shapes: Shapes of stored tensors by name; those that are no stack are left out.

    Raises:
        ArchitectureError: For a stack whose shape does not tell its rows from its columns.
    """
    kinds = [text_config(config).get("model_type"), config.get("model_type")]
    known = next((lay for kind, lay in _LAYOUTS.items() if kind in kinds), _Layout())
    turned = _turned(config, shapes) if any(kind in kinds for kind in _EITHER) else {}
    views: dict[str, View] = {}
    for name, shape in shapes.items():
        match = _STACK.fullmatch(name)
        if match is None:
            continue
        layout = _Layout(turned[match[1]]) if match[1] in turned else known
        _check(name, shape, match, config, layout)
        for expert in range(shape[0]):
            views.update(_of_expert(name, shape, match, expert, layout))
    return views


def _check(name: str, shape: Shape, match: re.Match[str], config: Config, lay: _Layout) -> None:
    hidden, bias = text_config(config).get("hidden_size"), bool(match[3])
    what = "[experts, features]" if bias else _meant(match[2], lay)
    fits = len(shape) == 2 + (not bias) and 0 not in shape
    if fits and not bias:
        inner = 1 if lay.transposed != (match[2] == "down_proj") else 2
        fits = shape[inner] == hidden
    if fits and match[2] == "gate_up_proj":
        fits = shape[_rows_dim(lay, bias)] % 2 == 0
    if not fits:
        raise ArchitectureError(
            f"{name} has shape {list(shape)} where hidden_size is {shown(hidden)} in config.json: "
            f"its experts cannot be told apart, {what} is known; correct config.json"
        )


def _meant(kind: str, lay: _Layout) -> str:
    rows, cols = ("hidden", "intermediate") if kind == "down_proj" else ("features", "hidden")
    return f"[experts, {cols}, {rows}]" if lay.transposed else f"[experts, {rows}, {cols}]"


def _rows_dim(lay: _Layout, bias: bool) -> int:
    return 1 if bias or not lay.transposed else 2


def _of_expert(
    name: str, shape: Shape, match: re.Match[str], expert: int, lay: _Layout
) -> Iterator[tuple[str, View]]:
    bias = bool(match[3])
    rows = shape[_rows_dim(lay, bias)]
    inner = () if bias else (shape[1 if lay.transposed else 2],)
    transposed = lay.transposed and not bias
    leaf = "bias" if bias else "weight"
    kinds = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else (match[2],)
    count = rows // len(kinds)
    for i, kind in enumerate(kinds):
        fused = len(kinds) > 1 and lay.halves is Halves.ALTERNATING
        start, step = (i, len(kinds)) if fused else (i * count, 1)
        view = View(
            stored=name,
            shape=(count, *inner),
            expert=expert,
            start=start,
            step=step,
            transposed=transposed,
        )
        yield f"{match[1]}.{expert}.{kind}.{leaf}", view
