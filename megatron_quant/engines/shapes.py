"""Find where an engine's tensor parallelism would cut a group or a block, and propose another way.

vLLM cuts the dimensions that Megatron cuts: q, k, v, gate and up by output features, o and down by
input features. It gives a group to the rank that holds it whole. Some of its loaders read wrong
scales where a group is cut; none serves it.
"""

from collections.abc import Sequence

from megatron_quant.formats import CHANNEL, Format, stored_format
from megatron_quant.models import Domain, Parallel, Param, Source
from megatron_quant.recipes import Decision

_PACKING_ROWS = ("gptq", "awq", "auto-round")
_Found = Sequence[tuple[Param, Decision]]


def shape_problem(found: _Found, dialect: str, tp: int) -> tuple[str, str] | None:
    """Return the problem at ``tp`` and the way out; None where every weight can be served."""
    for param, decision in found:
        fmt = decision.weights
        assert fmt is not None
        problem = _problem(param, fmt, dialect, tp)
        if problem is not None:
            same = [p for p, d in found if d.weights == fmt]
            return problem, _instead(same, fmt, dialect, tp)
    return None


def ragged_problem(found: _Found, dialect: str) -> tuple[str, str] | None:
    """Return a weight whose last group is not whole, and the way out; None without one.

    No engine reads it at any size: compressed-tensors itself refuses it, vLLM and SGLang assert,
    and the packers of GPTQ and AWQ have no place for it.
    """
    for param, decision in found:
        fmt = decision.weights
        assert fmt is not None
        if not fmt.group_sizes or fmt.group_size == CHANNEL:
            continue
        for source in param.sources:
            if source.shape[1] % fmt.group_size:
                what = f"{source.module}: its {source.shape[1]} inputs end inside a group of "
                same = [p for p, d in found if d.weights == fmt]
                return f"{what}{fmt.group_size}", _instead(same, fmt, dialect, 1)
    return None


def _problem(param: Param, fmt: Format, dialect: str, tp: int) -> str | None:
    for source in param.sources:
        rows, cols = _local(param, source, tp)
        at = f"{source.module} at tensor-parallel size {tp}"
        if rows is None or cols is None:
            return f"{at}: it does not divide the weight's {' x '.join(map(str, source.shape))}"
        group = _group(param, fmt, dialect, tp)
        if cols % group:
            unit = "group" if fmt.group_size == group else "word"
            return f"{at}: a rank's {cols} inputs end inside a {unit} of {group}"
        block = _block_rows(fmt)
        if rows % block and _is_followed(param, source, tp):
            return f"{at}: a rank's {rows} outputs end inside a block of {block}"
        if rows % 8 and _packs_rows(fmt, dialect):
            return f"{at}: a rank's {rows} outputs end inside a word of 8"
    return None


def _local(param: Param, source: Source, tp: int) -> tuple[int | None, int | None]:
    """Return output and input features of a rank; None where ``tp`` does not divide them.

    Where there are fewer key-value heads than ranks, several ranks have copies of them.
    """
    rows, cols = source.shape
    if param.parallel is Parallel.REPLICATED:
        return rows, cols
    if param.parallel is Parallel.ROW:
        return rows, cols // tp if cols % tp == 0 else None
    assert param.parallel is Parallel.COLUMN, f"{param.name} is not cut"
    shared = param.groups and source is not param.sources[0]
    parts = min(tp, param.groups) if shared else tp
    return (rows // parts if rows % parts == 0 else None), cols


def _group(param: Param, fmt: Format, dialect: str, tp: int) -> int:
    """Return the input features that must stay on one rank together; 1 where any cut will do."""
    cut = tp > 1 and param.parallel is Parallel.ROW
    if _block_rows(fmt) > 1 and not cut and dialect != "modelopt":
        return 1  # the last block of a row may be smaller
    packed = fmt.fields[0].block[1]
    return packed if fmt.group_size in (0, CHANNEL) else fmt.group_size


def _block_rows(fmt: Format) -> int:
    """Return how many outputs share a scale; 1 where each has its own or all have one."""
    return (fmt.stat_block and fmt.stat_block[0]) or 1


def _is_followed(param: Param, source: Source, tp: int) -> bool:
    """Return whether another member or another rank comes after the source's rows."""
    cut = tp > 1 and param.parallel is Parallel.COLUMN
    of_expert = param.domain is Domain.EXPERT and param.parallel is Parallel.COLUMN
    return cut or of_expert or source is not param.sources[-1]


def _packs_rows(fmt: Format, dialect: str) -> bool:
    """Return whether codes or zero points are packed along the outputs."""
    return fmt.arithmetic.element == "int4" and (fmt.zero_point or dialect in _PACKING_ROWS)


def _instead(same: Sequence[Param], fmt: Format, dialect: str, tp: int) -> str:
    """Return the largest group size that works, the largest ``--serve-tp`` that does, or both."""

    def works(candidate: Format, size: int) -> bool:
        return all(_problem(param, candidate, dialect, size) is None for param in same)

    ways = []
    groups = [stored_format(fmt.name, g) for g in fmt.group_sizes]
    fitting = [g.group_size for g in groups if works(g, tp)]
    if fitting:  # the length of a channel counts as the largest, but costs most accuracy
        inner = [g for g in fitting if g != CHANNEL]
        ways.append(f"group_size: {max(inner) if inner else 'channel'}")
    sizes = [size for size in range(tp - 1, 0, -1) if works(fmt, size)]
    if sizes:
        ways.append(f"--serve-tp {sizes[0]}")
    return " or ".join(ways) or "a format with a scale per channel, such as fp8_channel"
