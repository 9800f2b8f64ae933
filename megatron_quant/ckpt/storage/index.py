"""Check the index of a sharded checkpoint against the files beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_quant import documents
from megatron_quant.ckpt.storage.hub import read_object
from megatron_quant.ckpt.storage.safetensors_header import INDEX, WEIGHTS, entries_of, read_header
from megatron_quant.documents import check_regular, shown
from megatron_quant.errors import CheckpointError


def index_problems(directory: Path) -> list[str]:
    """List the faults of a checkpoint's files, one line each; read headers alone.

    Every tensor must be in exactly one file, where the index has it. Every safetensors file must be
    named by the index. A stated total size must be that of the tensors. A checkpoint of one file
    needs no index.
    """
    if not directory.is_dir():
        return ["no such directory; give an exported checkpoint"]
    files = sorted(p.name for p in directory.glob("*.safetensors"))
    if not (directory / INDEX).exists():
        if files == [WEIGHTS]:
            return _file_problems(directory, {}, [WEIGHTS])
        return [f"{INDEX} is missing; an export without it was interrupted, export again"]
    try:
        index = read_object(directory / INDEX, documents.INDEX)
    except CheckpointError as error:
        return [str(error)]
    where = index.get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(f, str) and f and Path(f).name == f and "\0" not in f for f in where.values()
    ):
        return [f"{INDEX} has no weight_map from tensor to file of its directory"]
    named = sorted(set(where.values()))
    stray = [f"{f}: {INDEX} does not name this file" for f in files if f not in named]
    problems = _file_problems(directory, where, named)
    return problems + stray + ([] if problems else _size_problems(directory, index, named))


def _file_problems(directory: Path, where: Mapping[str, str], files: list[str]) -> list[str]:
    problems = []
    for file in files:
        try:
            held = set(_sizes(directory / file))
        except FileNotFoundError:
            problems.append(f"{file}: file is missing, though {INDEX} names it")
            continue
        except (CheckpointError, OSError, SafetensorError) as error:
            problems.append(f"{file}: no whole safetensors file: {error}")
            continue
        expected = {name for name, f in where.items() if f == file} if where else held
        problems += [f"{n}: missing from {file}, where {INDEX} has it" for n in expected - held]
        problems += [
            f"{n}: in {file}, but {INDEX} has it in {where.get(n, 'none')}" for n in held - expected
        ]
    return sorted(problems)


def _size_problems(directory: Path, index: Mapping[str, Any], files: list[str]) -> list[str]:
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(sum(_sizes(directory / file).values()) for file in files)
    if stated is None or stated == size:
        return []
    return [f"{INDEX}: total_size is {shown(stated)}, but the tensors have {size} bytes"]


def _sizes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor in a file; SafetensorError where the file is not whole."""
    if path.exists():
        check_regular(path)
    with safe_open(path, "pt"):
        header = read_header(path)
    return {entry.name: entry.nbytes for entry in entries_of(path.name, header)}
