"""Check a written checkpoint against its own config, with safetensors alone."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

from megatron_quant.ckpt.read import (
    PLAIN_DTYPES,
    Packed,
    QuantizedCheckpoint,
    ReadOnce,
    Weights,
    is_buffer,
    matrices,
    open_directory,
    open_original,
    opened,
    params_of,
    plain_part,
    row_blocks,
    with_fold,
)
from megatron_quant.ckpt.storage import MANIFEST, index_problems, read_object
from megatron_quant.ckpt.verify.tensors import (
    cache_problems,
    element_problems,
    form_problems,
    fusion_problems,
    is_quantized,
    role_problems,
    same_values,
    scale_problems,
    stored_cache_tensors,
    stray_problems,
)
from megatron_quant.documents import INDEX
from megatron_quant.errors import ArchitectureError, CheckpointError, VerifyError
from megatron_quant.fields import Fields
from megatron_quant.models import Param, Role, Source, engine_groups, has_drafts, is_draft

BOUNDS = {8: 0.25, 4: 0.5}
"""Bits -> largest ||w - decoded|| / ||w|| that passes. Gaussian weights have at most 0.03 and 0.2.
A wrong scale or packing gives 1 and more."""


@dataclass(frozen=True)
class TensorCheck:
    """One weight of the unquantized model.

    Attributes:
        name: Its Hugging Face name.
        format: Format of the stored weight; empty where it is not quantized.
        error: ||w - decoded|| / ||w|| against the source checkpoint; None where it was not
            compared.
    """

    name: str
    format: str
    error: float | None


@dataclass(frozen=True)
class Report:
    """The findings of :func:`verify`; every problem is one line that names the tensor or file."""

    directory: Path
    problems: tuple[str, ...]
    tensors: tuple[TensorCheck, ...]

    def worst(self, count: int) -> tuple[TensorCheck, ...]:
        """Return the ``count`` compared weights that lost most, worst first."""
        compared = [t for t in self.tensors if t.format and t.error is not None]
        return tuple(sorted(compared, key=lambda t: -(t.error or 0))[:count])

    def raise_for_problems(self) -> None:
        """Raise VerifyError with the first problem and their number.

        Do nothing where all is well.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise VerifyError(f"{self.directory}: {self.problems[0]}{more}")


@dataclass
class Share:
    """The findings of one of several processes on a checkpoint; :func:`joined` reports on all.

    unreadable: why the checkpoint could not be read; the rest is then empty. problems: lines, by
    their place among those of the other shares. tensors: by the number of the parameter.
    """

    directory: Path
    unreadable: tuple[str, ...] = ()
    problems: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    tensors: dict[int, list[TensorCheck]] = field(default_factory=dict)

    def note(self, kind: int, number: int, problems: Sequence[str]) -> None:
        """Add lines, ordered by ``kind`` and then by ``number``."""
        if problems:
            self.problems[kind, number] = list(problems)

    def called(self, directory: Path) -> "Share":
        """Return the findings with ``directory`` as the checkpoint's name.

        Its name so far must be absolute: any other could be a word.
        """
        assert self.directory.is_absolute(), self.directory
        was = re.compile(rf"(?<![\w./-]){re.escape(str(self.directory))}(?![\w.-])")

        def renamed(lines: Iterable[str]) -> list[str]:
            return [was.sub(lambda _: str(directory), line) for line in lines]

        lines = {place: renamed(own) for place, own in self.problems.items()}
        return Share(directory, tuple(renamed(self.unreadable)), lines, self.tensors)


def verify(directory: Path, against: Path | None = None) -> Report:
    """Check files, index, config, tensors and scales; with ``against`` also the weights' values.

    Tensors are read one at a time. Faults of ``directory`` are reported, not raised.

    Args:
        directory: The checkpoint.
        against: The checkpoint that was quantized.

    Raises:
        CheckpointError: Where ``against`` cannot be read.
    """
    return joined([verify_share(directory, against, 0, 1)])


