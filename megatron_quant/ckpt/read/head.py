"""Tell whether a checkpoint's output layer really is its embedding, as its config may say.

transformers ties the two only if the checkpoint has no head. A fine-tune may have its own head
under a config that still says ``tie_word_embeddings``. So the values decide.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.read.directory import Checkpoint, open_directory
from megatron_quant.models import Box

TIED = "tie_word_embeddings"
_HEAD, _EMBEDDING, _WEIGHT = "lm_head", "embed_tokens.weight", ".weight"
_NESTED = ("text_config", "llm_config", "language_config")
_ELEMENTS = 1 << 22
"""Elements of each that are compared at a time."""
Compared = dict[tuple[object, ...], bool]
"""Whether a head equals its embedding, by the place of both and their files' sizes and times."""
_COMPARED: Compared = {}


def with_own_head(checkpoint: Checkpoint) -> Checkpoint:
    """Return ``checkpoint`` with a config that agrees with its head's tensors.

    If the config ties the two and the head equals the embedding, they are one tensor. If the head
    differs, the returned config says that it is not tied. Both are read, block by block, up to the
    first difference.
    """
    said = _said(checkpoint.config)
    heads = [n for n in checkpoint.tensors if _is_head(n)]
    if said is False or not heads:
        return checkpoint
    if not _is_equal(checkpoint, heads):
        return replace(checkpoint, config=_untied(checkpoint.config))
    if not said:
        return checkpoint
    rest = {n: info for n, info in checkpoint.tensors.items() if n not in heads}
    return replace(checkpoint, tensors=rest)


def compared_heads(directory: Path) -> Compared:
    """Compare the head of a checkpoint with its embedding, for :func:`remember_heads`.

    Raises CheckpointError as :func:`open_directory`.
    """
    with_own_head(open_directory(directory))
    return {key: equal for key, equal in _COMPARED.items() if key[0] == str(directory.resolve())}


def remember_heads(compared: Compared) -> None:
    """Take over what another process has compared, so that this one does not read both again."""
    _COMPARED.update(compared)


def _is_head(name: str) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] == _HEAD


def _said(config: Mapping[str, Any]) -> bool | None:
    """Return whether the config ties the head; None if it leaves that to the model's class."""
    for part in (config, *(config.get(key) for key in _NESTED)):
        if isinstance(part, dict) and isinstance(part.get(TIED), bool):
            return bool(part[TIED])
    return None


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        key: {**part, TIED: False}
        for key in _NESTED
        if isinstance(part := config.get(key), dict) and TIED in part
    }
    return {**config, **nested, TIED: False}


def _is_equal(checkpoint: Checkpoint, heads: list[str]) -> bool:
    """Return whether the head has one tensor, equal to the embedding."""
    embeddings = sorted((n for n in checkpoint.tensors if n.endswith(_EMBEDDING)), key=len)
    if len(heads) != 1 or not heads[0].endswith(_WEIGHT) or not embeddings:
        return False
    head, embedding = heads[0], embeddings[0]
    shape = checkpoint.tensors[head].shape
    if shape != checkpoint.tensors[embedding].shape:
        return False
    key = (
        str(checkpoint.path.resolve()),
        *_place(checkpoint, head),
        *_place(checkpoint, embedding),
    )
    if key not in _COMPARED:
        _COMPARED[key] = all(
            torch.equal(checkpoint.read(head, box).float(), checkpoint.read(embedding, box).float())
            for box in _blocks(shape)
        )
    return _COMPARED[key]


def _place(checkpoint: Checkpoint, name: str) -> tuple[object, ...]:
    entry = checkpoint.entries[name]
    found = (checkpoint.path / entry.file).stat()
    return entry.file, entry.offset, found.st_size, found.st_mtime_ns


def _blocks(shape: tuple[int, ...]) -> Iterator[Box]:
    step = max(_ELEMENTS // max(prod(shape[1:]), 1), 1)
    zeros = (0,) * len(shape[1:])
    for start in range(0, shape[0] if shape else 0, step):
        yield Box((start, *zeros), (min(step, shape[0] - start), *shape[1:]))
