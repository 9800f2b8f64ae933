"""The scores that a rank has so far, in a file, so that a killed search goes on."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from megatron_quant.ckpt.storage import explained, write_file

_SCORES, _COME = "scores", "come"


class Progress:
    """A file of scores and of how far their walk has come; each write replaces all of it.

    Args:
        path: The file.
        made_of: Digest of all that the scores depend on.
        shape: Shape of the scores: batches, options.
    """

    def __init__(self, path: Path, made_of: str, shape: tuple[int, int]) -> None:
        self._path, self._made_of, self._shape = path, made_of, shape

    def read(self) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """Return the scores, fp64, and how far they have come; zeros and nothing at the start."""
        with suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):
            with safe_open(self._path, "pt") as file:
                come = json.loads(file.metadata()[_COME])
                scores = file.get_tensor(_SCORES)
            wanted = (self._made_of, self._shape, torch.float64)
            if (come["made_of"], tuple(scores.shape), scores.dtype) == wanted:
                return scores, come
        return torch.zeros(self._shape, dtype=torch.float64), {}

    def save(self, scores: torch.Tensor, **come: Any) -> None:
        """Keep the scores, and how far they have come: all of it or nothing, as a kill may come."""
        said = json.dumps({"made_of": self._made_of, **come})
        new = self._path.with_name(f"{self._path.name}.new")
        with explained(self._path, "cannot be written"):
            write_file(new, save({_SCORES: scores.contiguous()}, {_COME: said}), fsync=False)
            os.replace(new, self._path)
