"""Prove that an export plan fills every byte of every file exactly once."""

from itertools import combinations
from math import prod

from megatron_quant.ckpt.dialects import Shape, StorageScheme
from megatron_quant.ckpt.plan.export_plan import ExportPlan
from megatron_quant.ckpt.plan.slabs import Slab, with_slabs
from megatron_quant.ckpt.storage import OutFile
from megatron_quant.models import Box


def check_plan(plan: ExportPlan) -> None:
    """Assert that files hold their tensors without holes and that the parts tile each tensor.

    Tensors of equal shape that are cut equally are proven once. So the cost grows with the number
    of parts and not with its square.
    """
    for file in plan.files:
        _check_file(file)
    names = [entry.name for entry in plan.entries]
    assert len(set(names)) == len(names), "a name is stored twice"
    held = {entry.name for target in plan.targets for entry in target.in_files}
    assert held == set(names), "a tensor without a target"
    _check_stacks(plan)
    cuts: dict[str, list[Box]] = {target.source.name: [] for target in plan.targets}
    for part in plan.parts:
        cuts[part.target.source.name].append(part.src)
    proven: set[tuple[StorageScheme, Shape, tuple[Box, ...]]] = set()
    for target in plan.targets:
        key = (target.scheme, target.source.shape, tuple(cuts[target.source.name]))
        if key not in proven:
            _check_tensors(*key, target.source.name)
            proven.add(key)


def _check_stacks(plan: ExportPlan) -> None:
    """Assert that every expert of a stack has all of its rows, whole and of one owner."""
    found: dict[str, list[Slab]] = {}
    for item in with_slabs(plan.parts):
        if isinstance(item, Slab):
            found.setdefault(item.entries[0].name, []).append(item)
    for name, slabs in found.items():
        for piece in zip(*(slab.pieces for slab in slabs), strict=True):
            assert tiles(piece[0].entry.shape, tuple(p.box for p in piece)), name
        for slab in slabs:
            rows = [part.target.source.shape for part in slab.parts]
            assert all(part.region.size == part.region.whole for part in slab.parts), name
            assert len({*rows}) == len({part.owner for part in slab.parts}) == 1, name
            assert sum(p.entry.nbytes // p.entry.shape[0] for p in slab.pieces) == slab.nbytes, name


def _check_file(file: OutFile) -> None:
    end = len(file.header)
    for entry in file.entries:
        assert entry.offset == end, f"{entry.name} starts at {entry.offset}, not {end}"
        assert entry.offset % entry.dtype.itemsize == 0, f"{entry.name} is not aligned"
        assert entry.nbytes == prod(entry.shape) * entry.dtype.itemsize, entry.name
        end += entry.nbytes
    assert end == file.size, f"{file.name}: {file.size} bytes, tensors end at {end}"


def _check_tensors(scheme: StorageScheme, shape: Shape, cuts: tuple[Box, ...], name: str) -> None:
    assert tiles(shape, cuts), f"{name}: the parts do not tile it"
    filled = [scheme.boxes(shape, cut) for cut in cuts]
    stored_shapes = scheme.shapes(shape)
    for i, stored in enumerate(scheme.stored):
        found = tuple(box[i] for box in filled)
        assert tiles(stored_shapes[i], tuple(b for b in found if b)), f"{name}: {stored.field}"


def tiles(shape: Shape, cuts: tuple[Box, ...]) -> bool:
    """Return whether the boxes lie in a tensor of ``shape`` and cover each element exactly once."""
    inside = all(
        o >= 0 and n > 0 and o + n <= dim
        for cut in cuts
        for o, n, dim in zip(cut.start, cut.size, shape, strict=True)
    )
    volume = sum(prod(cut.size) for cut in cuts)
    apart = not any(_overlap(a, b) for a, b in combinations(cuts, 2))
    return inside and apart and volume == prod(shape)


def _overlap(a: Box, b: Box) -> bool:
    spans = zip(a.start, a.size, b.start, b.size, strict=True)
    return all(o < p + m and p < o + n for o, n, p, m in spans)
