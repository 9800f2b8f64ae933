"""``scales: signed``: the largest value of an INT4 group takes the code -8."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_quant.ckpt.plan.provenance import recipe_digest
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.errors import FormatError, RecipeError
from megatron_quant.formats import (
    CHANNEL,
    MSE_MULTIPLIERS,
    block_stat,
    choose,
    decode,
    encode,
    encode_on,
    errors,
    fake_quant,
    get_format,
    with_signed_scales,
)
from megatron_quant.recipes import Recipe
from megatron_quant.recipes.document import rule_document
from megatron_quant.recipes.parse import parse_recipe
from tests.dist import checkpoints
from tests.unit.test_stream_inputs import run

SIGNED = {"format": "int4", "group_size": 32, "scales": "signed"}
GROUPS = (32, 64, 128, CHANNEL)


def rule(**changes: Any) -> dict:
    return {"quantize": ["*"], "weights": SIGNED, **changes}


def recipe(**changes: Any) -> Recipe:
    return parse_recipe("own", {"rules": [rule(**changes)]})


def group(*first: float) -> torch.Tensor:
    return torch.tensor([*first, *[0.0] * (32 - len(first))])


def codes(elements: torch.Tensor) -> torch.Tensor:
    """Unpack int32 words: eight codes each, the lowest bits first, 8 for zero."""
    return (elements.unsqueeze(-1) >> torch.arange(0, 32, 4) & 15).flatten(-2) - 8


def test_a_group_by_hand() -> None:
    w = torch.stack(
        [
            group(8, -7, 1, 0.5, 1.5, -2.5),  # positive end: scale -1
            group(-8, 7, -1, 0.5, 1.5, 2.5),  # negative end: scale 1
            group(4, -4, 1),  # both ends: positive, and 4 is cut
            group(),
        ]
    ).bfloat16()
    fmt = with_signed_scales(get_format("int4", 32))
    fields = encode(w, fmt, None)
    eps = torch.finfo(torch.bfloat16).eps
    assert fields["scale"].flatten().tolist() == [-1.0, 1.0, 0.5, eps]
    expected = [
        group(-8, 7, -1, 0, -2, 2),
        group(-8, 7, -1, 0, 2, 2),
        group(7, -8, 2),
        group(),
    ]
    assert torch.equal(codes(fields["elements"]), torch.stack(expected).int())
    assert decode(fields, fmt, torch.float32)[0, :6].tolist() == [8, -7, 1, 0, 2, -2]


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_less_is_lost_and_what_is_computed_is_stored(size: int, dtype: torch.dtype) -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(3)).to(dtype)
    lost: dict[bool, list[float]] = {}
    for fmt in (get_format("int4", size), with_signed_scales(get_format("int4", size))):
        stat = block_stat(w, fmt)
        chosen = choose(errors(w, fmt, None, stat, MSE_MULTIPLIERS), MSE_MULTIPLIERS)
        for found in (stat, stat * chosen.unsqueeze(-1)):
            fields = encode(w, fmt, None, found)
            decoded = decode(fields, fmt, torch.float32)
            lost.setdefault(fmt.signed, []).append((decoded - w.float()).square().sum().item())
        fields = encode(w, fmt, None)
        assert torch.equal(fake_quant(w, fmt, None), decode(fields, fmt, dtype))
        kept = encode_on(w, fmt, {"scale": fields["scale"]})
        assert torch.equal(kept["elements"], fields["elements"])
    assert 0.3 < (fields["scale"] < 0).float().mean() < 0.7
    assert lost[True][0] < 0.92 * lost[False][0] and lost[True][1] < 0.97 * lost[False][1]


def test_a_cut_group_has_the_sign_of_the_whole() -> None:
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    fmt = with_signed_scales(get_format("int4"))
    whole = encode(w, fmt, None)
    halves = [(w[:, :64], (0, 0)), (w[:, 64:], (0, 64))]
    stats = [block_stat(half, fmt, origin) for half, origin in halves]
    merged = torch.maximum(*stats)
    parts = [encode(half, fmt, None, merged, origin) for half, origin in halves]
    assert torch.equal(torch.cat([p["elements"] for p in parts], 1), whole["elements"])
    assert all(torch.equal(p["scale"], whole["scale"]) for p in parts)


def test_a_recipe_says_it_and_is_written_again() -> None:
    one = recipe(algorithm="mse")
    assert one.rules[0].weights == with_signed_scales(get_format("int4", 32))
    assert one.label(0) == "rule 1: int4 (mse, signed scales) *"
    again = parse_recipe("own", {"rules": [rule_document(one.rules[0])]})
    assert again.rules == one.rules
    unsigned = recipe(algorithm="mse", weights={"format": "int4", "group_size": 32})
    assert recipe_digest(unsigned) != recipe_digest(one) == recipe_digest(again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": "fp8"}, "signed scales with fp8 inputs, .* leave inputs or scales out"),
        ({"weights": {"format": "int4_asym", "scales": "signed"}}, "only int4 has signed scales"),
        ({"weights": {"format": "int4", "scales": "unsigned"}}, "scales must be signed, or left"),
        ({"weights": {"format": "int4", "scales": None}}, "must be signed, .* got None"),
    ],
)
def test_refused(changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_experts": 2, "num_hidden_layers": 1}
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"), **sizes)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "signed.yaml"
    path.write_text(yaml.safe_dump({"rules": [rule(quantize=["*proj"])]}))
    return str(path)


@pytest.mark.parametrize("dialect", ["auto-round", "gptq", "compressed-tensors"])
def test_dialects_that_take_them(dialect: str, source: Path, file: str, tmp_path: Path) -> None:
    run(source, tmp_path / "out", export_quant_cfg=file, export_format=dialect)
    assert verify(tmp_path / "out", source).problems == ()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = [t for n, t in tensors.items() if n.endswith(("scales", "weight_scale"))]
    below = sum(int((t < 0).sum()) for t in scales)
    assert 0.3 < below / sum(t.numel() for t in scales) < 0.7


@pytest.mark.parametrize("dialect", ["modelopt", "awq"])
def test_dialects_that_do_not(dialect: str, source: Path, file: str, tmp_path: Path) -> None:
    message = f"{dialect} export has no signed scales: .* leave scales: signed out"
    with pytest.raises(FormatError, match=message):
        run(source, tmp_path / "out", export_quant_cfg=file, export_format=dialect)
    assert not (tmp_path / "out").exists()
