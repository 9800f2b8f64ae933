"""The files beside the weights: config.json and what is carried over from the source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.dialects.base import Dialect
from megatron_quant.ckpt.origin import Origin
from megatron_quant.recipes.plan import QuantPlan

CONFIG = "config.json"
_UNKNOWN = Origin()


@dataclass(frozen=True)
class Companions:
    """documents: JSON file name -> content; carried: files to copy under their own names.

    origin: what the manifest says of where the export comes from.
    """

    documents: Mapping[str, Mapping[str, Any]]
    carried: tuple[Path, ...] = ()
    origin: Origin = _UNKNOWN

    @property
    def names(self) -> list[str]:
        """Names that they take in the checkpoint's directory."""
        return [*self.documents, *(path.name for path in self.carried)]


def companions(
    hf_config: Mapping[str, Any],
    quant: QuantPlan,
    dialect: Dialect,
    dtype: torch.dtype,
    carried: Sequence[Path] = (),
    origin: Origin = _UNKNOWN,
) -> Companions:
    """config.json with ``quantization_config``, the dialect's own files, and those to carry over.

    hf_config: the source model's config.json. dtype: of the tensors that are not quantized.

    Raises FormatError where the dialect cannot express ``quant``.
    """
    config = {k: v for k, v in hf_config.items() if k != "quantization_config"}
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).split(".")[-1]
    if not quant.quantized:
        return Companions({CONFIG: config}, tuple(carried), origin)
    config["quantization_config"] = dialect.quantization_config(quant)
    return Companions({**dialect.extra_files(quant), CONFIG: config}, tuple(carried), origin)
