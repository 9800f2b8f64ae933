"""Is a written checkpoint what its own config says? Read with safetensors alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_quant.ckpt.dialects.base import INPUT_SCALE, SHAPE
from megatron_quant.ckpt.index import index_problems
from megatron_quant.ckpt.quantized import PLAIN_DTYPES, QuantizedCheckpoint
from megatron_quant.ckpt.reader import open_directory
from megatron_quant.ckpt.source import read_json
from megatron_quant.errors import ArchitectureError, CheckpointError, VerifyError
from megatron_quant.models.registry import lookup
from megatron_quant.models.spec import Param, Source

BOUNDS = {"fp8": 0.25, "nvfp4": 0.5, "int4": 0.5}
"""Format -> largest ||w - decoded|| / ||w|| that is no mistake. Gaussian weights have about 0.03,
0.1 and 0.1; a wrong scale or packing gives 1 and more."""
SHARED = ("tensor_scale", INPUT_SCALE)
"""Fields that the members of a fused group must share: engines take one member's for all."""


@dataclass(frozen=True)
class TensorCheck:
    """One weight of the unquantized model.

    format: of the stored weight; empty where it is not quantized.
    error: ||w - decoded|| / ||w|| against the source checkpoint; None where it was not compared.
    """

    name: str
    format: str
    error: float | None


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found; every problem is one line that names the tensor or file."""

    directory: Path
    problems: tuple[str, ...]
    tensors: tuple[TensorCheck, ...]

    def worst(self, count: int) -> tuple[TensorCheck, ...]:
        """The ``count`` compared weights that lost most, worst first."""
        compared = [t for t in self.tensors if t.format and t.error is not None]
        return tuple(sorted(compared, key=lambda t: -(t.error or 0))[:count])

    def raise_for_problems(self) -> None:
        """Raise VerifyError with the first problem and their number; nothing where all is well."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise VerifyError(f"{self.directory}: {self.problems[0]}{more}")


def verify(directory: Path, against: Path | None = None) -> Report:
    """Check files, index, config, tensors and scales; with ``against`` also the weights' values.

    against: the checkpoint that was quantized. Tensors are read one at a time. Raises
    CheckpointError where ``against`` cannot be read; what is wrong with ``directory`` is reported.
    """
    source = QuantizedCheckpoint(against) if against is not None else None
    problems = index_problems(directory)
    if problems:
        return Report(directory, tuple(problems), ())
    try:
        checkpoint, params = _open(directory)
    except (CheckpointError, ArchitectureError) as error:
        return Report(directory, (str(error),), ())
    problems = [*_config_problems(checkpoint), *_stray_problems(checkpoint, params)]
    checks = []
    for param in params:
        found, checked = _check(checkpoint, param, source)
        problems += found
        checks += checked
    return Report(directory, tuple(problems), tuple(checks))


def _open(directory: Path) -> tuple[QuantizedCheckpoint, tuple[Param, ...]]:
    files = open_directory(directory)
    params = lookup(files.config).params(files.config)
    matrices = [s.module for p in params for s in p.sources if len(s.shape) == 2]
    return QuantizedCheckpoint.over(files, matrices), params


def _config_problems(checkpoint: QuantizedCheckpoint) -> tuple[str, ...]:
    dialect = checkpoint.dialect
    if dialect is None:
        return ()
    paths = [checkpoint.directory / name for name in dialect.extra_names]
    try:
        extra = {path.name: read_json(path) for path in paths}
    except CheckpointError as error:
        return (str(error),)
    return dialect.check_extra_files(checkpoint.config["quantization_config"], extra)


def _stray_problems(checkpoint: QuantizedCheckpoint, params: tuple[Param, ...]) -> list[str]:
    expected = {name for p in params for s in p.sources for name, _, _ in _stored(checkpoint, s)}
    return [
        f"{name}: config.json knows no such tensor (its module is not quantized, or not in the "
        "model)"
        for name in checkpoint.tensors
        if name not in expected and not _stands_for_weight(checkpoint, name)
    ]


def _stands_for_weight(checkpoint: QuantizedCheckpoint, name: str) -> bool:
    """Whether a plain weight takes the place of quantized tensors (reported as that)."""
    module, _, leaf = name.rpartition(".")
    return module in checkpoint.modules and leaf == "weight"


def _is_quantized(checkpoint: QuantizedCheckpoint, source: Source) -> bool:
    return source.module in checkpoint.modules and source.name.endswith(".weight")


def _stored(
    checkpoint: QuantizedCheckpoint, source: Source
) -> Iterator[tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]]:
    """Name, possible dtypes and shape of each tensor that stores ``source``."""
    if not _is_quantized(checkpoint, source):
        yield source.name, PLAIN_DTYPES, source.shape
        return
    rows, cols = source.shape
    for stored in checkpoint.stored(source.module):
        yield f"{source.module}.{stored.suffix}", (stored.dtype,), stored.shape(rows, cols)