def joined(shares: Sequence[Share]) -> Report:
    """Make one report, the same however many shares there were.

    shares: of all ranks of :func:`verify_share`, in their order.
    """
    directory = shares[0].directory
    for share in shares:
        if share.unreadable:
            return Report(directory, share.unreadable, ())
    problems = {place: lines for share in shares for place, lines in share.problems.items()}
    tensors = {number: checks for share in shares for number, checks in share.tensors.items()}
    return Report(
        directory,
        tuple(line for place in sorted(problems) for line in problems[place]),
        tuple(check for number in sorted(tensors) for check in tensors[number]),
    )


def verify_share(directory: Path, against: Path | Weights | None, rank: int, size: int) -> Share:
    """Do the share of process ``rank`` of ``size`` in :func:`verify`, about equal in elements.

    against: the directory of the checkpoint that was quantized, or its weights, by the names that
    engines load. All read the headers; only the first checks names and config. Raises
    CheckpointError if ``against`` cannot be read.
    """
    source = open_original(against) if isinstance(against, Path) else against
    if problems := index_problems(directory):
        return Share(directory, tuple(problems))
    try:
        checkpoint, params = _open(directory)
        source = with_fold(source, directory, checkpoint.tensors) if source is not None else None
    except (CheckpointError, ArchitectureError) as error:
        return Share(directory, (str(error),))
    share = Share(directory)
    if rank == 0:
        share.note(0, 0, _named_problems(checkpoint, params))
        share.note(2, 0, _lost(checkpoint.config, params, source) if source is not None else ())
    owners = _owners(params, size)
    unsound: set[Source] = set()
    for number, param in enumerate(params):
        if owners[_unit(param)] == rank:
            found, share.tensors[number] = _check(checkpoint, param, source)
            share.note(1, number, found)
            unsound |= set(param.sources if found else ())
    for number, (fused, owner) in enumerate(
        zip(engine_groups(params), owners.values(), strict=True)
    ):
        if owner == rank and not unsound & set(fused):
            share.note(3, number, fusion_problems(checkpoint, fused))
    return share


def _unit(param: Param) -> str:
    """Name the unit that one process checks: all that engines fuse together."""
    return param.fused or param.name


def _owners(params: Sequence[Param], size: int) -> dict[str, int]:
    """Map each unit to the process that looks at it, in the order of the model."""
    elements: dict[str, int] = {}
    for param in params:
        elements[_unit(param)] = elements.get(_unit(param), 0) + prod(param.shape)
    loads, owners = [(0, rank) for rank in range(size)], {}
    for unit, count in elements.items():
        load, owners[unit] = loads[0]
        heapreplace(loads, (load + count, owners[unit]))
    return owners


def _named_problems(checkpoint: QuantizedCheckpoint, params: tuple[Param, ...]) -> list[str]:
    """Report faults of config, names and the KV cache's scales."""
    cache = stored_cache_tensors(checkpoint, params)
    return [
        *_config_problems(checkpoint),
        *stray_problems(checkpoint, params, cache),
        *cache_problems(checkpoint, cache),
    ]


def _open(directory: Path) -> tuple[QuantizedCheckpoint, tuple[Param, ...]]:
    files = opened(open_directory(directory))
    checkpoint = QuantizedCheckpoint.over(files, matrices(files))
    params = params_of(checkpoint)
    dense = set() if checkpoint.lists_exclusions else _plain_by_role(checkpoint, params)
    sources = (s for p in params for s in p.sources)
    modules = [s.module for s in sources if len(s.shape) == 2 and s.name not in dense]
    return QuantizedCheckpoint.over(files, modules), params


def _plain_by_role(checkpoint: QuantizedCheckpoint, params: Sequence[Param]) -> set[str]:
    """Return plain tensors that are no linears, such as routers: engines build them so unasked."""
    fixed = (s.name for p in params if p.role is not Role.LINEAR for s in p.sources)
    plain = {n for n, info in checkpoint.tensors.items() if info.dtype in PLAIN_DTYPES}
    return plain.intersection(fixed)


