"""``megatron_quant_manifest.json``: what an export was made of, and a digest of every tensor.

Nothing in it depends on the layout or the time: equal files have byte-equal manifests.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from megatron_quant.ckpt.plan import ExportPlan, Origin, digest_of_parts
from megatron_quant.ckpt.storage import (
    ABOUT,
    MANIFEST,
    TensorEntry,
    UnknownDtype,
    entries_of,
    explained,
    hashed_on_disk,
    read_header,
    read_object,
)
from megatron_quant.documents import INDEX
from megatron_quant.errors import CheckpointError
from megatron_quant.models import whole

_VERSION = 2


def plan_digest(plan: ExportPlan) -> str:
    """Digest every file's name and header: all of a plan that no layout changes."""
    return _files_digest((file.name, file.header) for file in plan.files)


def _files_digest(headers: Iterable[tuple[str, bytes]]) -> str:
    return digest_of_parts(part for name, header in headers for part in (name.encode(), header))


def identity(plan: ExportPlan, origin: Origin) -> dict[str, str]:
    """Return the manifest without the digests of tensors."""
    return {"recipe": origin.recipe, "source": origin.source, "plan": plan_digest(plan)}


def manifest(
    plan: ExportPlan, origin: Origin, digests: Mapping[str, str], files: Iterable[str]
) -> dict[str, Any]:
    """Make the manifest. digests: by tensor name. files: the names of all files of the export."""
    tensors = {entry.name: digests[entry.name] for entry in plan.entries}
    about = {"version": _VERSION, "digest": ABOUT}
    return {**about, **identity(plan, origin), "files": sorted(files), "tensors": tensors}


def digests_on_disk(
    directory: Path, entries: Iterable[TensorEntry], threads: int
) -> dict[str, str]:
    """Compute the digest of each of ``entries``, read from their files under ``directory``.

    The digest is empty if the file ends too early. Raises ExportError if a file cannot be read.
    """
    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(partial(_named_digest, directory), entries))


def _named_digest(directory: Path, entry: TensorEntry) -> tuple[str, str]:
    path = directory / entry.file
    with explained(path, "cannot be read back"):
        fd = os.open(path, os.O_RDONLY)
        try:
            found = hashed_on_disk(fd, entry, whole(entry.shape))
            return entry.name, found.digest if found else ""
        finally:
            os.close(fd)


def digest_problems(directory: Path, threads: int) -> Iterator[str]:
    """Report where a checkpoint's files contradict its manifest, in the order of the files.

    Headers are compared first; if one is damaged, tensors are not compared.
    """
    if not (directory / MANIFEST).exists():
        yield f"{MANIFEST} is missing; verify without --digests, or export again"
        return
    try:
        stated = read_object(directory / MANIFEST, INDEX)
        paths = sorted(directory.glob("*.safetensors"))
        headers = {path.name: read_header(path) for path in paths}
        entries = [e for name, header in headers.items() for e in entries_of(name, header)]
    except (CheckpointError, UnknownDtype) as error:
        yield str(error)
        return
    if stated.get("version") != _VERSION or not isinstance(stated.get("tensors"), dict):
        yield f"{MANIFEST} does not have version {_VERSION}; verify with the release that wrote it"
    elif stated.get("plan") != _files_digest(headers.items()):
        yield f"the names or headers of the files are not those of {MANIFEST}; export again"
    else:
        found = digests_on_disk(directory, entries, threads)
        for entry in entries:
            if found[entry.name] != stated["tensors"].get(entry.name):
                yield (
                    f"{entry.name}: damaged: its bytes in {entry.file} are not those that were"
                    " exported; export again"
                )
