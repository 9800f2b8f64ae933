"""Scales that a dialect stores as their inverse: codes are made with what readers divide by."""

import torch

from megatron_quant.ckpt.dialects.base import INPUT_SCALE
from megatron_quant.ckpt.plan.parts import RankPart
from megatron_quant.ckpt.write.encode_part import encoded
from megatron_quant.formats import encode, get_format, tensor_scale
from tests.unit import ckpt_world

NVFP4 = get_format("nvfp4")
AMAXES = torch.linspace(0.5, 8.0, 401)


def a_part() -> RankPart:
    """Of a quantized weight of compressed-tensors, whose scales are divisors."""
    parts = ckpt_world.plan("nvfp4", "tp1").parts_of(0)
    return next(p for p in parts if p.target.scheme.weights is not None)


def stored(part: RankPart, w_NK: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is on disk of ``part``, by the field that it carries."""
    fields = {piece.entry.name: piece.stored.field for piece in part.pieces}
    return {fields[entry.name]: value for entry, _, value in encoded(part, w_NK, amax, amax)}


def test_codes_are_made_with_the_scale_that_decodes_them():
    part = a_part()
    w_NK = torch.randn(part.target.source.shape, generator=torch.Generator().manual_seed(1))
    moved = 0
    for amax in AMAXES:
        disk = stored(part, w_NK, amax)
        scale = disk["tensor_scale"].reciprocal().reshape(())
        assert torch.equal(scale.reciprocal().reshape(1), disk["tensor_scale"])
        assert torch.equal(disk["elements"], encode(w_NK, NVFP4, scale)["elements"])
        inputs = disk[INPUT_SCALE].reciprocal()
        assert torch.equal(inputs.reciprocal(), disk[INPUT_SCALE])
        plain = tensor_scale(amax, NVFP4)
        assert scale.item() in (plain.item(), plain.reciprocal().reciprocal().item())
        moved += scale.item() != plain.item()
    assert moved > 20  # else nothing was tried that an inverse moves
