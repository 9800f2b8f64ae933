"""Open a Megatron checkpoint, quantized or not, without Megatron and Transformer Engine."""

from collections.abc import Sequence
from pathlib import Path

from megatron_quant.alike import check_alike
from megatron_quant.ckpt.plan import digest_of
from megatron_quant.dist import Groups, together
from megatron_quant.mcore.checkpoint.torch_dist import TorchDist, open_torch_dist

CHILD = "megatron_quant"
"""Name of the child module that says how a model is quantized."""
DESCRIPTION = f"{CHILD}.description"


def open_stored(directory: Path | str, groups: Groups, skip_keys: Sequence[str] = ()) -> TorchDist:
    """Open the checkpoint in ``directory``, quantized or not. Collective.

    skip_keys: patterns of keys to leave out. Raises CheckpointError, on every rank alike, where
    there is none or it cannot be read, and for a pattern that no key matches.
    """
    stored = together(groups, lambda: open_torch_dist(Path(directory)).without(skip_keys))
    digest = digest_of([[key, *shape] for key, shape in sorted(stored.shapes.items())])
    check_alike(groups, **{f"the digest of {directory}": digest[:12]})
    return stored


def is_quantized(stored: TorchDist) -> bool:
    """Return whether the checkpoint has quantizers."""
    return any(key == DESCRIPTION or "_quantizer." in key for key in stored.shapes)
