"""Digest the inputs of an export: two runs with equal digests write the same bytes."""

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_quant.ckpt.storage import DIGEST_BYTES, read_header, read_object
from megatron_quant.formats import Format
from megatron_quant.recipes import Recipe, Rule


@dataclass(frozen=True)
class Origin:
    """The inputs of an export, each as a digest; empty where it is not known.

    Attributes:
        recipe: :func:`recipe_digest`, or :func:`digest_of` whatever decided in its place.
        source: :func:`source_digest`.
        statistics: :func:`digest_of` the scales that calibration found. An unfinished export is not
            continued with others. The manifest leaves them out.
    """

    recipe: str = ""
    source: str = ""
    statistics: str = ""


def digest_of(value: object) -> str:
    """Digest a value that JSON can express, whatever the order of its keys."""
    return digest_of_parts([json.dumps(value, sort_keys=True).encode()])


def recipe_digest(recipe: Recipe) -> str:
    """Digest the effect of a recipe, whatever its name and description."""
    return digest_of([recipe.kv_cache, *map(_rule, recipe.rules)])


def _rule(rule: Rule) -> list[object]:
    formats = [_format(rule.weights), _format(rule.inputs)]
    damp = [] if rule.damp is None else [rule.damp]
    alpha = [] if rule.alpha is None else [{"alpha": rule.alpha}]
    return [rule.patterns, formats, rule.optional, rule.algorithm, *damp, *alpha]


def _format(fmt: Format | None) -> object:
    if fmt is None:
        return None
    return [fmt.name, fmt.group_size, *(["signed"] if fmt.signed else [])]


def source_digest(directory: Path) -> str:
    """Digest a checkpoint's config.json, and names, sizes and headers of its safetensors files.

    It does not notice weights that were replaced by others of the same names and shapes.

    Raises:
        CheckpointError: Where a file cannot be read.
    """
    described: list[object] = [read_object(directory / "config.json")]
    for path in sorted(directory.glob("*.safetensors")):
        header = digest_of_parts([read_header(path)])
        described.append([path.name, path.stat().st_size, header])
    return digest_of(described)


def digest_of_parts(parts: Iterable[bytes]) -> str:
    """Digest byte strings, with the places where one ends and the next begins."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        found.update(struct.pack("<Q", len(part)))
        found.update(part)
    return found.hexdigest()
