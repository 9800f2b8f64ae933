"""Values at the edge: experts of zeros in every format, scales in E8M0 that are NaN."""

from pathlib import Path

import pytest
import torch

import megatron_quant.recipes.load as recipes
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.errors import CheckpointError
from megatron_quant.models import Box, whole
from tests.dist import checkpoints
from tests.dist.test_layouts import digests, export_all, folder
from tests.unit import exported, sources
from tests.unit.test_packed_references import STACK, as_stacks, stacks

ZERO = "model.layers.1.mlp.experts."
# Static INT8 inputs are for no experts.
DIALECTS = {"fp8_block": "fp8", "int8_static": "", "int8_sq": ""}
RECIPES = sorted(p.stem for p in (Path(recipes.__file__).parents[1] / "configs").glob("*.yaml"))
CASES: list[dict[str, object]] = [
    {
        "export_quant_cfg": recipe,
        "export_format": DIALECTS.get(recipe, "compressed-tensors"),
        "weight_only": recipe not in ("fp8_block", "int8", "fp8_channel"),
    }
    for recipe in RECIPES
    if DIALECTS.get(recipe, "compressed-tensors")
]


@pytest.fixture(scope="module")
def zero_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experts of one layer are zeros, and those of the other are not."""
    source = checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("zeros") / "source")

    def clear(tensors: sources.Tensors) -> None:
        for name in [n for n in tensors if n.startswith(ZERO)]:
            tensors[name].zero_()

    sources.edit(source, clear)
    return source


@pytest.fixture(scope="module")
def streamed(zero_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("streamed")
    for case in CASES:
        sources.run(zero_experts, out / folder(case), **case, max_shard_size="300KB")
    return out


@pytest.mark.parametrize("case", CASES, ids=folder)
def test_a_layer_of_zero_experts_is_zero_again(
    case: dict[str, object], zero_experts: Path, streamed: Path
) -> None:
    out = streamed / folder(case)
    assert verify(out, zero_experts).problems == ()
    decoded = open_source(out)
    names = [n for n in decoded if n.startswith(ZERO)]
    assert len(names) == 3 * 8
    for name in names:
        info = decoded.info(name)
        assert info is not None
        assert torch.count_nonzero(decoded.read(name, whole(info.shape))) == 0, name


def test_zero_experts_through_a_live_model_are_the_same_bytes(
    zero_experts: Path, streamed: Path, tmp_path: Path, ranks
) -> None:
    # Where inputs weigh, each path measures its own model: no two forwards give the same bits.
    alike = [case for case in CASES if not str(case["export_quant_cfg"]).endswith("_awq")]
    ranks(2, export_all, zero_experts, tmp_path, 2, 2, 1, alike, timeout=600)
    for case in alike:
        assert digests(tmp_path / folder(case)) == digests(streamed / folder(case)), case


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("choice", ["mxfp8", "mxfp4"])
def test_a_shared_exponent_that_is_nan_is_named(
    choice: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = {s.name: torch.randn(s.shape) for p in exported.PARAMS for s in p.sources}
    plan = exported.plan(choice)
    directory = exported.export(tmp_path, "compressed-tensors", plan, weights)
    module = "model.layers.0.self_attn.o_proj"

    def spoil(tensors: exported.Tensors) -> None:
        scale = tensors[f"{module}.weight_scale"].view(torch.uint8)
        scale[-1, 0] = 255
        tensors[f"{module}.weight_scale"] = scale.view(dtype)

    exported.edit(directory, spoil)
    source = open_source(directory)
    source.read(f"{module}.weight", Box((0, 0), (1, 32)))  # which has another scale
    info = source.info(f"{module}.weight")
    assert info is not None
    with pytest.raises(CheckpointError, match=r"o_proj.weight_scale: holds the E8M0 code 255"):
        source.read(f"{module}.weight", whole(info.shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_the_exponents_of_gpt_oss_in_either_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, scales = stacks(), f"{STACK}.down_proj_scales"
    wanted = open_source(as_stacks(tmp_path / "a", tensors))
    found = open_source(as_stacks(tmp_path / "b", {**tensors, scales: tensors[scales].view(dtype)}))
    name = f"{STACK}.1.down_proj.weight"
    box = Box((3, 32), (20, 64))
    assert torch.equal(found.read(name, box), wanted.read(name, box))
    tensors[scales][1, 22, 1] = 255
    bad = open_source(as_stacks(tmp_path / "c", {**tensors, scales: tensors[scales].view(dtype)}))
    with pytest.raises(
        CheckpointError, match=r"down_proj.weight_scales: holds the E8M0 code 255, which is NaN"
    ):
        bad.read(name, box)


def test_blocks_of_fp8_with_scales_in_e8m0(tmp_path: Path) -> None:
    weights = {s.name: torch.randn(s.shape) for p in exported.PARAMS for s in p.sources}
    plan = exported.plan("fp8_block")
    directory = exported.export(tmp_path, "fp8", plan, weights)
    module = "model.layers.0.self_attn.q_proj"
    scale = f"{module}.weight_scale_inv"

    def powers(tensors: exported.Tensors) -> None:
        codes = torch.full(tensors[scale].shape, 120, dtype=torch.uint8)
        tensors[scale] = codes.view(torch.float8_e8m0fnu)

    exported.edit(directory, powers)
    source = open_source(directory)
    info = source.info(f"{module}.weight")
    assert info is not None
    codes = sources.tensors(directory)[f"{module}.weight"]
    found = source.read(f"{module}.weight", whole(info.shape))
    assert torch.equal(found, codes.float() * 2.0**-7)
    assert verify(directory).problems == ()

    def spoil(tensors: exported.Tensors) -> None:
        tensors[scale].view(torch.uint8)[0, 0] = 255

    exported.edit(directory, spoil)
    nan = f"{scale}: holds the E8M0 code 255, which is NaN and no scale"
    assert verify(directory).problems == (nan,)
    with pytest.raises(CheckpointError, match="holds the E8M0 code 255"):
        open_source(directory).read(f"{module}.weight", whole(info.shape))