def _check(
    checkpoint: QuantizedCheckpoint, param: Param, against: QuantizedCheckpoint | None
) -> tuple[list[str], list[TensorCheck]]:
    problems: list[str] = []
    checks: list[TensorCheck] = []
    for source in param.sources:
        found = _form_problems(checkpoint, source) or _value_problems(checkpoint, source)
        error = None
        if against is not None and not found:
            error, found = _compare(checkpoint, source, against)
        problems += found
        quantized = _is_quantized(checkpoint, source)
        fmt = checkpoint.modules[source.module].weights.name if quantized else ""
        checks.append(TensorCheck(source.name, fmt, error))
    return problems or _fusion_problems(checkpoint, param), checks


def _form_problems(checkpoint: QuantizedCheckpoint, source: Source) -> list[str]:
    """Tensors that are missing, or of another dtype or shape than the config says."""
    info = checkpoint.tensors.get(source.name)
    if _is_quantized(checkpoint, source) and info and info.dtype in PLAIN_DTYPES:
        return [f"{source.name}: neither quantized nor in the ignore list of config.json"]
    problems = []
    for name, dtypes, shape in _stored(checkpoint, source):
        info = checkpoint.tensors.get(name)
        if info is None:
            problems.append(f"{name}: missing")
        elif info.dtype not in dtypes:
            wanted = " or ".join(map(str, dtypes))
            problems.append(f"{name}: dtype is {info.dtype}, config.json means {wanted}")
        elif info.shape != shape:
            problems.append(f"{name}: shape is {info.shape}, config.json means {shape}")
    return problems


def _value_problems(checkpoint: QuantizedCheckpoint, source: Source) -> list[str]:
    """Elements and scales that are not finite, scales that are not positive, a wrong shape."""
    if not _is_quantized(checkpoint, source):
        return []
    problems = []
    elements = checkpoint.modules[source.module].weights.fields[0].name
    for stored in checkpoint.stored(source.module):
        name = f"{source.module}.{stored.suffix}"
        tensor = checkpoint.raw(name)
        if stored.field == SHAPE:
            if tuple(tensor.tolist()) != source.shape:
                problems.append(f"{name}: {tensor.tolist()} is not {list(source.shape)}")
        elif tensor.is_floating_point():
            values = tensor.float()
            if not values.isfinite().all():
                problems.append(f"{name}: holds NaN or infinity")
            elif stored.field != elements and not (values > 0).all():
                problems.append(f"{name}: holds a scale that is not positive")
    return problems


def _fusion_problems(checkpoint: QuantizedCheckpoint, param: Param) -> list[str]:
    """Members of a fused group of which some are not quantized, or whose scales differ."""
    members = [s.module for s in param.sources if _is_quantized(checkpoint, s)]
    if not members or len(param.sources) == 1:
        return []
    if len(members) < len(param.sources):
        rest = [s.module for s in param.sources if s.module not in members]
        return [f"{members[0]}: quantized, but {rest[0]}, which engines fuse with it, is not"]
    if len({checkpoint.modules[m] for m in members}) > 1:
        return [f"{members[0]}: its format is not that of {members[1]}, fused with it"]
    shared = [s.suffix for s in checkpoint.stored(members[0]) if s.field in SHARED]
    return [
        f"{members[0]}.{suffix}: not equal to that of {', '.join(members[1:])}, "
        "though engines use one scale for all"
        for suffix in shared
        if len({checkpoint.raw(f"{m}.{suffix}").item() for m in members}) > 1
    ]


def _compare(
    checkpoint: QuantizedCheckpoint, source: Source, against: QuantizedCheckpoint
) -> tuple[float | None, list[str]]:
    """The error against the source's tensor, and whether it is beyond what the format explains."""
    name = source.name
    if source.name not in against.tensors or against.tensors[name].shape != source.shape:
        return None, [f"{name}: {against.directory} has no such tensor of shape {source.shape}"]
    if not _is_quantized(checkpoint, source):
        tensor = checkpoint.raw(name)
        same = torch.equal(tensor, against.weight(name, tensor.dtype))
        return None, [] if same else [f"{name}: differs from {against.directory}, unquantized"]
    w_NK = against.weight(name, torch.float32)
    error = relative_error(w_NK, checkpoint.weight(name, torch.float32))
    bound = BOUNDS[checkpoint.modules[source.module].weights.name]
    if error <= bound:
        return error, []
    return error, [f"{name}: relative error {error:.3g} against the source is above {bound}"]


def relative_error(w_NK: torch.Tensor, decoded_NK: torch.Tensor) -> float:
    """||w - decoded|| / ||w||; of a zero weight ||decoded||."""
    norm = torch.linalg.vector_norm(w_NK).item()
    return torch.linalg.vector_norm(w_NK - decoded_NK).item() / (norm or 1.0)
