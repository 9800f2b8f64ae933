"""View experts that a checkpoint stores as one 3-D parameter as the matrices that engines load."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_quant.documents import shown
from megatron_quant.engines.families import Layout, stack_of
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.config import Config
from megatron_quant.models.spec import Box
from megatron_quant.models.text import family, text_config

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_STACK = re.compile(r"(.*\bexperts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(_bias)?(\.weight)?")


@dataclass(frozen=True)
class Stacked:
    """A stored stack: all ``kind`` matrices of the experts in ``module``."""

    module: str
    kind: str
    bias: bool = False


def _parse(name: str) -> Stacked | None:
    """Return what the tensor of this name holds where it is a stack; None for any other."""
    if (own := stack_of(name)) is not None:
        return Stacked(f"{own[0]}.experts", own[1].holds)
    match = _STACK.fullmatch(name)
    return Stacked(match[1], match[2], bool(match[3])) if match is not None else None


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
        stack = _parse(name)
        if stack is None or stack.bias or stack.kind not in plain:
            continue
        wanted, own = plain[stack.kind], tuple(shape[1:])
        fits = {turned for turned in (False, True) if own == (wanted[::-1] if turned else wanted)}
        found[stack.module] = found.get(stack.module, {False, True}) & fits
    for module, fits in found.items():
        if len(fits) != 1:
            raise ArchitectureError(
                f"{module}: the shapes of its stacks do not tell rows from columns where "
                f"hidden_size is {hidden} and moe_intermediate_size {inner} in config.json; "
                "correct config.json, or store single experts"
            )
    return {module: fits.pop() for module, fits in found.items()}


def unstack(config: Config, shapes: Shapes) -> dict[str, View]:
    """Map a tensor name that engines load to its place, for every expert of every stack.

    Args:
        config: Content of config.json.
        shapes: Shapes of stored tensors by name; those that are no stack are left out.

    Raises:
        ArchitectureError: For a stack whose shape does not tell its rows from its columns.
    """
    of_family = family(config)
    known = of_family.layout if of_family is not None else Layout.PLAIN
    turned = _turned(config, shapes) if known is Layout.EITHER else {}
    views: dict[str, View] = {}
    for name, shape in shapes.items():
        stack = _parse(name)
        if stack is None or _is_single(name, shape):
            continue
        layout = known
        if known is Layout.EITHER:
            layout = Layout.TRANSPOSED if turned.get(stack.module) else Layout.PLAIN
        _check(name, shape, stack, config, layout)
        for expert in range(shape[0]):
            views.update(_of_expert(name, shape, stack, expert, layout))
    return views


def first_expert(name: str, shape: Shape) -> tuple[str, ...]:
    """Return the modules of expert 0 that a tensor holds if it is a stack; none for others.

    Some engines look its names up for the format of all.
    """
    stack = _parse(name)
    if stack is None or stack.bias or _is_single(name, shape):
        return ()
    kinds = ("gate_proj", "up_proj") if stack.kind == "gate_up_proj" else (stack.kind,)
    return tuple(f"{stack.module}.0.{kind}" for kind in kinds)


def _is_single(name: str, shape: Shape) -> bool:
    """Return whether a matrix has the name of a stack of its family, as in its dense layers."""
    return len(shape) == 2 and stack_of(name) is not None


def _check(name: str, shape: Shape, stack: Stacked, config: Config, lay: Layout) -> None:
    hidden, bias = text_config(config).get("hidden_size"), stack.bias
    what = "[experts, features]" if bias else _meant(stack.kind, lay)
    fits = len(shape) == 2 + (not bias) and 0 not in shape
    if fits and not bias:
        inner = 1 if _transposed(lay) != (stack.kind == "down_proj") else 2
        fits = shape[inner] == hidden
    if fits and stack.kind == "gate_up_proj":
        fits = shape[_rows_dim(lay, bias)] % 2 == 0
    if not fits:
        raise ArchitectureError(
            f"{name} has shape {list(shape)} where hidden_size is {shown(hidden)} in config.json: "
            f"its experts cannot be told apart, {what} is known; correct config.json"
        )


def _transposed(lay: Layout) -> bool:
    return lay in (Layout.TRANSPOSED, Layout.ALTERNATING)


def _meant(kind: str, lay: Layout) -> str:
    rows, cols = ("hidden", "intermediate") if kind == "down_proj" else ("features", "hidden")
    return f"[experts, {cols}, {rows}]" if _transposed(lay) else f"[experts, {rows}, {cols}]"


def _rows_dim(lay: Layout, bias: bool) -> int:
    return 2 if _transposed(lay) and not bias else 1


def _of_expert(
    name: str, shape: Shape, stack: Stacked, expert: int, lay: Layout
) -> Iterator[tuple[str, View]]:
    bias = stack.bias
    rows = shape[_rows_dim(lay, bias)]
    transposed = _transposed(lay) and not bias
    inner = () if bias else (shape[1 if transposed else 2],)
    leaf = "bias" if bias else "weight"
    kinds = ("gate_proj", "up_proj") if stack.kind == "gate_up_proj" else (stack.kind,)
    count = rows // len(kinds)
    for i, kind in enumerate(kinds):
        fused = len(kinds) > 1 and lay is Layout.ALTERNATING
        start, step = (i, len(kinds)) if fused else (i * count, 1)
        view = View(
            stored=name,
            shape=(count, *inner),
            expert=expert,
            start=start,
            step=step,
            transposed=transposed,
        )
        yield f"{stack.module}.{expert}.{kind}.{leaf}", view
