"""Groups and blocks that shards cut give the bytes and the forward of one rank, on real ranks."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_quant.formats import fake_quant, get_format, tensor_scale
from megatron_quant.formats.search import MSE_MULTIPLIERS
from tests.dist import checkpoints
from tests.dist.test_layouts import PATIENCE_S, digests, export_all, folder

# Inner sizes that end inside groups of 128 and of 32, and inside blocks of 128 rows and columns.
SIZES = {"moe_intermediate_size": 704, "num_hidden_layers": 1, "num_experts": 4, "head_dim": 24}
# (ranks, tp, ep, etp)
LAYOUTS = [(2, 2, 1, 1), (4, 4, 1, 4), (4, 2, 1, 2)]
WEIGHT_ONLY = ("int4", "int4_asym", "int8_group", "fp8_block", "fp8_channel", "mxfp8", "nvfp4")
GROUPED = ("int4", "int4_asym", "int8_group")
SEARCHED = ("int4", "int4_asym", "fp8_block", "fp8_channel", "fp8", "nvfp4")
CASES = [
    *({"export_quant_cfg": recipe, "weight_only": True} for recipe in WEIGHT_ONLY),
    *({"export_quant_cfg": recipe, "weight_only": True, "algorithm": "mse"} for recipe in SEARCHED),
    {
        "export_quant_cfg": "fp8",
        "weight_only": True,
        "algorithm": "mse",
        "expert_scales": "per_expert",
    },
    {"export_quant_cfg": "nvfp4_four_over_six", "weight_only": True},
    {"export_quant_cfg": "int8"},
]


def dialect(case: dict[str, object]) -> str:
    """One that takes rows whose last group is not whole."""
    return "auto-round" if case["export_quant_cfg"] in GROUPED else "compressed-tensors"


@pytest.fixture(scope="module")
def crossing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("crossing"), **SIZES)


def test_exports_are_byte_equal(crossing: Path, tmp_path: Path, ranks) -> None:
    cases = [case | {"export_format": dialect(case)} for case in CASES]
    ranks(1, export_all, crossing, tmp_path / "one", 1, 1, 1, cases, timeout=PATIENCE_S)
    written = [digests(tmp_path / "one" / folder(case)).values() for case in cases]
    assert len({tuple(files) for files in written}) == len(cases), "a search changed nothing"
    for world, tp, ep, etp in LAYOUTS:
        out = tmp_path / f"{world}-{tp}-{ep}-{etp}"
        ranks(world, export_all, crossing, out, tp, ep, etp, cases, timeout=PATIENCE_S)
        for case in cases:
            expected = digests(tmp_path / "one" / folder(case))
            assert digests(out / folder(case)) == expected, (out.name, case)


@dataclass(frozen=True)
class Piece:
    """What a rank computes with of a Hugging Face tensor. ``amax``: of its scale."""

    name: str
    start: tuple[int, ...]
    values: torch.Tensor
    amax: torch.Tensor | None


def _computed_with(path: Path, recipe: str, tp: int, ep: int, etp: int) -> list[Piece]:
    from megatron_quant.ckpt.plan.shards import regions
    from tests.dist import live

    model = live.load(path, live.Parallelism(tp, ep, etp))
    attached = live.with_quantizers(model, recipe, weights_alone=True)
    attached.calibrate()
    where = {local.param.name: local for local in model.local}
    pieces = []
    for layer in attached.layers:
        weights = layer.weights()
        if layer.grouped:
            quantized = list(layer.module.quantize(torch.stack(weights)).detach())
        else:
            quantized = [layer.module.weight_quantizer(weights[0]).detach()]
        for i, decision in enumerate(layer.decisions):
            local = where[decision.slot.name]
            for source, region in regions(local.param, local.shard_rank, local.shard_size):
                values = region.take(quantized[i]).clone()
                pieces.append(Piece(source.name, region.start, values, layer.weight_amax(i)))
    return pieces


def _of_all(path: Path, recipes: list[str], *parallelism: int) -> dict[str, list[Piece]]:
    return {recipe: _computed_with(path, recipe, *parallelism) for recipe in recipes}


@pytest.mark.parametrize("layout", [(1, 1, 1, 1), (4, 4, 1, 2)])
def test_a_forward_computes_with_slices_of_the_quantized_tensors(
    crossing: Path, ranks, layout: tuple[int, ...]
) -> None:
    world, *parallelism = layout
    whole = load_file(crossing / "model.safetensors")
    recipes = ["int4", "int4_asym", "fp8_block", "nvfp4"]
    for found in ranks(world, _of_all, crossing, recipes, *parallelism):
        for recipe, pieces in found.items():
            fmt = get_format(recipe)
            for piece in pieces:
                dscale = tensor_scale(piece.amax, fmt) if fmt.tensor_scale else None
                expected = fake_quant(whole[piece.name], fmt, dscale)
                box = tuple(
                    slice(o, o + n) for o, n in zip(piece.start, piece.values.shape, strict=True)
                )
                assert torch.equal(piece.values, expected[box]), (recipe, piece.name, piece.start)


def _logits(path: Path, recipe: str, tp: int, ep: int, etp: int) -> torch.Tensor:
    from megatron_quant.mcore.model.schedule import full_logits
    from tests.dist import live

    model = live.load(path, live.Parallelism(tp, ep, etp))
    live.with_quantizers(model, recipe).calibrate()
    with torch.no_grad():
        return full_logits(model.module, live.batches(1)[0], 258)


@pytest.mark.parametrize("recipe", ["mxfp8", "fp8_block", "int8"])
def test_inputs_whose_blocks_shards_cut_are_quantized_too(
    crossing: Path, ranks, recipe: str
) -> None:
    (whole,) = ranks(1, _logits, crossing, recipe, 1, 1, 1)
    for found in ranks(4, _logits, crossing, recipe, 4, 1, 4):
        assert (found - whole).norm() < 0.2 * whole.norm()


MIXED = """
rules:
  - quantize: ["*.experts.*"]
    weights: {format: int4, group_size: 128}
    algorithm: mse
  - quantize: ["*self_attn*"]
    weights: fp8
    algorithm: mse
