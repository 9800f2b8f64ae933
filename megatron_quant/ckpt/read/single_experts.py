"""Open a quantized checkpoint's files by the names of single experts, however they stack them."""

from megatron_quant.ckpt.read.directory import Checkpoint
from megatron_quant.ckpt.read.mxfp4_stacks import packed_experts
from megatron_quant.ckpt.read.source import Listed
from megatron_quant.ckpt.read.stack_views import viewed
from megatron_quant.models import has_table, is_draft, unstack


def single_experts(files: Checkpoint) -> Listed:
    """Return ``files`` with a tensor for each expert instead of stacks.

    A model without a table keeps stacks of plain experts here; its structure tells what they are.

    Raises:
        ArchitectureError: For a stack whose experts cannot be told apart.
        CheckpointError: For stacks that contradict one another.
    """
    packed = packed_experts(files)
    if packed is not files or not has_table(files.config):
        return packed
    config = files.config
    # layers for speculation are carried as they are stored
    shapes = {n: i.shape for n, i in files.tensors.items() if not is_draft(config, n)}
    return viewed(files, unstack(config, shapes))
