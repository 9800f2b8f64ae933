"""Make the files beside the weights: config.json, and those carried over from the source."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.dialects import Dialect, without_quantization
from megatron_quant.ckpt.plan.provenance import Origin
from megatron_quant.models import Role, draft_counts, has_towers, is_draft
from megatron_quant.recipes import QuantPlan

CONFIG = "config.json"
_UNKNOWN = Origin()


@dataclass(frozen=True, kw_only=True)
class Companions:
    """The files of an export beside its weights.

    Attributes:
        documents: JSON file name -> content.
        carried: Files to copy under their own names.
        origin: Inputs of the export, for the manifest.
        root: Directory below which carried files keep their folders; None where all lie beside the
            weights.
        left_out: Parts of the source that the export lacks, one line each.
    """

    documents: Mapping[str, Mapping[str, Any]]
    carried: tuple[Path, ...] = ()
    origin: Origin = _UNKNOWN
    root: Path | None = None
    left_out: tuple[str, ...] = ()

    def name_of(self, carried: Path) -> str:
        """Return the name that one of ``carried`` takes, with its folder where it has one."""
        return carried.relative_to(self.root).as_posix() if self.root else carried.name

    @property
    def names(self) -> list[str]:
        """Return the names that they take in the checkpoint's directory."""
        return [*self.documents, *map(self.name_of, self.carried)]

    def with_document(self, name: str, content: Mapping[str, Any]) -> "Companions":
        """Return a copy that has one more JSON file."""
        return replace(self, documents={**self.documents, name: content})

    def beside(
        self, root: Path, carried: Sequence[Path], left_out: Sequence[str] = ()
    ) -> "Companions":
        """Return a copy that carries files from ``root`` and notes ``left_out``."""
        said = (*self.left_out, *left_out)
        return replace(self, root=root, carried=tuple(carried), left_out=said)


def companions(
    hf_config: Mapping[str, Any],
    quant: QuantPlan,
    dialect: Dialect,
    dtype: torch.dtype,
    origin: Origin = _UNKNOWN,
) -> Companions:
    """Make config.json with ``quantization_config``, and the dialect's own files.

    Layers for speculation that ``quant`` lacks are left out of config.json too.
    :meth:`Companions.beside` adds the files that are carried over.

    Args:
        hf_config: The source model's config.json.
        quant: The resolved recipe.
        dialect: Dialect of the export.
        dtype: Dtype of the tensors that are not quantized.
        origin: Inputs of the export.

    Raises:
        FormatError: Where the dialect cannot express ``quant``.
    """
    config = without_quantization(hf_config)
    config = _with_dtype(config, str(dtype).split(".")[-1])
    config, left_out = _without_drafts(config, quant)
    left_out = (*left_out, *_without_towers(config, quant))
    files: Mapping[str, Mapping[str, Any]] = {}
    if quant.quantized:
        config["quantization_config"] = dialect.quantization_config(quant)
        files = dialect.extra_files(quant)
    return Companions(documents={**files, CONFIG: config}, origin=origin, left_out=left_out)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """State ``dtype`` where ``config`` states one: its own, or else the text decoder's."""
    nested = config.get("text_config")
    inner = _dtype_key(nested) if isinstance(nested, dict) else None
    if isinstance(nested, dict) and inner is not None and _dtype_key(config) is None:
        return {**config, "text_config": {**nested, inner: dtype}}
    return {**config, _dtype_key(config) or "dtype": dtype}


def _dtype_key(config: Mapping[str, Any]) -> str | None:
    return next((key for key in ("torch_dtype", "dtype") if key in config), None)


def _without_drafts(
    config: dict[str, Any], quant: QuantPlan
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Drop the layers for speculation from ``config`` where ``quant`` has none; say so in a line.

    Engines would look for the layers that it counts.
    """
    nested = config.get("text_config")
    inner = draft_counts(nested) if isinstance(nested, dict) else ()
    stated = (*draft_counts(config), *inner)
    if not stated or any(is_draft(config, f"{m}.weight") for m in _modules(quant)):
        return config, ()
    said = ", ".join(f"{key} is 0 in {CONFIG}" for key in dict.fromkeys(stated))
    line = f"layers for speculation: the export has none, so {said}"
    if isinstance(nested, dict):
        config = {**config, "text_config": {**nested, **dict.fromkeys(inner, 0)}}
    return {**config, **dict.fromkeys(draft_counts(config), 0)}, (line,)


def _without_towers(config: Mapping[str, Any], quant: QuantPlan) -> tuple[str, ...]:
    """Say in a line that models beside a text decoder are missing, as in a training checkpoint."""
    outside = (d.slot.fixed == Role.OUTSIDE.value for d in quant.decisions)
    if not has_towers(config) or any(outside):
        return ()
    return (
        "models beside the text decoder, such as a vision tower: the source has none; engines need "
        "their tensors from the published checkpoint",
    )


def _modules(quant: QuantPlan) -> Iterator[str]:
    return (module for decision in quant.decisions for module in decision.slot.sources)