"""


def _collectives(path: Path, recipe: str, tp: int, etp: int) -> list[int]:
    """How many elements each all-reduce of the calibration carries, in order."""
    import torch.distributed as dist

    from tests.dist import live

    model = live.load(path, live.Parallelism(tp=tp, etp=etp))
    attached = live.with_quantizers(model, recipe, weights_alone=True)
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        attached.calibrate()
    finally:
        dist.all_reduce = all_reduce
    return sizes


def test_only_cut_groups_are_sent_in_one_collective_a_group(tmp_path: Path, ranks) -> None:
    mixed, tried = tmp_path / "mixed.yaml", len(MSE_MULTIPLIERS)
    mixed.write_text(MIXED)
    for layers in (1, 3):
        sizes = SIZES | {"num_hidden_layers": layers, "head_dim": 64}
        path = checkpoints.save("qwen3_moe", tmp_path / str(layers), **sizes)
        # 704 / 2 ends inside a group of each of 128 rows of 4 experts; 512 / 2 ends at one.
        weights, cut = layers * (2 + 2 * 4), layers * 4 * 128
        for found in ranks(2, _collectives, path, "int4", 2, 2):
            assert found == [weights, cut]
        for found in ranks(2, _collectives, path, str(mixed), 2, 2):
            fp8 = layers * 2 * tried
            assert found == [weights, fp8, fp8, cut, cut * tried]


def _searched(path: Path, recipe: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The statistics that a search finds with all blocks at once, and a few at a time."""
    from megatron_quant.calib import search
    from megatron_quant.layers.backend import block_amax
    from tests.dist import live

    found = []
    for errors_at_once in (1 << 30, 1000):
        search._ERRORS_AT_ONCE = errors_at_once
        attached = live.with_quantizers(live.load(path, live.Parallelism(tp=2, etp=2)), recipe)
        attached.calibrate()
        found.append([block_amax(x.module.weight_quantizer).clone() for x in attached.layers])
    return found[0], found[1]


def test_a_search_of_a_few_blocks_at_a_time_finds_the_same(
    crossing: Path, tmp_path: Path, ranks
) -> None:
    for fmt in ("int4", "fp8_block"):
        recipe = tmp_path / f"{fmt}.yaml"
        rule = f'{{quantize: ["*proj*"], weights: {fmt}, algorithm: mse}}'
        recipe.write_text(f"rules: [{rule}]")
        for whole, pieces in ranks(2, _searched, crossing, str(recipe)):
            assert all(map(torch.equal, whole, pieces)), fmt


def _folded(path: Path) -> list[bool]:
    """Whether quantizers of grouped layers have statistics of blocks after their fold."""
    from megatron_quant.layers.backend import block_amax
    from tests.dist import live

    attached = live.with_quantizers(live.load(path, live.Parallelism(etp=2)), "int4")
    attached.calibrate()
    grouped = [layer for layer in attached.layers if layer.grouped]
    assert any(block_amax(layer.module.weight_quantizer) is not None for layer in grouped)
    for layer in grouped:
        layer.module.fold_weight()
    return [block_amax(layer.module.weight_quantizer) is not None for layer in grouped]


def test_folding_forgets_the_statistics(crossing: Path, ranks) -> None:
    assert ranks(2, _folded, crossing) == [[False, False]] * 2
