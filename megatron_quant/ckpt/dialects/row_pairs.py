"""INT4 packed along the output features, as ModelOpt's W4A16_AWQ stores it."""

import torch

from megatron_quant.errors import FormatError


def int4_to_bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 [N, K/8], code = value + 8  ->  uint8 [N/2, K], two's complement, rows paired."""
    if words.shape[0] % 2:
        raise FormatError(
            f"{words.shape[0]} rows are odd, but W4A16_AWQ packs them in pairs; "
            "exclude the layer or export compressed-tensors"
        )
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> shifts) & 15
    # Offset binary and two's complement differ in the top bit alone.
    nibbles = (codes ^ 8).flatten(1).to(torch.uint8)
    return nibbles[0::2] | (nibbles[1::2] << 4)


def bytes_to_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`int4_to_bytes`."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=1).flatten(0, 1)
    codes = (nibbles ^ 8).to(torch.int32).unflatten(1, (-1, 8))
    words = torch.zeros(codes.shape[:2], dtype=torch.int32, device=packed.device)
    for slot in range(8):
        words |= codes[..., slot] << (4 * slot)
    return words