def _lost(config: Mapping[str, Any], params: Sequence[Param], source: Weights) -> list[str]:
    """List tensors of the source that the checkpoint lacks without saying so."""
    known = {s.name for param in params for s in param.sources}
    drafts = has_drafts(config)
    return [
        f"{name}: missing, though {source.path} has it"
        for name in source.dense()
        if name not in known
        and not is_buffer(name)
        and (drafts or not is_draft(source.config, name))
    ]


def _config_problems(checkpoint: QuantizedCheckpoint) -> tuple[str, ...]:
    dialect, quantization = checkpoint.dialect, checkpoint.config.get("quantization_config")
    if dialect is None or quantization is None:
        return ()
    paths = [checkpoint.path / name for name in dialect.extra_names]
    try:
        extra = {path.name: read_object(path) for path in paths if path.exists()}
        listed = _listed(checkpoint.path)
        lost = (n for n in dialect.extra_names if n in listed and n not in extra)
        missing = tuple(f"{name}: missing, though {MANIFEST} lists it" for name in lost)
        return (*missing, *dialect.check_extra_files(quantization, extra))
    except CheckpointError as error:
        return (str(error),)


def _listed(directory: Path) -> tuple[str, ...]:
    """Return the files that an export's own manifest lists; none where it has no manifest."""
    if not (directory / MANIFEST).exists():
        return ()
    return Fields(read_object(directory / MANIFEST, INDEX), MANIFEST).texts("files")


def _check(
    checkpoint: QuantizedCheckpoint, param: Param, against: Weights | None
) -> tuple[list[str], list[TensorCheck]]:
    problems: list[str] = []
    checks: list[TensorCheck] = []
    for source in param.sources:
        held = checkpoint.held()
        error, found = (
            None,
            form_problems(checkpoint, source) or role_problems(checkpoint, source, param.role),
        )
        if not found:
            error, found = _check_values(checkpoint, source, against, held)
        problems += found
        quantized = is_quantized(checkpoint, source)
        fmt = checkpoint.modules[source.module].weights.name if quantized else ""
        checks.append(TensorCheck(source.name, fmt, error))
    return problems, checks


def _check_values(
    checkpoint: QuantizedCheckpoint, source: Source, against: Weights | None, held: ReadOnce
) -> tuple[float | None, list[str]]:
    """Return the error against the source's tensor, and the faults of values or error."""
    scales = scale_problems(checkpoint, source, held)
    error, differing = None, list[str]()
    if against is not None and not scales:
        error, differing = _compare(checkpoint, source, against, held)
    if error is not None and isfinite(error):  # then every element of the sum is finite too
        return error, differing
    found = element_problems(checkpoint, source, held) + scales
    return (None, found) if found else (error, differing)


def _compare(
    checkpoint: QuantizedCheckpoint, source: Source, against: Weights, held: ReadOnce
) -> tuple[float | None, list[str]]:
    """Return the error against the source's tensor, and a fault where the format allows less."""
    name = source.name
    info = against.info(name)
    if info is None or info.shape != source.shape:
        return None, [f"{name}: {against.path} has no such tensor of shape {source.shape}"]
    if not is_quantized(checkpoint, source):
        same = all(
            same_values(plain_part(checkpoint, name, box), plain_part(against, name, box))
            for box in row_blocks(info.shape)
        )
        return None, [] if same else [f"{name}: differs from {against.path}, unquantized"]
    error = _relative_error(checkpoint.packed(source.module, held), against, name)
    bound = BOUNDS[checkpoint.modules[source.module].weights.bits]
    if error <= bound:
        return error, []
    return error, [f"{name}: relative error {error:.3g} against the source is above {bound}"]


def _relative_error(packed: Packed, against: Weights, name: str) -> float:
    """Return ||w - decoded|| / ||w||, and ||decoded|| for a zero weight."""
    own = lost = 0.0
    for box in row_blocks(packed.shape):
        part = packed.lost(plain_part(against, name, box), box)
        own, lost = own + part[0], lost + part[1]
    return sqrt(lost) / (sqrt(own) or 1.0)
