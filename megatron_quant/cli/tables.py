"""Tables: the coverage audit, the files of a plan, and the quantization statistics."""

import re
from collections.abc import Iterable, Iterator, Sequence
from math import prod

from rich.table import Table

import megatron_quant as mq
from megatron_quant.cli.collapse import collapse
from megatron_quant.cli.console import escape, size

_FILES = 8  # more than this share one row


def weights_table(job: "mq.Job", verbose: bool = False) -> Table:
    """List every weight with its bucket, its rule, and its bytes before and after.

    Experts that are alike share a row, and so do layers unless ``verbose``.
    """
    table = Table(title="Weights")
    table.add_column("Weight", overflow="fold")
    for name in ("Count", "Shape", "Bucket", "Rule", "Before", "After"):
        table.add_column(name, no_wrap=True)
    for name, members in _alike(job, verbose):
        first = members[0]
        decision = job.quant.by_name[first.param.name]
        before = prod(first.source.shape) * job.dtype.itemsize * len(members)
        after = sum(entry.nbytes for t in members for entry in t.entries)
        table.add_row(
            escape(name),
            str(len(members)),
            "x".join(map(str, first.source.shape)),
            _bucket(first),
            escape(decision.rule.partition(":")[0]),
            size(before),
            size(after),
        )
    return table


def _bucket(target: "mq.StoredTensor") -> str:
    scheme = target.scheme
    if scheme.weights is None:
        return "excluded"
    weights, group = scheme.weights, ""
    if weights.group_size > 0:
        group = f" g{weights.group_size}"
    elif weights.group_sizes:
        group = " channel"
    inputs = f" x {scheme.inputs.name}" if scheme.inputs else ""
    return f"{weights.name}{group}{inputs}"


def _alike(job: "mq.Job", verbose: bool) -> "Iterator[tuple[str, list[mq.StoredTensor]]]":
    """Group the stored tensors that differ only in their numbers, in the order of the model."""

    def kind(target: "mq.StoredTensor") -> tuple[object, ...]:
        rule = job.quant.by_name[target.param.name].rule
        return target.source.shape, target.scheme, rule

    weights = (t for t in job.exported.targets if t.param.name in job.quant.by_name)
    return collapse(weights, lambda t: t.source.name, kind, layers=not verbose)


def rules_table(job: "mq.Job") -> Table:
    """Count the weights that each rule, and each of its patterns, decided on."""
    table = Table("Rule", "Action", "Weights", "Of each pattern", title="Coverage")
    for row in job.coverage:
        patterns = ", ".join(f"{pattern}: {count}" for pattern, count in row.patterns)
        table.add_row(escape(row.rule), row.action, str(row.weights), escape(patterns))
    return table


def files_table(plan: "mq.ExportPlan", verbose: bool = False) -> Table:
    """List the files that an export writes; many share one row unless ``verbose``."""
    table = Table("File", "Tensors", "Size", title="Files")
    files = list(plan.files)
    if verbose or len(files) <= _FILES:
        for file in files:
            table.add_row(file.name, str(len(file.entries)), size(file.size))
    else:
        tensors, total = sum(len(f.entries) for f in files), sum(f.size for f in files)
        name = f"{files[0].name} to {files[-1].name}"
        table.add_row(name, str(tensors), size(total))
    return table


def engines_table(job: "mq.Job", serve_tp: int | None) -> Table:
    """List every engine: can it serve the export at ``serve_tp`` (default 1), or why not."""
    tp = serve_tp or 1
    table = Table("Engine", "Serves it", "Why not", title=f"Engines, tensor-parallel size {tp}")
    for engine, found in job.servers(tp).items():
        why = f"{found.what}; take {found.instead}" if found else ""
        table.add_row(engine, "no" if found else "as far as known", escape(why))
    return table


def needs(job: "mq.Job", tokens: int) -> Iterator[str]:
    """Yield lines on how the KV cache is stored, and on what calibration needs.

    tokens: of the calibration data.
    """
    if job.cache_scales:
        how = "calibrated" if job.quant.kv_cache == "fp8" else "all 1"
        yield f"KV cache: FP8, {job.cache_scales} scales ({how})"
    yield "calibration data: " + ("needed" if job.quant.needs_data else "not needed")
    if (memory := job.layer_memory) is not None:
        disk = size(memory.states_per_token * tokens)
        yield (
            f"calibration: layer by layer, {size(memory.weights)} of weights at a time; hidden "
            f"states of {tokens} tokens take {disk} of disk beside --export-dir"
        )
        if memory.sums:
            yield (
                f"squares and products of inputs: {size(memory.sums)} in memory, "
                f"{size(memory.all_sums)} of disk for each rank"
            )
    if job.moments:
        largest = max(one.nbytes for one in job.moments)
        times = f"{len(job.moments)} {'time' if len(job.moments) == 1 else 'times'}"
        yield f"second moments of inputs: {size(largest)} on a rank, the data runs {times} more"


def folding_table(job: "mq.Job", verbose: bool = False) -> Table | None:
    """List where awq and smoothquant fold factors, and where they do not; None without them."""
    places = job.places
    if not places.folded and not places.left:
        return None
    table = Table("Place", "Count", "Folded", title="Factors")
    rows: list[tuple[str, str]] = [(p.name, f"into {len(p.after)} weights") for p in places.folded]
    rows += [(left.name, f"no: {left.reason}") for left in places.left]
    kinds = collapse(rows, lambda r: r[0], lambda r: _numberless(r[1]), layers=not verbose)
    for name, members in kinds:
        table.add_row(escape(name), str(len(members)), escape(members[0][1]))
    return table


def _numberless(text: str) -> str:
    return re.sub(r"\.\d+\.", ".", text)


def sizes_line(plan: "mq.ExportPlan") -> str:
    """Return a line with the bytes before and after."""
    ratio = plan.bytes_before / plan.bytes_after
    return f"size: {size(plan.bytes_before)} -> {size(plan.bytes_after)} ({ratio:.2f}x smaller)"


def planning_lines(job: "mq.Job") -> Iterator[str]:
    """Yield lines on the cost of planning, and on the bytes that each rank writes."""
    assert job.cost is not None
    memory = f", {size(job.cost.nbytes)}" if job.cost.nbytes is not None else ""
    yield f"planned in {job.cost.seconds:.2f} s{memory}"
    found = job.spread
    yield (
        f"bytes a rank writes, of {found.ranks}: {size(found.smallest)} to {size(found.largest)} "
        f"(imbalance {found.imbalance:.3f})"
    )


def statistics_table(
    statistics: Sequence[tuple[str, tuple[int, ...], float]], verbose: bool = False
) -> Table:
    """Show the quantizers' state as Megatron-Bridge's quantize.py does.

    Layers that are alike share a row, with their smallest and largest value, unless ``verbose``.
    """
    table = Table("Parameter Name", "Shape", "Max Value", title="Quantization Statistics")
    rows: Iterable[tuple[str, list[tuple[str, tuple[int, ...], float]]]]
    if verbose:
        rows = ((row[0], [row]) for row in statistics)
    else:
        rows = collapse(statistics, lambda row: row[0], lambda row: row[1])
    for name, members in rows:
        values = sorted(value for _, _, value in members)
        ends = dict.fromkeys(f"{value:.4e}" for value in (values[0], values[-1]))
        table.add_row(escape(name), str(members[0][1]), " to ".join(ends))
    return table
